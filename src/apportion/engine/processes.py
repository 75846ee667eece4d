"""The process that workers are forked from, and how one is started from it.

It imports their modules once, beside whatever this process does meanwhile, nothing out of the current folder. Its
socket lies in the private folder, and it ends with this process.
"""

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import forkserver, process, resource_tracker
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from apportion.engine.private_folder import private_folder
from apportion.types.children import safe_children
from apportion.types.errors import EngineError

_FIRST = "apportion.engine.uncollected"


def preload(modules: Sequence[str]) -> None:
    """Starts importing these there, where it is not running yet. Raises EngineError."""
    process.current_process()._config.setdefault("tempdir", str(private_folder()))  # pyright: ignore
    multiprocessing.get_context("forkserver").set_forkserver_preload([_FIRST, *modules])
    try:
        with safe_children():
            _ensure_running()
    except OSError as error:
        raise EngineError(
            f"cannot start the process that workers are forked from ({error.strerror})"
        ) from None
    _end_at_exit()


def _ensure_running() -> None:
    resource_tracker.ensure_running()  # by itself it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()  # inherits the mask: Ctrl-C is for the coordinator alone
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(target: Callable[..., object], arguments: tuple[Any, ...], name: str) -> BaseProcess:
    """A process that runs `target`, which is forked from the one preloaded. Raises EngineError where that cannot be."""
    made = multiprocessing.get_context("forkserver").Process(
        target=target, args=arguments, name=name, daemon=True
    )
    try:
        with safe_children(), _without_main():
            made.start()
    except (EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or "the process that it is forked from has ended"
        raise EngineError(
            f"cannot start {name}: {reason}; limits of this shell (ulimit) or memory may be too small"
        ) from None
    return made


@contextmanager
def _without_main() -> Iterator[None]:
    """By itself multiprocessing runs the caller's script once more in every process: one without a guard would start
    workers of its own. Ours need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@cache
def _end_at_exit() -> None:
    """Once: what runs before the first process is registered later, and so ends before."""
    atexit.register(_end)


def _end() -> None:
    """At once: it holds nothing, and to end by itself takes it seconds."""
    server: Any = vars(forkserver)["_forkserver"]
    pid: int | None = server._forkserver_pid
    if pid is not None:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        with suppress(OSError):
            server._stop()
