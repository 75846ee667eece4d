"""What a worker tells of itself: the work it did, and where its wall time went.

Every instant since `WorkMeter.clear()` belongs to exactly one use, so the uses add up to the wall time:

- compute: from a step's message to its end, an emulated device's sleep included, less the next two;
- exchange: with the other members of the group, waiting for them included;
- swap: moving blocks between the KV pool and the swap space;
- link: no step here, while the message that brings the next one is on its way;
- bubble: no step here, and none on its way.
"""

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Literal

from apportion.types.request import ScheduledBatch

PREFILL, DECODE = "prefill", "decode"

Use = Literal["compute", "exchange", "swap", "link", "bubble"]
USES: tuple[Use, ...] = ("compute", "exchange", "swap", "link", "bubble")


@dataclass(slots=True)
class PhaseWork:
    """The steps of one phase, added up; of decode those of the most sequences alone, as batches grow while prompts come
    and shrink at the end. Of `busy_s`, from message to message, `exchange_s` are spent with the other
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
    """`sent_bytes` counts tensor bytes by receiving device since the start; `work`, `use_s`, `wall_s` and `spans` are
    of the time since the last report."""

    device_id: str
    parameters: int
    read_bytes: int
    """Of the checkpoint, once."""
    streamed_bytes: int
    """Of streamed layers' weights, in every step, since the start."""
    held_bytes: int
    """Weights, buffers of streamed layers and KV cache, as they were allocated."""
    peak_bytes: int
    sent_bytes: dict[str, int]
    work: dict[str, tuple[Any, ...]]
    """By phase, the fields of its PhaseWork in order; steps of both phases at once are in neither, nor are those with
    drafts."""
    use_s: dict[Use, float]
    wall_s: float
    spans: bytes
    """Of `Spans`; empty unless the run is traced."""

    def phase(self, name: str) -> PhaseWork:
        return PhaseWork(*self.work[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Clock readings of `time.perf_counter`, which the processes of one host share (CLOCK_MONOTONIC)."""

    use: Use
    begun_s: float
    ended_s: float
    step_id: int
    """-1 outside steps."""
    num_tokens: int


class Spans:
    """Spans packed as five numbers each: a long run has a hundred for every token."""

    FIELDS = 5

    def __init__(self) -> None:
        self._values = array("d")

    def add(self, use: Use, begun_s: float, ended_s: float, step_id: int = -1, num_tokens: int = 0) -> None:
        self._values.extend((USES.index(use), begun_s, ended_s, step_id, num_tokens))

    def pack(self) -> bytes:
        return self._values.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> list[Span]:
        values = array("d", data)
        return [
            Span(
                use=USES[int(values[at])],
                begun_s=values[at + 1],
                ended_s=values[at + 2],
                step_id=int(values[at + 3]),
                num_tokens=int(values[at + 4]),
            )
            for at in range(0, len(values), cls.FIELDS)
        ]


class WorkMeter:
    """Adds up a worker's steps by phase and its time by use."""

    def __init__(self, *, trace: bool = False) -> None:
        self._trace = trace
        self.clear()

    def clear(self) -> None:
        self.work = {PREFILL: PhaseWork(), DECODE: PhaseWork()}
        self.use_s: dict[Use, float] = dict.fromkeys(USES, 0.0)
        self._spans = Spans() if self._trace else None
        self._within_s: dict[Use, float] = {"exchange": 0.0, "swap": 0.0}
        self._begun_s = self._mark_s = time.perf_counter()

    def begin_step(self, sent_s: float | None) -> None:
        """A step's message is here, sent at `sent_s` where that is known on this clock."""
        now_s = time.perf_counter()
        under_way_s = now_s if sent_s is None else min(max(sent_s, self._mark_s), now_s)
        self._spend("bubble", self._mark_s, under_way_s)
        self._spend("link", under_way_s, now_s)
        self._within_s = {"exchange": 0.0, "swap": 0.0}
        self._mark_s = now_s

    def spent(self, use: Literal["exchange", "swap"], begun_s: float, ended_s: float) -> None:
        """Of the running step."""
        self._within_s[use] += ended_s - begun_s
        if self._spans is not None:
            self._spans.add(use, begun_s, ended_s)

    def end_step(self, batch: ScheduledBatch) -> None:
        now_s = time.perf_counter()
        busy_s = now_s - self._mark_s
        for use, seconds in self._within_s.items():
            self.use_s[use] += seconds
        self.use_s["compute"] += busy_s - sum(self._within_s.values())
        if self._spans is not None:
            self._spans.add("compute", self._mark_s, now_s, batch.step_id, batch.num_tokens)
        self._mark_s = now_s
        self._count(batch, busy_s)

    def report(self) -> dict[str, Any]:
        """The fields of a WorkerReport that this meter knows, up to now."""
        now_s = time.perf_counter()
        self._spend("bubble", self._mark_s, now_s)
        self._mark_s = now_s
        return {
            "work": {phase: astuple(work) for phase, work in self.work.items()},
            "use_s": self.use_s,
            "wall_s": now_s - self._begun_s,
            "spans": self._spans.pack() if self._spans is not None else b"",
        }

    def _spend(self, use: Use, begun_s: float, ended_s: float) -> None:
        self.use_s[use] += ended_s - begun_s
        if self._spans is not None and ended_s > begun_s:
            self._spans.add(use, begun_s, ended_s)

    def _count(self, batch: ScheduledBatch, busy_s: float) -> None:
        single = {len(chunk.token_ids) == 1 for chunk in batch.chunks}
        if len(single) != 1 or any(chunk.num_drafts for chunk in batch.chunks):
            return
        phase = DECODE if single.pop() else PREFILL
        if phase == DECODE and not self._as_full(batch):
            return
        work = self.work[phase]
        work.num_steps += 1
        work.num_sequences += len(batch.chunks)
        work.num_tokens += batch.num_tokens
        work.start_tokens += sum(chunk.start for chunk in batch.chunks)
        work.sampled_rows += sum(chunk.num_draws for chunk in batch.chunks)
        work.busy_s += busy_s
        work.exchange_s += self._within_s["exchange"]

    def _as_full(self, batch: ScheduledBatch) -> bool:
        """Whether no decode step had more sequences; fuller than all is the first of its kind."""
        seen = self.work[DECODE]
        fullest = seen.num_sequences // seen.num_steps if seen.num_steps else 0
        if len(batch.chunks) > fullest:
            self.work[DECODE] = PhaseWork()
        return len(batch.chunks) >= fullest


class CoordinatorMeter:
    """What the coordinator spends on the steps, waiting for the workers left out."""

    def __init__(self, *, trace: bool) -> None:
        self.num_steps = 0
        self.busy_s = 0.0
        self._trace = trace
        self._spans: list[tuple[str, float, float]] = []

    @contextmanager
    def spend(self, name: str) -> Iterator[None]:
        begun_s = time.perf_counter()
        yield
        ended_s = time.perf_counter()
        self.busy_s += ended_s - begun_s
        if self._trace:
            self._spans.append((name, begun_s, ended_s))

    def take_spans(self) -> list[tuple[str, float, float]]:
        """(name, begun, ended) of each time since they were last taken; [] unless the run is traced."""
        taken, self._spans = self._spans, []
        return taken
