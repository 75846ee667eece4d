"""Text files that anybody may have named: also one that never ends."""

import errno
from pathlib import Path

MOST_BYTES = 2**26
"""More than any plan, config or cluster file has."""
_PIECE_BYTES = 2**16
"""Read at once, as what is asked for is allocated, and workers have little memory."""


def read_text(path: Path) -> str:
    """Raises OSError, also for a file of more than `MOST_BYTES`, or UnicodeDecodeError."""
    data = bytearray()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            data += piece
            if len(data) > MOST_BYTES:
                said = f"it has more than {MOST_BYTES >> 20} MiB, which no such file has"
                raise OSError(errno.EFBIG, said, str(path))
    return data.decode("utf-8")
