"""Time of one all-reduce inside a tensor-parallel group of processes on this machine, by way of exchange, members and
message size. Members have a core each while there are enough."""

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
import zmq
from torch import Tensor

from apportion.transport.pairs import SocketExchange, connect_pairs
from apportion.transport.shared import SharedExchange
from apportion.transport.tensors import flat_bytes

ROUNDS = 5
CASES = [("zmq", 2), ("sockets", 2), ("shared", 2), ("sockets", 3), ("shared", 3)]
MESSAGE_BYTES = (4 * 2**10, 64 * 2**10, 512 * 2**10)
SPIN_S = 2e-4


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


def all_reduce_by(method: str, run_dir: Path, rank: int, size: int) -> Callable[[Tensor], Tensor]:
    if method == "zmq":
        return zmq_all_reduce(run_dir, rank)
    pairs = connect_pairs(run_dir, "group", rank, size)
    if method == "sockets":
        return SocketExchange(rank, pairs).total
    own_core = size <= len(os.sched_getaffinity(0))
    return SharedExchange(rank, pairs, SPIN_S if own_core else 0.0).total


def member(method: str, run_dir: Path, rank: int, size: int, results: "multiprocessing.Queue[float]") -> None:
    torch.set_num_threads(1)
    all_reduce = all_reduce_by(method, run_dir, rank, size)
    cores = sorted(os.sched_getaffinity(0))
    if size <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    with torch.inference_mode():
        for message_bytes in MESSAGE_BYTES:
            partial = torch.randn(1, message_bytes // 4)
            repeats = 500 if message_bytes > 2**16 else 3000
            for _ in range(ROUNDS + 1):
                begun_s = time.perf_counter()
                for _ in range(repeats):
                    all_reduce(partial)
                if rank == 0:
                    results.put((time.perf_counter() - begun_s) / repeats)


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
            for message_bytes in MESSAGE_BYTES:
                _, *seconds = [results.get() for _ in range(ROUNDS + 1)]
                print(
                    f"{method:8} {size} members, {message_bytes:7} bytes: {median(seconds) * 1e6:7.1f} µs"
                    f" ({min(seconds) * 1e6:.1f} to {max(seconds) * 1e6:.1f})"
                )
                row = {"method": method, "members": size, "message_bytes": message_bytes}
                rows.append(row | {"seconds": median(seconds)})
            for process in processes:
                process.join()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
