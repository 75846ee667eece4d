"""What `bench` is asked to measure."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of every request."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`levels` are numbers of requests at once, each measured `rounds` times."""

    levels: tuple[int, ...]
    lengths: Lengths
    rounds: int
    trace_file: Path | None
    details: bool = False
    """Whether everything that the plan states is shown."""
