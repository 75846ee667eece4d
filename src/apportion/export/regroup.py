"""Stages by an engine's own rule, where that is not the planner's: all axes at one ratio, or equal shares."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from apportion.export.weights import one_weight_format
from apportion.types.plan import Plan, Stage, TensorSplit


def one_stage(plan: Plan, device_ids: Sequence[str], ratio: Sequence[int]) -> Stage:
    """All layers on every device, each axis cut at the same ratio."""
    return make_stage(plan, device_ids, (0, plan.model.num_layers), ratio)


def make_stage(
    plan: Plan, device_ids: Sequence[str], layers: tuple[int, int], ratio: Sequence[int] = (1,)
) -> Stage:
    """Layers `[start, stop)`, in the plan's formats."""
    model = plan.model
    kv_heads = cut_down(model.kv_heads, ratio)
    return Stage(
        layer_start=layers[0],
        layer_stop=layers[1],
        split=TensorSplit(
            device_ids=tuple(device_ids),
            q_heads=tuple(heads * model.q_heads_per_kv_head for heads in kv_heads),
            kv_heads=kv_heads,
            ffn_columns=cut_down(model.ffn_columns, ratio),
            vocab_rows=cut_down(model.vocab_rows, ratio),
        ),
        weight_format=one_weight_format(plan),
        activation_format=plan.activation_format,
        kv_format=plan.kv_format,
        has_embedding=layers[0] == 0,
        has_head=layers[1] == model.num_layers,
    )


def cut_down(total: int, ratio: Sequence[int]) -> tuple[int, ...]:
    """Shares whose running sums are rounded down; they sum to `total`."""
    stops = [0, *(int(Fraction(total * part, sum(ratio))) for part in accumulate(ratio))]
    return tuple(stop - start for start, stop in pairwise(stops))
