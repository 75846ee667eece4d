"""SIGINT, SIGTERM and SIGHUP end the command in order: its processes and folders with it."""

import signal
import sys
from threading import current_thread, main_thread

_HANGUP = getattr(signal, "SIGHUP", None)
"""None where terminals do not hang up (Windows)."""
_ENDING = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP is not None else []))
_received: list[int] = []


def handle_stop_signals() -> None:
    """From now on. Under nohup, which ignores SIGHUP, that stays ignored."""
    for number in _ENDING:
        if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def ignore_stop_signals() -> None:
    """The command is ending anyway."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)


def check_stop_signals() -> None:
    """Raises again what a handler raised: that is lost where it strikes a destructor or a callback of a C library. In
    other threads nothing: the main one ends them."""
    if _received and current_thread() is main_thread():
        if _received[0] == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + _received[0])


def _receive(number: int, _: object) -> None:
    """Only the first: who is cleaning up is not disturbed by a second Ctrl-C."""
    _received.append(number)
    if len(_received) == 1:
        check_stop_signals()
