"""Who is told of the memory that building a stage takes."""

from typing import Protocol


class LoadMemory(Protocol):
    def observe(self) -> None:
        """After each allocation of the stage's."""
        ...


class Unmetered:
    """Where nobody asks."""

    def observe(self) -> None:
        pass
