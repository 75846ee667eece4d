"""Prints what BLAS's threads read (bytes/s, a matrix-vector product) and compute (FLOP/s, an fp32 product), and what
one thread copies out of a file in the page cache, into memory and into what is in the last cache, and reads of the
latter (bytes/s); the first alone with the argument "read"."""

import sys
import tempfile
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import cast

import numpy as np

from apportion.probe.processor import cached_bytes
from apportion.types.cache import cache_folder
from apportion.types.stopwatch import best_s, median_s

READ_BYTES = 128 * 2**20
"""Beyond the caches of the machines meant here."""
MEASURE_S, CACHED_MEASURE_S = 0.15, 0.05
"""A plan waits for them where nothing was probed before."""


def read_bytes_per_s(num_bytes: int = READ_BYTES, measure_s: float = MEASURE_S) -> float:
    columns = 8192
    matrix = np.ones((num_bytes // 4 // columns, columns), dtype=np.float32)
    vector = np.ones(columns, dtype=np.float32)
    return matrix.nbytes / median_s(lambda: matrix @ vector, measure_s)


def multiply_flops_per_s() -> float:
    size = 512
    matrix = np.ones((size, size), dtype=np.float32)
    return 2 * size**3 / best_s(lambda: matrix @ matrix, MEASURE_S)


def copied_bytes_per_s(cached_bytes: int) -> tuple[float, float]:
    """As weights are streamed, out of a file in the page cache: into memory beyond the caches, and over and over into
    so many bytes that are in the last one."""
    target = np.ones(READ_BYTES, np.uint8)  # in huge pages, as a layer's buffer
    with _file(target) as file:

        def copy(piece_bytes: int) -> None:
            for start in range(0, READ_BYTES, piece_bytes):
                file.seek(start)
                file.readinto(target[:piece_bytes].data)

        return (
            READ_BYTES / best_s(lambda: copy(READ_BYTES), MEASURE_S),
            READ_BYTES / median_s(lambda: copy(cached_bytes), CACHED_MEASURE_S),
        )


def _file(content: np.ndarray) -> RawIOBase:
    """With that content, or, where the disk has no room for it, one in memory."""
    try:
        file = cast(RawIOBase, tempfile.TemporaryFile(dir=_cache_folder(), buffering=0))  # noqa: SIM115
        missing = content.data
        while missing:
            missing = missing[file.write(missing) :]
    except OSError:
        return cast(RawIOBase, BytesIO(content.data))
    return file


def _cache_folder() -> Path:
    """Where streamed weights are kept: file systems differ."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    print(read_bytes_per_s())
    if sys.argv[1:] != ["read"]:
        cached = cached_bytes() or 2**20
        print(multiply_flops_per_s(), *copied_bytes_per_s(cached), read_bytes_per_s(cached, CACHED_MEASURE_S))
