"""What an export consists of: the commands (or the device map) of another engine, and what they leave unsaid."""

import shlex
from dataclasses import dataclass, field

from apportion.types.plan import Stage

MODEL = "$MODEL"
"""Stands for the checkpoint in every command: a plan knows the model's name, not where its files are."""
MOST_WAITED_S = 30
"""For a server in the background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One command on one host, with the environment it needs."""

    host: str
    command: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict[str, str])
    ready: tuple[str, ...] = ()
    """A command that succeeds once this one serves, where others are to follow it in the same shell."""

    def shell(self) -> str:
        """Lines for a POSIX shell; `$MODEL` stays a variable."""
        assigned = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        words = ['"$MODEL"' if word == MODEL else shlex.quote(word) for word in self.command]
        line = " ".join([*assigned, *words])
        if not self.ready:
            return line
        asked = f"{shlex.join(self.ready)} > /dev/null 2>&1"
        return (
            f"{line} > {self.command[0]}.log 2>&1 &\n"
            f"for _ in $(seq {MOST_WAITED_S}); do {asked} && break; sleep 1; done"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDivision:
    """What the engine would execute, as stages of ours."""

    stages: tuple[Stage, ...]
    microbatches: int
    """Batches on their way at once; 1 where stages wait for each other."""
    pipelined_prefill: bool
    """Whether a stage starts on the next chunk or prompt while later stages still work on this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    launches: tuple[Launch, ...]
    device_map: dict[str, int | str] | None
    division: EngineDivision | None
    """None where the plan's figures do not say how fast that would be; a note says why."""
    notes: tuple[str, ...]
    """What the engine cannot express, one sentence each; the predicted cost comes last."""
    needed_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """By device, with its reserve and the engine's buffers."""
    files: dict[str, str] = field(default_factory=dict[str, str])
    """By name, that the commands read."""
