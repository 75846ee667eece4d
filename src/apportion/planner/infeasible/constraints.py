"""Constraints that contradict each other, or without which something would fit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from apportion.cost.memory import stages_memory
from apportion.cost.traffic import host_link
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import ffn_granule, shared_in_ratio, vocabulary_rows
from apportion.planner.stages.groups import common_formats, possible_groups
from apportion.planner.stages.places import fixed_shares
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import UNCONSTRAINED, Constraints, FixedStage, Pin
from apportion.types.errors import InfeasibleError, UsageError
from apportion.types.model import ModelSpec
from apportion.types.names import unknown_name
from apportion.types.plan import Stage, TensorSplit
from apportion.types.units import format_bytes
from apportion.types.workload import Workload


def check_constraints(
    model: ModelSpec, cluster: Cluster, workload: Workload, constraints: Constraints
) -> None:
    """Raises UsageError for names that are not known, and for constraints that no division can keep, whatever the
    devices' memory."""
    if constraints.use_all and workload.objective == "fewest-devices":
        raise UsageError(
            "--use-all takes every device, --objective fewest-devices as few as will do; give one of them"
        )
    known = [device.id for device in cluster.devices]
    for name in (*constraints.excluded, *constraints.used):
        if name not in known:
            raise UsageError(unknown_name("device", name, known))
    for name in constraints.excluded:
        if name in constraints.used:
            raise UsageError(
                f"{name} is excluded and is to take part; leave out --exclude {name}, or the other"
            )
    if len(set(constraints.excluded)) == len(known):
        raise UsageError(f"all {len(known)} devices are excluded; leave one that takes layers")
    for one in constraints.tied:
        _check_layers(model, one)
    for one, other in combinations(constraints.tied, 2):
        _check_pair(one, other)
    for stage in constraints.stages:
        _check_group(model, cluster, constraints, stage)
    _check_rest(model, cluster, constraints)


def _check_layers(model: ModelSpec, one: Pin | FixedStage) -> None:
    last = model.num_layers - 1
    if not 0 <= one.layer_start < one.layer_stop <= model.num_layers:
        raise UsageError(f"{one.typed}: the layers of {model.name} are 0 to {last}")


def _check_pair(one: Pin | FixedStage, other: Pin | FixedStage) -> None:
    """Two that share a layer, or a device."""
    layers = range(max(one.layer_start, other.layer_start), min(one.layer_stop, other.layer_stop))
    devices = [name for name in one.device_ids if name in other.device_ids]
    if isinstance(one, Pin) and isinstance(other, Pin):
        return
    if isinstance(one, FixedStage) and isinstance(other, FixedStage):
        if layers:
            raise UsageError(f"layer {layers[0]} is in both {one.typed} and {other.typed}")
        if devices:
            raise UsageError(f"{devices[0]} is in both {one.typed} and {other.typed}; a device has one stage")
        return
    pin, stage = (one, other) if isinstance(one, Pin) else (other, one)
    inside = stage.layer_start <= pin.layer_start and pin.layer_stop <= stage.layer_stop
    if bool(layers) != bool(devices) or (devices and not inside):
        raise UsageError(f"{pin.typed} does not go with {stage.typed}; leave out one of them")


