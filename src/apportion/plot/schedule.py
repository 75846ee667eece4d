"""When each stage and link is busy during one prompt and during one decode step, by the cost model's times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.cost.estimate import Steps, microbatch_steps, plan_timings
from apportion.types.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Row `row` works on chunk or microbatch `item` during `[start_s, stop_s)`."""

    row: int
    item: int
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Rows in the order in which a batch passes: the entry, stages with links between them, the exit."""

    rows: tuple[str, ...]
    is_link: tuple[bool, ...]
    prefill: tuple[Interval, ...]
    decode: tuple[Interval, ...]


def schedule(plan: Plan) -> Schedule:
    """A prompt's chunks follow one another; a decode step is one token of every microbatch."""
    steps = microbatch_steps(plan.workload, plan.chunk_tokens, plan.microbatches)
    chunks = [
        [timing[0] for timing in _times(plan, replace(steps, prefill=(step,)))] for step in steps.prefill
    ]
    token = [timing[1] for timing in _times(plan, steps)]
    names, links = _rows(plan)
    return Schedule(
        rows=tuple(names),
        is_link=tuple(links),
        prefill=flow(chunks),
        decode=flow([token] * plan.microbatches),
    )


def flow(seconds: Sequence[Sequence[float]]) -> tuple[Interval, ...]:
    """`seconds[item][row]`: an item enters a row once it has left the row before, and the item before has left."""
    intervals: list[Interval] = []
    free_s = [0.0] * len(seconds[0])
    for item, times in enumerate(seconds):
        ready_s = 0.0
        for row, duration_s in enumerate(times):
            start_s = max(ready_s, free_s[row])
            ready_s = free_s[row] = start_s + duration_s
            intervals.append(Interval(row=row, item=item, start_s=start_s, stop_s=ready_s))
    return tuple(intervals)


def _times(plan: Plan, steps: Steps) -> list[tuple[float, float]]:
    """(prefill, decode) seconds of each row."""
    timings = plan_timings(plan.model, plan.cluster, plan.stages, steps)
    between = [timings.entry]
    for stage, hop in zip(timings.stages, (*timings.hops, timings.exit), strict=True):
        between += [stage, hop]
    return [(timing.prefill_s, timing.decode_s) for timing in between]


def _rows(plan: Plan) -> tuple[list[str], list[bool]]:
    names, links, last = ["in → stage 0"], [True], len(plan.stages) - 1
    for number, stage in enumerate(plan.stages):
        hop = f"stage {number} → {number + 1}" if number < last else f"stage {number} → out"
        names += [f"stage {number}: {' + '.join(stage.split.device_ids)}", hop]
        links += [False, True]
    return names, links
