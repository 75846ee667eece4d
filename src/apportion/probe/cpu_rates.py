"""Prints what BLAS's threads read (bytes/s, a matrix-vector product) and compute (FLOP/s, an fp32 product), and
what one thread copies out of a file in the page cache (bytes/s); the first alone with the argument "read"."""

import os
import sys
import tempfile

import numpy as np

from apportion.types.stopwatch import best_s, median_s

READ_BYTES = 128 * 2**20
"""Beyond the caches of the machines meant here."""
MEASURE_S = 0.15


def read_bytes_per_s() -> float:
    rows = 4096
    matrix = np.ones((rows, READ_BYTES // 4 // rows), dtype=np.float32)
    vector = np.ones(matrix.shape[1], dtype=np.float32)
    return READ_BYTES / median_s(lambda: matrix @ vector, MEASURE_S)


def multiply_flops_per_s() -> float:
    size = 512
    matrix = np.ones((size, size), dtype=np.float32)
    return 2 * size**3 / best_s(lambda: matrix @ matrix, MEASURE_S)


def copied_bytes_per_s() -> float:
    """As weights are streamed: read into a buffer of ours, piece by piece."""
    piece_bytes = 2**22
    target = memoryview(bytearray(READ_BYTES))
    with tempfile.TemporaryFile() as file:
        for _ in range(len(target) // piece_bytes):
            file.write(bytes(piece_bytes))
        file.flush()

        def copy() -> None:
            for start in range(0, len(target), piece_bytes):
                os.preadv(file.fileno(), [target[start : start + piece_bytes]], start)

        return len(target) / best_s(copy, MEASURE_S)


if __name__ == "__main__":
    whole = sys.argv[1:] != ["read"]
    print(read_bytes_per_s(), *((multiply_flops_per_s(), copied_bytes_per_s()) if whole else ()))
