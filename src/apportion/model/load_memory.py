"""Who is told of the memory that building a stage takes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class LoadMemory(Protocol):
    def observe(self) -> None:
        """After each allocation of the stage's."""
        ...

    def runtime(self) -> AbstractContextManager[None]:
        """What is allocated within and stays is the runtime's, as the imported libraries are: code that they write."""
        ...


class Unmetered:
    """Where nobody asks."""

    def observe(self) -> None:
        pass

    def runtime(self) -> AbstractContextManager[None]:
        return nullcontext()
