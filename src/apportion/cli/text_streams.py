"""What a command reads and writes as text, in any locale and into any file."""

import os
import sys
from collections.abc import Iterable
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_STDOUT, _STDERR = 1, 2
_CLOSED = "it is closed"


class _StandardOutput(FileIO):
    """File 1. Raises UsageError where it takes nothing, BrokenPipeError where nobody reads it."""

    def __init__(self, *, closed: bool) -> None:
        super().__init__(_STDOUT, "w", closefd=False)
        self._was_closed = closed

    def write(self, data: "Buffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            reason = _CLOSED if self._was_closed else error.strerror
            raise UsageError(f"cannot write standard output: {reason}") from None


def open_streams() -> None:
    """A character that the locale has none for is written by its number. What is closed is /dev/null from now on, so
    that no other file gets its number: for errors to go to, and of output nothing to take it."""
    closed = {number for number in (0, _STDOUT, _STDERR) if _takes_place(number)}
    if sys.stderr is None:
        sys.stderr = open(_STDERR, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    if sys.stdout is None or isinstance(sys.stdout, TextIOWrapper):
        sys.stdout = TextIOWrapper(
            BufferedWriter(_StandardOutput(closed=_STDOUT in closed)),
            encoding=sys.stdout.encoding if sys.stdout else None,
            errors="backslashreplace",
            line_buffering=sys.stdout is not None and sys.stdout.line_buffering,
            write_through=sys.stdout is not None and sys.stdout.write_through,
        )


def _takes_place(number: int) -> bool:
    """Whether the file was closed, and is /dev/null now, which errors may be written to."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY if number == _STDERR else os.O_RDONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        return True
    return False


def close_streams() -> None:
    """What they still hold is dropped: the interpreter would try, and fail, once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STDOUT)
    os.close(nowhere)


def check_text(arguments: Iterable[str]) -> None:
    """Raises UsageError for one that is not in the locale's encoding."""
    for argument in arguments:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise UsageError(f"'{shown}' is no text in this locale's encoding; write it in UTF-8")
