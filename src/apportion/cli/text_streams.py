"""What a command reads and writes as text, in any locale and into any file."""

import os
import sys
from collections.abc import Iterable
from io import TextIOWrapper

from apportion.types.errors import UsageError


def open_streams() -> None:
    """A character that the locale has none for is written by its number; what is closed takes everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """What they still hold is dropped: the interpreter would try, and fail, once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ else 1)
    os.close(nowhere)


def check_text(arguments: Iterable[str]) -> None:
    """Raises UsageError for one that is not in the locale's encoding."""
    for argument in arguments:
        if not argument.isascii() and any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode(errors="backslashreplace").decode()
            raise UsageError(f"'{shown}' is no text in this locale's encoding; write it in UTF-8")
