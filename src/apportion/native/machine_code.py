"""Where numba keeps compiled code, and when it is too old.

numba's own cache knows the file of a function, not those that it inlines from, and it writes the index of all types of
a function at once: two processes that compile it for different types can leave one's code under the other's name. Here
code is as old as all that it is made of, and each type has a name of its own.

What is kept are pickles, and so programs: they are read out of a folder that nobody else can write to, and only whole.
Code that cannot be read is compiled, and code that cannot be kept is used.
"""

import atexit
import hashlib
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
from numba.core import caching

from apportion.types.cache import cache_folder

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "native/*.py", "model/kernels/*.py", "types/layout.py", "transport/shared_code.py", "engine/pacing.py",
)  # fmt: skip
"""Of compiled code, besides a function's own file."""


_ASKED_FOR = "NUMBA_CACHE_DIR"
"""Of the environment alone: numba also takes it from a file in the current folder."""
_DIGEST_BYTES = 32


class Locator(caching.InTreeCacheLocator):
    """Beside the source, where that may be written by nobody else, else in the user's cache, else nowhere."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "Locator | None":
        if not Path(py_file).is_relative_to(_PACKAGE):
            return None
        locator = cls(py_func, py_file)
        beside, own = Path(str(locator._cache_path)), cls.get_suitable_cache_subpath(py_file)
        asked_for = Path(os.environ.get(_ASKED_FOR, ""))
        given = [asked_for / own] if asked_for.is_absolute() else []
        for folder in (*given, beside, cache_folder() / "machine-code" / own):
            locator._cache_path = str(folder)
            with suppress(OSError):
                if folder != beside:
                    _make_private(folder)
                locator.ensure_cache_path()
                if _is_ours(folder):
                    return locator
        locator._cache_path = _of_this_process()
        return locator

    def get_source_stamp(self) -> bytes:
        return _stamp(self._py_file)


def _make_private(folder: Path) -> None:
    """Folders that are missing on the way are of mode 0700. Raises OSError."""
    missing = [folder, *folder.parents]
    for one in reversed([path for path in missing if not path.exists()]):
        one.mkdir(mode=0o700, exist_ok=True)


def _is_ours(folder: Path) -> bool:
    """Whether nobody but this user, or the superuser, can have put something there."""
    found = folder.stat()
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return found.st_uid in (os.geteuid(), 0) and not writable


class CodeFile(caching.IndexDataCacheFile):
    """Both of its files begin with the digest of what follows, and both say what source they are of."""

    def _load_index(self) -> dict[Any, Any]:
        return self._read(self._index_path) or {}

    def _save_index(self, overloads: dict[Any, Any]) -> None:
        self._write(self._index_path, overloads)

    def _load_data(self, name: str) -> Any:
        return self._read(self._data_path(name))

    def _save_data(self, name: str, data: Any) -> None:
        self._write(self._data_path(name), data)

    def _read(self, path: str) -> Any:
        """None where there is nothing, nothing whole, or what is too old."""
        try:
            content = Path(path).read_bytes()
            digest, pickled = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest != hashlib.sha256(pickled).digest():
                return None
            version, stamp, kept = pickle.loads(pickled)
        except Exception:
            return None
        return kept if (version, stamp) == (self._version, self._source_stamp) else None

    def _write(self, path: str, content: Any) -> None:
        pickled = self._dump((self._version, self._source_stamp, content))
        with suppress(OSError), self._open_for_write(path) as file:  # a full disk
            file.write(hashlib.sha256(pickled).digest() + pickled)


def keep_machine_code() -> None:
    """In folders of ours, for all functions of this package that are compiled from now on."""
    if Locator not in caching.CacheImpl._locator_classes:
        caching.CacheImpl._locator_classes.insert(0, Locator)
        caching.IndexDataCacheFile = CodeFile


def named(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The function under a name for one kind of operands, which numba's cache has an index for."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__qualname__ = f"{function.__qualname__}.{kind}"
    return copy


@cache
def _stamp(file: str) -> bytes:
    """Of the content of a function's file and of all that compiled code is made of."""
    digest = hashlib.sha256(llvmlite.__version__.encode())
    for path in (Path(file), *(path for source in _SOURCES for path in sorted(_PACKAGE.glob(source)))):
        digest.update(path.read_bytes())
    return digest.digest()


@cache
def _of_this_process() -> str:
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
