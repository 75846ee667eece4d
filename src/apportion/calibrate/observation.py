"""What a run tells of each device and of the links inside groups: counts of work beside measured seconds.

Counts, not ratios, are kept: a later fit then needs to know nothing of the constants that were assumed in that run.
All figures are per step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, Protocol

from apportion.cost.group_step import Members, group_exchange_s, members_at_work, stage_members
from apportion.cost.host_memory import ALONE, Beside, beside
from apportion.cost.roofline import Step, attention_s, ffn_column_s, head_row_s, phase_s
from apportion.cost.shard import Shard
from apportion.cost.traffic import group_link, layer_reductions
from apportion.probe.watch import QUIET, Conditions
from apportion.types.cluster import Device
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage

Phase = Literal["prefill", "decode", "link"]
PHASES: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")


class PhaseWork(Protocol):
    """A worker's steps of one phase, added up (engine/report.py)."""

    num_steps: int
    num_sequences: int
    num_tokens: int
    start_tokens: int
    sampled_rows: int
    busy_s: float
    exchange_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A mean step of one device in one run, as it would be at full speed; under "link", one reduction of a group.

    `work` are (flops, bytes) of attention, FFN and head, each of which takes the longer of the two; of a link, bytes
    alone. `predicted_s` is what the run's plan said.
    """

    run: str
    hardware: str
    weight_format: str
    phase: Phase
    num_layers: int
    work: tuple[tuple[float, float], ...]
    measured_s: float
    beside: Beside
    """What others read meanwhile of the memory that it shares."""
    waiting_s: float | None
    """Beside `measured_s`: waking up and the coordinator, per message, where the run shows it."""
    predicted_s: float
    others_share: float = 0.0
    """Of the machine's cores, that other processes kept busy meanwhile (probe/watch.py)."""
    clock_hz: float | None = None
    """The processor's after the run; None where it is not known."""


Work = Mapping[str, Mapping[str, PhaseWork]]
"""By device id, then by phase."""


def observe(
    plan: Plan,
    work: Work,
    hardware: Mapping[str, str],
    *,
    run: str,
    alone_tpot_s: float | None,
    conditions: Conditions = QUIET,
) -> tuple[Observation, ...]:
    """`hardware` names those devices that are really what they are called; others are left out.

    `alone_tpot_s` is the time per token of a run with one sequence, where nothing overlaps and so all that is not
    busy time is waiting; None for other runs.
    """
    waiting_s = _waiting_s(plan, work, alone_tpot_s)
    overlapping = plan.microbatches > 1 and alone_tpot_s is None
    seen: list[Observation] = []
    for stage in plan.stages:
        if stage.streamed_layers:
            continue  # its steps also copy, which tells nothing of the rates that are fitted
        members = stage_members(plan.model, plan.cluster, stage)
        devices = [device for device, _ in members]
        for device, shard in members_at_work(plan.cluster, members, overlapping=overlapping):
            if device.id not in hardware:
                continue
            own = plan.cluster.device(device.id)
            share = beside(plan.cluster, own, devices, overlapping=overlapping)
            for phase in PHASES:
                done = work[device.id][phase]
                if done.num_steps:
                    one = _device_observation(
                        plan.model, device, shard, done, phase, run, hardware[device.id]
                    )
                    waited_s = waiting_s if phase == "decode" else None
                    seen.append(replace(one, beside=share, waiting_s=waited_s))
        seen += _link_observation(plan, stage, members, work, hardware, run)
    return tuple(
        replace(one, others_share=conditions.others_share, clock_hz=conditions.clock_hz) for one in seen
    )


def _waiting_s(plan: Plan, work: Work, alone_tpot_s: float | None) -> float | None:
    if alone_tpot_s is None:
        return None
    stages = [[work[device_id]["decode"] for device_id in stage.split.device_ids] for stage in plan.stages]
    if any(not done.num_steps for stage in stages for done in stage):
        return None
    busy_s = sum(max(done.busy_s / done.num_steps for done in stage) for stage in stages)
    return max(0.0, alone_tpot_s - busy_s) / (len(stages) + 1)


