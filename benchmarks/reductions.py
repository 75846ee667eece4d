"""Time of one all-reduce inside a tensor-parallel group of processes on this machine, by members and message size;
for two members also what the same exchange takes through ZeroMQ sockets."""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zmq
from torch import Tensor

from apportion.parallel.group import TensorGroup
from apportion.parallel.wire import flat_bytes

REPEATS = 2000
CASES = [("direct", 2), ("zmq", 2), ("direct", 3)]
COLUMNS = (256, 4096)


def zmq_all_reduce(run_dir: Path, rank: int) -> Callable[[Tensor], Tensor]:
    socket = zmq.Context.instance().socket(zmq.PAIR)
    address = f"ipc://{run_dir}/pair"
    socket.bind(address) if rank == 0 else socket.connect(address)

    def all_reduce(partial: Tensor) -> Tensor:
        socket.send(flat_bytes(partial))
        return partial + torch.from_numpy(np.frombuffer(socket.recv(), dtype=np.float32).copy()).view_as(
            partial
        )

    return all_reduce


def member(method: str, run_dir: Path, rank: int, size: int, results: "multiprocessing.Queue[float]") -> None:
    torch.set_num_threads(1)
    if method == "zmq":
        all_reduce = zmq_all_reduce(run_dir, rank)
    else:
        all_reduce = TensorGroup(run_dir, "group", rank, size, lambda: None).all_reduce
    for columns in COLUMNS:
        partial = torch.randn(1, columns)
        for _ in range(REPEATS // 10):
            all_reduce(partial)
        begun_s = time.perf_counter()
        for _ in range(REPEATS):
            all_reduce(partial)
        if rank == 0:
            results.put((time.perf_counter() - begun_s) / REPEATS)


def main() -> None:
    context = multiprocessing.get_context("spawn")
    rows = []
    for method, size in CASES:
        results = context.Queue()
        with tempfile.TemporaryDirectory() as run_dir:
            arguments = [(method, Path(run_dir), rank, size, results) for rank in range(size)]
            processes = [context.Process(target=member, args=one) for one in arguments]
            for process in processes:
                process.start()
            for columns in COLUMNS:
                seconds = results.get()
                print(f"{method:6} {size} members, {4 * columns:6} bytes: {seconds * 1e6:6.1f} µs")
                rows.append(
                    {"method": method, "members": size, "message_bytes": 4 * columns, "seconds": seconds}
                )
            for process in processes:
                process.join()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
