"""How fast the disk under a folder is read past the page cache, as weights streamed from it are."""

import mmap
import os
import tempfile
from pathlib import Path

from apportion.types.stopwatch import median_s

FILE_BYTES, PIECE_BYTES = 2**28, 2**25
"""Pieces of the order of a layer."""
MEASURE_S = 0.3


def disk_bytes_per_s(folder: Path) -> float | None:
    """None where the system or its file system has no way past the page cache, or there is no room."""
    if not hasattr(os, "O_DIRECT"):
        return None
    piece = mmap.mmap(-1, PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    piece.madvise(mmap.MADV_HUGEPAGE)  # as a layer's buffer: into small pages a third as fast
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
            try:
                for start in range(0, FILE_BYTES, PIECE_BYTES):
                    os.pwrite(descriptor, piece, start)
                return FILE_BYTES / median_s(lambda: _read(descriptor, piece), MEASURE_S)
            finally:
                os.close(descriptor)
    except OSError:
        return None


def _read(descriptor: int, piece: mmap.mmap) -> None:
    for start in range(0, FILE_BYTES, PIECE_BYTES):
        os.preadv(descriptor, [piece], start)
