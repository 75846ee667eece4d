"""Divisions that another engine can execute, as near to a plan's as its rules allow."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from apportion.export.accelerators import VISIBLE
from apportion.export.weights import one_weight_format
from apportion.types.cluster import Device
from apportion.types.errors import PlanError
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage, TensorSplit

Group = tuple[Device, ...]
Cut = Callable[[int, Sequence[Fraction]], tuple[int, ...]]
"""Integer shares of a total in the ratio of weights."""


def gpu_members(plan: Plan) -> tuple[Group, ...]:
    """Each stage's GPUs of the one make (CUDA or ROCm) that is first in the plan; a stage may have none."""
    everyone = all_members(plan)
    kinds = [device.kind for group in everyone for device in group if device.kind in VISIBLE]
    return tuple(tuple(device for device in group if device.kind in kinds[:1]) for group in everyone)


def all_members(plan: Plan) -> tuple[Group, ...]:
    return tuple(stage_devices(plan, stage) for stage in plan.stages)


def stage_devices(plan: Plan, stage: Stage) -> Group:
    return tuple(plan.cluster.device(device_id) for device_id in stage.split.device_ids)


def regroup(plan: Plan, members: Sequence[Group], size: int) -> tuple[Stage, ...]:
    """Groups of exactly `size`, cut from `members` in rank order, with equal shares inside.

    A new group has the layers that its members' shares amounted to; those of members left out go to the others
    in proportion. Raises PlanError where there are more groups than layers.
    """
    groups: list[Group] = []
    weights: list[Fraction] = []
    for stage, kept in zip(plan.stages, members, strict=True):
        columns = dict(zip(stage.split.device_ids, stage.split.ffn_columns, strict=True))
        for start in range(0, len(kept), size):
            group = kept[start : start + size]
            share = Fraction(sum(columns[device.id] for device in group), plan.model.ffn_columns)
            groups.append(group)
            weights.append(stage.num_layers * share)
    layers = apportion_units(plan.model.num_layers, weights)
    stops = [0, *accumulate(layers)]
    return tuple(
        make_stage(plan, group, start, stop)
        for group, (start, stop) in zip(groups, pairwise(stops), strict=True)
    )


def one_stage(plan: Plan, weights: Sequence[Fraction], cut: Cut) -> tuple[Stage, ...]:
    """All layers on every device of a plan of one stage, each axis cut at the same ratio."""
    devices, model = stage_devices(plan, plan.stages[0]), plan.model
    axes = (cut(total, weights) for total in (model.kv_heads, model.ffn_columns, model.vocab_rows))
    return (_stage(plan, devices, (0, model.num_layers), *axes),)


def make_stage(plan: Plan, devices: Group, start: int, stop: int) -> Stage:
    """Layers `[start, stop)` in equal shares."""
    model, equal = plan.model, [Fraction(1)] * len(devices)
    axes = (cut_down(total, equal) for total in (model.kv_heads, model.ffn_columns, model.vocab_rows))
    return _stage(plan, devices, (start, stop), *axes)


def _stage(
    plan: Plan,
    devices: Group,
    layers: tuple[int, int],
    kv_heads: tuple[int, ...],
    ffn_columns: tuple[int, ...],
    vocab_rows: tuple[int, ...],
) -> Stage:
    return Stage(
        layer_start=layers[0],
        layer_stop=layers[1],
        split=TensorSplit(
            device_ids=tuple(device.id for device in devices),
            q_heads=tuple(heads * plan.model.q_heads_per_kv_head for heads in kv_heads),
            kv_heads=kv_heads,
            ffn_columns=ffn_columns,
            vocab_rows=vocab_rows,
        ),
        weight_format=one_weight_format(plan),
        activation_format=plan.activation_format,
        kv_format=plan.kv_format,
        has_embedding=layers[0] == 0,
        has_head=layers[1] == plan.model.num_layers,
        streamed_layers=_streamed(plan, layers) if len(devices) == 1 else (),
    )


def _streamed(plan: Plan, layers: tuple[int, int]) -> tuple[int, ...]:
    """Those of these layers that the plan streams."""
    every = (layer for stage in plan.stages for layer in stage.streamed_layers)
    return tuple(layer for layer in every if layers[0] <= layer < layers[1])


def cut_down(total: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Shares whose running sums are rounded down; they sum to `total`."""
    stops = [0, *(int(total * part / sum(weights)) for part in accumulate(weights))]
    return tuple(stop - start for start, stop in pairwise(stops))


def apportion_units(total: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Integer shares of `total` nearest to `weights` (largest remainders), each at least 1.

    Raises PlanError where there are fewer units than shares.
    """
    if total < len(weights):
        raise PlanError(f"{total} layers (or heads) are too few for {len(weights)} groups of devices")
    exact = [weight * total / sum(weights) for weight in weights]
    shares = [max(1, int(part)) for part in exact]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        open_shares = [i for i, share in enumerate(shares) if step > 0 or share > 1]
        shares[max(open_shares, key=lambda i: step * (exact[i] - shares[i]))] += step
    return tuple(shares)


def can_share_equally(model: ModelSpec, size: int) -> bool:
    return model.kv_heads % size == 0 and model.ffn_columns % size == 0