def _check_group(model: ModelSpec, cluster: Cluster, constraints: Constraints, stage: FixedStage) -> None:
    """Of several devices."""
    size = len(stage.device_ids)
    if len(set(stage.device_ids)) < size:
        raise UsageError(f"{stage.typed}: a device is named twice")
    if size == 1:
        return
    hosts = list(dict.fromkeys(cluster.device(name).host for name in stage.device_ids))
    if len(hosts) > 1:
        raise UsageError(
            f"{stage.typed}: devices that share layers are on one host, these on {' and '.join(hosts)}; give each its"
            " own layers"
        )
    if host_link(cluster, hosts[0], hosts[0]) is None:
        raise UsageError(f"{stage.typed}: there is no link inside {hosts[0]}")
    most = min(model.kv_heads, model.ffn_columns // ffn_granule(model))
    if size > most:
        raise UsageError(f"{stage.typed}: {size} devices share {model.kv_heads} KV heads; {most} can at most")
    uneven = constraints.groups == "even" and (len(set(stage.shares)) > 1 or most % size > 0)
    if constraints.groups == "none" or uneven:
        (rule,) = (what for what, rest in constraints.parts() if rest.groups != constraints.groups)
        raise UsageError(f"{stage.typed} does not go with {rule}")


def _check_rest(model: ModelSpec, cluster: Cluster, constraints: Constraints) -> None:
    """Layers in no stage are for devices in none."""
    held = {layer for one in constraints.stages for layer in range(one.layer_start, one.layer_stop)}
    left = [layer for layer in range(model.num_layers) if layer not in held]
    taken = {*constraints.excluded, *(name for one in constraints.stages for name in one.device_ids)}
    others = [device.id for device in cluster.devices if device.id not in taken]
    if constraints.stages and left and not others:
        stop = next((layer for layer in range(left[0], model.num_layers) if layer in held), model.num_layers)
        raise UsageError(
            f"layers {left[0]}–{stop - 1} are in no --stage, and no device is left for them; the layers of"
            f" {model.name} are 0 to {model.num_layers - 1}"
        )
    if constraints.stages and not left and others and constraints.use_all:
        raise UsageError(f"--use-all: the stages take all layers and leave none to {', '.join(others)}")


def constraints_error(
    problem: Problem, fits: Callable[[Constraints], bool], helping: Callable[[], Sequence[str]]
) -> InfeasibleError | None:
    """Where something would fit without them: what does not, and which of them to drop, each tried; None where they
    are not to blame. `problem` has the smallest chunk; `helping` are other changes."""
    constraints = problem.constraints
    parts = list(constraints.parts())
    if not parts:
        return None
    dropped = [typed for typed, rest in parts if fits(rest)]
    if not dropped and not (len(parts) > 1 and fits(UNCONSTRAINED)):
        return None
    without = " or ".join(f"without {typed}" for typed in dropped) or "with none of them"
    short = "; ".join([*_too_large(problem.narrowest()), ""])
    others = ", or ".join(helping())
    return InfeasibleError(
        f"nothing fits with {', '.join(typed for typed, _ in parts)}: {short}{without} a plan exists"
        f"{f', or with {others}' if others else ''}"
    )


def _too_large(problem: Problem) -> Iterator[str]:
    """Stages by hand that do not fit, with the numbers."""
    for fixed in problem.constraints.stages:
        members = [device for device in problem.cluster.devices if device.id in fixed.device_ids]
        if not common_formats(problem.weight_formats, members):
            yield f"the devices of {fixed.typed} have no weight format in common"
            continue
        if not any(
            {device.id for device in group.devices} == {*fixed.device_ids}
            for group in possible_groups(problem)
        ):
            yield f"the devices of {fixed.typed} have too few cores to compute at once"
            continue
        lacking = _lacking(problem, members, fixed)
        if lacking is not None:
            yield lacking


def _lacking(problem: Problem, members: Sequence[Device], fixed: FixedStage) -> str | None:
    """Of a stage: the member that lacks most, and how many layers would fit."""
    beyond = _beyond(problem, members, fixed.layer_start, fixed.layer_stop)
    device = max(members, key=lambda one: beyond[one.id])
    if beyond[device.id] <= 0:
        return None
    fitting = [
        stop
        for stop in range(fixed.layer_start + 1, fixed.layer_stop)
        if max(_beyond(problem, members, fixed.layer_start, stop).values()) <= 0
    ]
    from_here = (
        f"it has room for {fixed.layer_start}–{fitting[-1] - 1}"
        if fitting
        else "it has room for none of these layers"
    )
    return (
        f"{device.id} needs {format_bytes(device.memory_bytes + beyond[device.id])} in {fixed.typed} and has"
        f" {format_bytes(device.memory_bytes)}, {from_here}"
    )


def _beyond(problem: Problem, members: Sequence[Device], start: int, stop: int) -> dict[str, int]:
    """Bytes by device beyond its memory, in shares that follow the members' memory where they are free."""
    model = problem.model
    granule = ffn_granule(model)
    weights = [max(1, device.usable_bytes >> 20) for device in members]
    heads, granules = fixed_shares(problem, members) or (
        shared_in_ratio(model.kv_heads, weights),
        shared_in_ratio(model.ffn_columns // granule, weights),
    )
    stage = Stage(
        layer_start=start,
        layer_stop=stop,
        split=TensorSplit(
            device_ids=tuple(device.id for device in members),
            q_heads=tuple(count * model.q_heads_per_kv_head for count in heads),
            kv_heads=heads,
            ffn_columns=tuple(count * granule for count in granules),
            vocab_rows=vocabulary_rows(model.vocab_rows, granules),
        ),
        weight_format=problem.formats.weights,
        activation_format=problem.activation_format,
        kv_format=problem.kv_format,
        has_embedding=start == 0,
        has_head=stop == model.num_layers,
    )
    memory = stages_memory(model, problem.cluster, [stage], problem.capacity)
    return {device.id: memory[device.id].total_bytes - device.memory_bytes for device in members}


def without_device(constraints: Constraints, device_id: str) -> Constraints:
    """For a cluster that the device is no longer in. Raises UsageError where it has to take part."""
    if device_id in constraints.used:
        named = next(one for one in (*constraints.pins, *constraints.stages) if device_id in one.device_ids)
        raise UsageError(f"the plan is held to {named.typed}: it cannot do without {device_id}")
    return replace(constraints, excluded=tuple(name for name in constraints.excluded if name != device_id))
