"""Python processes that this one starts: they import nothing out of the current folder.

`python -m` and `python -c` put it first on the path, and a numpy.py beside a downloaded model would run. The standard
library starts its forkserver in that way.
"""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

_SAFE_PATH = "PYTHONSAFEPATH"
"""The interpreter's own variable (PEP 587, Python 3.11): processes below inherit it."""


def python(*arguments: str) -> list[str]:
    """The command of such a process."""
    return [sys.executable, "-P", *arguments]


@contextmanager
def safe_children() -> Generator[None]:
    """Processes that other code starts meanwhile are started so."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