def _device_observation(
    model: ModelSpec,
    device: Device,
    shard: Shard,
    done: PhaseWork,
    phase: Literal["prefill", "decode"],
    run: str,
    hardware: str,
) -> Observation:
    work = step_work(model, device, shard, mean_step(done))
    predicted_s = sum(phase_s(device, shard.formats.weights, flops, size) for flops, size in work)
    predicted_s += shard.num_layers * device.layer_overhead_s + device.step_overhead_s
    return Observation(
        run=run,
        hardware=hardware,
        weight_format=shard.formats.weights,
        phase=phase,
        num_layers=shard.num_layers,
        work=work,
        measured_s=(done.busy_s - done.exchange_s) / done.num_steps * device.speed,
        beside=ALONE,
        waiting_s=None,
        predicted_s=predicted_s * device.speed,
    )


def mean_step(done: PhaseWork) -> Step:
    """As many tokens as a step has on average; sequences, and so what each of them has, are rounded."""
    sequences = max(1, round(done.num_sequences / done.num_steps))
    return Step(
        sequences=sequences,
        new_tokens=max(1, round(done.num_tokens / done.num_steps / sequences)),
        start_tokens=round(done.start_tokens / done.num_sequences),
        sampled_rows=round(done.sampled_rows / done.num_steps),
    )


def step_work(model: ModelSpec, device: Device, shard: Shard, step: Step) -> tuple[tuple[float, float], ...]:
    """(flops, bytes) of attention, FFN and head. A device that does one flop a second, and reads without limit, takes
    as many seconds as there are flops; so the cost model itself counts."""
    name = shard.formats.weights
    counting_flops = replace(device, mem_bytes_per_s=inf, flops_per_s={name: 1.0})
    counting_bytes = replace(device, mem_bytes_per_s=1.0, flops_per_s={name: inf})
    flops = _parts(model, counting_flops, shard, step)
    return tuple(zip(flops, _parts(model, counting_bytes, shard, step), strict=True))


def _parts(model: ModelSpec, device: Device, shard: Shard, step: Step) -> tuple[float, float, float]:
    formats = shard.formats
    attention = sum(
        count * attention_s(device, model, layer, shard.kv_heads, step, formats)
        for layer, count in shard.layers
    )
    ffn = sum(
        count * shard.ffn_columns * ffn_column_s(device, layer, step.tokens, formats)
        for layer, count in shard.layers
    )
    rows = shard.vocab_rows if shard.has_head else 0
    return attention, ffn, rows * head_row_s(device, model, step.sampled_rows, formats)


def _link_observation(
    plan: Plan, stage: Stage, members: Members, work: Work, hardware: Mapping[str, str], run: str
) -> Sequence[Observation]:
    """One reduction of a group's decode: what its step takes beyond the computing of its slowest member."""
    ids = stage.split.device_ids
    done = [work[device_id]["decode"] for device_id in ids]
    link = group_link(plan.cluster, ids)
    known = all(device_id in hardware for device_id in ids)
    if len(ids) == 1 or link is None or not known or not all(one.num_steps for one in done):
        return ()
    shards = [shard for _, shard in members]
    step = mean_step(done[0])
    messages = layer_reductions(plan.model, shards[0].formats.activation_bytes)
    sizes = list(messages) * shards[0].num_layers + [messages[0]] * stage.has_embedding + [0] * stage.has_head
    busy_s = max(one.busy_s / one.num_steps for one in done)
    computing_s = max((one.busy_s - one.exchange_s) / one.num_steps for one in done)
    carried = (len(ids) - 1) * step.tokens * sum(sizes) / len(sizes)
    return [
        Observation(
            run=run,
            hardware=link_hardware(hardware[ids[0]]),
            weight_format=stage.weight_format,
            phase="link",
            num_layers=shards[0].num_layers,
            work=((0.0, carried),),
            measured_s=(busy_s - computing_s) / len(sizes),
            beside=ALONE,
            waiting_s=None,
            predicted_s=group_exchange_s(plan.model, shards, link, step) / len(sizes),
        )
    ]


def link_hardware(hardware: str) -> str:
    """The link inside the host that has this device: named after its processor or card alone."""
    return f"link inside the host of {hardware.split(',')[0]}"
