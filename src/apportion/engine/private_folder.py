"""One folder of this process alone for the sockets of its runs, which ends with it.

Its owner holds a lock on it as long as it lives: a folder that nobody holds is of a process that was killed, and the
next one to start removes it.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from apportion.types.errors import EngineError

_PREFIX = "apportion-"
_NAME_BYTES = 8
"""That tempfile.mkdtemp adds."""
_PATH_BYTES = 107
"""Of a socket's address (unix(7)), without the final zero."""
_INSIDE_BYTES = 32
"""Left for what lies in the folder: an engine's number and a socket's, or multiprocessing's own."""
_OTHERS = ("/tmp", "/var/tmp", "/dev/shm")


@cache
def private_folder() -> Path:
    """Mode 0700: only this user can connect. Raises EngineError where there is no place for it."""
    reason = "no folder's name is short enough for a socket"
    for parent in _parents():
        _sweep(parent)
        try:
            return _locked(parent)
        except OSError as error:
            reason = f"{error.strerror}: {parent}"
    raise EngineError(f"no folder for the run's sockets ({reason}); set TMPDIR to one with room")


def _parents() -> Iterator[Path]:
    given = (os.environ.get(name, "") for name in ("TMPDIR", "XDG_RUNTIME_DIR"))
    for text in dict.fromkeys((*given, *_OTHERS)):
        path = os.path.abspath(text) if text else ""
        length = len(os.fsencode(path)) + len(_PREFIX) + _NAME_BYTES + _INSIDE_BYTES
        if path and length <= _PATH_BYTES and os.path.isdir(path):
            yield Path(path)


def _locked(parent: Path) -> Path:
    """A new folder, which another process may have taken for a dead one's before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY)  # open as long as this process lives
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            atexit.register(_remove, folder, os.getpid())
            return folder
        os.close(descriptor)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not one that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Removes what dead processes of this user left there."""
    with suppress(OSError):
        for folder in parent.glob(_PREFIX + "*"):
            with suppress(OSError):
                _remove_dead(folder)


def _remove_dead(folder: Path) -> None:
    """Raises BlockingIOError for one whose owner lives."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
