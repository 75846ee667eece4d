"""Where numba keeps compiled code, and when it is too old.

numba's own cache knows the file of a function, not those that it inlines from, and it writes the index of all types of
a function at once: two processes that compile it for different types can leave one's code under the other's name. Here
code is as old as all that it is made of, and each type has a name of its own.
"""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
from numba.core import caching, config

from apportion.types.cache import cache_folder

_PACKAGE = Path(__file__).parents[1]
_SOURCES = (
    "native/*.py", "model/kernels/*.py", "types/layout.py", "parallel/shared_code.py", "runtime/pacing.py",
)  # fmt: skip
"""Of compiled code, besides a function's own file."""


class Locator(caching.InTreeCacheLocator):
    """Beside the source, where that may be written, else in the user's cache, else nowhere."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "Locator | None":
        if not Path(py_file).is_relative_to(_PACKAGE):
            return None
        locator = cls(py_func, py_file)
        beside, own = locator._cache_path, cls.get_suitable_cache_subpath(py_file)
        asked_for: str = vars(config)["CACHE_DIR"]
        given = [Path(asked_for) / own] if asked_for else []
        for folder in (*given, beside, cache_folder() / "machine-code" / own):
            locator._cache_path = str(folder)
            try:
                locator.ensure_cache_path()
            except OSError:
                continue
            return locator
        locator._cache_path = _of_this_process()
        return locator

    def get_source_stamp(self) -> bytes:
        return _stamp(self._py_file)


def keep_machine_code() -> None:
    """In folders of ours, for all functions of this package that are compiled from now on."""
    if Locator not in caching.CacheImpl._locator_classes:
        caching.CacheImpl._locator_classes.insert(0, Locator)


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
