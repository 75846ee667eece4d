"""What a worker tells of itself when it is ready and when it stops."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from apportion.types.request import ScheduledBatch

PREFILL, DECODE = "prefill", "decode"


@dataclass(slots=True)
class PhaseWork:
    """The steps of one phase, added up. Of `busy_s`, from message to message, `exchange_s` are spent with the other
    members of the group, waiting for them included."""

    num_steps: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    start_tokens: int = 0
    """Positions that the sequences held before the step."""
    sampled_rows: int = 0
    busy_s: float = 0.0
    exchange_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """`sent_bytes` counts tensor bytes by receiving device."""

    device_id: str
    parameters: int
    read_bytes: int
    peak_bytes: int
    sent_bytes: dict[str, int]
    work: dict[str, tuple[Any, ...]]
    """By phase, the fields of its PhaseWork in order; steps of both phases at once are in neither."""

    def phase(self, name: str) -> PhaseWork:
        return PhaseWork(*self.work[name])


class WorkMeter:
    """Adds up a worker's steps by phase."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.work = {PREFILL: PhaseWork(), DECODE: PhaseWork()}
        self._exchange_s = 0.0

    @contextmanager
    def exchange(self) -> Iterator[None]:
        begun_s = time.perf_counter()
        yield
        self._exchange_s += time.perf_counter() - begun_s

    def end_step(self, batch: ScheduledBatch, busy_s: float) -> None:
        single = {len(chunk.token_ids) == 1 for chunk in batch.chunks}
        if len(single) == 1:
            work = self.work[DECODE if single.pop() else PREFILL]
            work.num_steps += 1
            work.num_sequences += len(batch.chunks)
            work.num_tokens += batch.num_tokens
            work.start_tokens += sum(chunk.start for chunk in batch.chunks)
            work.sampled_rows += sum(chunk.sampling is not None for chunk in batch.chunks)
            work.busy_s += busy_s
            work.exchange_s += self._exchange_s
        self._exchange_s = 0.0

    def report(self) -> dict[str, tuple[Any, ...]]:
        return {phase: astuple(work) for phase, work in self.work.items()}
