"""Time of one all-reduce inside a tensor-parallel group of processes on this machine, by members and message size."""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch

from apportion.parallel.group import TensorGroup

REPEATS = 2000
SIZES = (2, 3)
COLUMNS = (256, 4096)


def member(run_dir: str, rank: int, size: int, results: "multiprocessing.Queue[float]") -> None:
    torch.set_num_threads(1)
    group = TensorGroup(Path(run_dir), "group", rank, size, lambda: None)
    for columns in COLUMNS:
        partial = torch.randn(1, columns)
        for _ in range(REPEATS // 10):
            group.all_reduce(partial)
        begun_s = time.perf_counter()
        for _ in range(REPEATS):
            group.all_reduce(partial)
        if rank == 0:
            results.put((time.perf_counter() - begun_s) / REPEATS)
    group.close()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    rows = []
    for size in SIZES:
        results = context.Queue()
        with tempfile.TemporaryDirectory() as run_dir:
            processes = [
                context.Process(target=member, args=(run_dir, r, size, results)) for r in range(size)
            ]
            for process in processes:
                process.start()
            for columns in COLUMNS:
                seconds = results.get()
                print(f"{size} members, {4 * columns:6} bytes: {seconds * 1e6:6.1f} µs")
                rows.append({"members": size, "message_bytes": 4 * columns, "seconds": seconds})
            for process in processes:
                process.join()
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
