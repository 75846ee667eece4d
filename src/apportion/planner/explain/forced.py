"""A good division that uses a given device, for a plan that does not.

The search cannot be told to use a device. So candidates are collected: divisions found without another device, and
the one found as though this device were as little faster as it takes; at the true rates layers are then moved between
neighbouring stages, and neighbours swapped, while that helps. The best is real and runs as fast as stated. A better
one may exist, but with the plan's prefill chunk none that beats the plan by more than the gap of its certificate.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from apportion.planner.problem import Problem, make_problem
from apportion.planner.stages.streamed import with_streamed_layers
from apportion.planner.weigh import Division, best_division, weigh
from apportion.types.cluster import Cluster, Device
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Plan, Stage

LURES = (1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""How much faster a device is made out to be until the planner uses it."""


def forced_division(plan: Plan, device: Device, found: Sequence[Division]) -> Division | None:
    """The best of `found` and of this module's own that uses the device; None where there is none."""
    candidates = [*found, *_lured(plan, device)]
    weighed = [
        better
        for division in candidates
        if device.id in division.device_ids
        for better in _at_true_rates(plan, division)
    ]
    return min(weighed, key=lambda division: division.value, default=None)


def replan(plan: Plan, cluster: Cluster) -> Division | None:
    return best_division(plan.model, cluster, plan.workload, plan.weight_formats, plan.constraints)


def faster(device: Device, factor: float) -> Device:
    return replace(
        device,
        mem_bytes_per_s=device.mem_bytes_per_s * factor,
        flops_per_s={name: rate * factor for name, rate in device.flops_per_s.items()},
        layer_overhead_s=device.layer_overhead_s / factor,
        step_overhead_s=device.step_overhead_s / factor,
    )


def with_device(cluster: Cluster, changed: Device) -> Cluster:
    devices = (changed if device.id == changed.id else device for device in cluster.devices)
    return replace(cluster, devices=tuple(devices))


def _lured(plan: Plan, device: Device) -> Iterator[Division]:
    """What is found at the least lure that works, and what its devices come to by themselves."""
    for factor in LURES:
        lured = replan(plan, with_device(plan.cluster, faster(device, factor)))
        if lured and device.id in lured.device_ids:
            yield lured
            kept = tuple(one for one in plan.cluster.devices if one.id in lured.device_ids)
            alone = replan(plan, replace(plan.cluster, devices=kept))
            if alone:
                yield alone
            return


def _at_true_rates(plan: Plan, division: Division) -> Iterator[Division]:
    """The division on the plan's own cluster, its layers moved; nothing where more devices leave it too little room."""
    problem = replace(
        make_problem(
            plan.model,
            plan.cluster,
            plan.workload,
            plan.weight_formats,
            division.chunk_tokens,
            plan.constraints,
        ),
        streaming=any(stage.streamed_layers for stage in division.stages),
    )
    with suppress(InfeasibleError):
        # On other devices activations may have had another format.
        formats = {"activation_format": plan.activation_format, "kv_format": plan.kv_format}
        stages = (replace(stage, **formats) for stage in division.stages)
        yield _settled(problem, weigh(problem, tuple(stages)))


def _settled(problem: Problem, division: Division) -> Division:
    """Moves a layer between neighbouring stages, or swaps them, for as long as the objective falls."""
    while True:
        better = min(_neighbours(problem, division), key=lambda one: one.value, default=division)
        if better.value >= division.value:
            return division
        division = better


def _neighbours(problem: Problem, division: Division) -> Iterator[Division]:
    for stages in _rearranged(problem, division.stages):
        with suppress(InfeasibleError):
            yield weigh(problem, stages)


def _rearranged(problem: Problem, stages: tuple[Stage, ...]) -> Iterator[tuple[Stage, ...]]:
    for number in range(len(stages) - 1):
        before, after = stages[number : number + 2]
        for cut in (before.layer_stop - 1, before.layer_stop + 1):
            if before.layer_start < cut < after.layer_stop:
                yield _with_pair(problem, stages, number, before, cut, after)
        yield _with_pair(problem, stages, number, after, before.layer_start + after.num_layers, before)


def _with_pair(
    problem: Problem, stages: tuple[Stage, ...], number: int, first: Stage, cut: int, second: Stage
) -> tuple[Stage, ...]:
    """Stages `number` and the next are those of `first` up to layer `cut`, and of `second` from there."""
    start, stop = stages[number].layer_start, stages[number + 1].layer_stop
    pair = (
        replace(first, layer_start=start, layer_stop=cut, has_embedding=start == 0, has_head=False),
        replace(
            second,
            layer_start=cut,
            layer_stop=stop,
            has_embedding=False,
            has_head=stop == problem.model.num_layers,
        ),
    )
    streamed = (with_streamed_layers(problem, stage) for stage in pair)
    return (*stages[:number], *streamed, *stages[number + 2 :])
