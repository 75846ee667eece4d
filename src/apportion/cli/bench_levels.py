"""What `bench` measures: rounds of requests at each concurrency, and the medians over the rounds."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from apportion.calibrate.observation import mean_step, step_work
from apportion.cli.bench_choices import Lengths
from apportion.cli.prediction import Speed, predicted_speed
from apportion.cost.group_step import stage_members
from apportion.cost.roofline import Step
from apportion.cost.shard import Shard
from apportion.engine.engine import Engine
from apportion.engine.report import DECODE, USES, WorkerReport
from apportion.engine.timing import Timing
from apportion.probe.watch import Conditions, Watch
from apportion.types.cluster import Device
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measured run of `concurrency` requests at once."""

    concurrency: int
    timing: Timing
    reports: dict[str, WorkerReport]
    coordinator_s: float
    num_steps: int
    coordinator_spans: list[tuple[str, float, float]]
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLevel:
    """`share` of the wall time of all rounds by use (engine/report.py); `weights_bytes_per_s` are
    read while computing decode steps."""

    id: str
    stage: int
    share: dict[str, float]
    weights_bytes_per_s: float
    of_ceiling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One concurrency; speeds are medians over the rounds. `coordinator_s` is per step."""

    concurrency: int
    measured: Speed
    predicted: Speed
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    coordinator_s: float
    devices: list[DeviceLevel]


class Bench:
    """Runs requests of random prompts, no two alike, so that nothing is found in a prefix cache."""

    def __init__(self, engine: Engine, lengths: Lengths, check: Callable[[], None]) -> None:
        self._engine, self._lengths, self._check = engine, lengths, check
        self._next_id = 0

    def warm_up(self) -> None:
        self._run(1, output_tokens=2)
        self._engine.collect()

    def round(self, concurrency: int) -> Round:
        meter = self._engine.meter
        self._engine.collect()
        meter.take_spans()
        busy_s, num_steps = meter.busy_s, meter.num_steps
        watch = Watch()
        timing = self._run(concurrency, self._lengths.output_tokens)
        conditions = watch.conditions()
        return Round(
            concurrency=concurrency,
            timing=timing,
            reports=self._engine.collect(),
            coordinator_s=meter.busy_s - busy_s,
            num_steps=meter.num_steps - num_steps,
            coordinator_spans=meter.take_spans(),
            conditions=conditions,
        )

    def _run(self, concurrency: int, output_tokens: int) -> Timing:
        requests = self._requests(concurrency, output_tokens)
        timing = Timing()
        for event in self._engine.generate(requests):
            timing.record(event)
            self._check()
        return timing

    def _requests(self, num: int, output_tokens: int) -> list[Request]:
        lengths = replace(self._lengths, output_tokens=output_tokens)
        first_id, self._next_id = self._next_id, self._next_id + num
        return random_requests(self._engine.plan, lengths, range(first_id, self._next_id))


def random_requests(plan: Plan, lengths: Lengths, ids: Sequence[int]) -> list[Request]:
    """An id's prompt is always the same."""
    sampling = SamplingParams(max_tokens=lengths.output_tokens, ignore_eos=True)
    draws = {request_id: random.Random(request_id) for request_id in ids}
    return [
        Request(
            id=request_id,
            prompt_ids=tuple(draw.randrange(plan.model.vocab_rows) for _ in range(lengths.prompt_tokens)),
            sampling=sampling,
        )
        for request_id, draw in draws.items()
    ]


def level(plan: Plan, rounds: Sequence[Round], lengths: Lengths, ceiling: dict[str, float]) -> Level:
    """`ceiling` are bytes per second by device id."""
    num = rounds[0].concurrency
    timings = [one.timing for one in rounds]
    return Level(
        concurrency=num,
        measured=Speed(
            ttft_s=median(one.ttft_s for one in timings),
            tpot_s=median(one.tpot_s for one in timings),
            tokens_per_s=median(one.tokens_per_s for one in timings),
        ),
        predicted=predicted_speed(plan, random_requests(plan, lengths, range(num))),
        decode_tokens_per_s=median(one.decode_tokens_per_s for one in timings),
        prefill_tokens_per_s=median(num * lengths.prompt_tokens / one.prefill_s for one in timings),
        coordinator_s=median(one.coordinator_s / one.num_steps for one in rounds),
        devices=list(_device_levels(plan, rounds, ceiling)),
    )


def _device_levels(plan: Plan, rounds: Sequence[Round], ceiling: dict[str, float]) -> Iterator[DeviceLevel]:
    for index, stage in enumerate(plan.stages):
        for device, shard in stage_members(plan.model, plan.cluster, stage):
            reports = [one.reports[device.id] for one in rounds]
            wall_s = sum(report.wall_s for report in reports)
            rate = median(_weights_bytes_per_s(plan, device, shard, report) for report in reports)
            yield DeviceLevel(
                id=device.id,
                stage=index,
                share={use: sum(report.use_s[use] for report in reports) / wall_s for use in USES},
                weights_bytes_per_s=rate,
                of_ceiling=rate / ceiling[device.id],
            )


def _weights_bytes_per_s(plan: Plan, device: Device, shard: Shard, report: WorkerReport) -> float:
    """Bytes of the weights that a decode step needs, over the seconds it computes; 0 without decode steps."""
    done = report.phase(DECODE)
    if not done.num_steps:
        return 0.0
    seen = mean_step(done)
    step = Step(sequences=seen.sequences, new_tokens=1, start_tokens=0, sampled_rows=seen.sampled_rows)
    step_bytes = sum(size for _, size in step_work(plan.model, device, shard, step))
    return step_bytes * done.num_steps / (done.busy_s - done.exchange_s)
