"""Files that a user asks for: whether they can be written is known before the work, and they appear whole or not at
all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from apportion.types.errors import UsageError


def check_writable(path: Path | None, what: str) -> Path | None:
    """Worth asking before long work; `what` names the file, as "--out". Raises UsageError."""
    if path is not None:
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            if _is_special(path):
                return path
            _part(path).unlink()
        except OSError as error:
            raise UsageError(f"cannot write {what} {path}: {_reason(error, path)}") from None
    return path


def write_file(path: Path, content: str | bytes, what: str) -> None:
    """Beside the old file, in whose place it then comes. Raises UsageError, the old file being as it was."""
    data = content.encode() if isinstance(content, str) else content
    try:
        replace_file(path, data)
    except OSError as error:
        raise UsageError(f"cannot write {what} {path}: {_reason(error, path)}") from None


def replace_file(path: Path, data: bytes) -> None:
    """Raises OSError, the old file being as it was. A link stays one; devices and pipes are written to."""
    if _is_special(path):
        path.write_bytes(data)
        return
    part = _part(path)
    try:
        part.write_bytes(data)
        _with_mode_of(path, part)
        os.replace(part, os.path.realpath(path))
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _part(path: Path) -> Path:
    """An empty file in the same folder."""
    real = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{real.name[:100]}.", dir=real.parent)
    os.close(descriptor)
    return Path(name)


def _with_mode_of(path: Path, part: Path) -> None:
    """The old file's mode, else what any new file has."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    part.chmod(mode)


def _reason(error: OSError, path: Path) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no folder {path.parent}"
    return error.strerror or str(error)
