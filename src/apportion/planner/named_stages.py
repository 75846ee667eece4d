"""Placed stages, which know kinds of devices alone, as the stages of a plan."""

from collections.abc import Sequence

from apportion.planner.problem import Problem
from apportion.planner.search.division import PlacedStage
from apportion.planner.stages.groups import device_kinds
from apportion.planner.stages.streamed import with_streamed_layers
from apportion.types.plan import Stage, TensorSplit


def name_devices(problem: Problem, placed: Sequence[PlacedStage]) -> tuple[Stage, ...]:
    """Gives each kind its devices in the cluster's order."""
    unused = [list(kind) for kind in device_kinds(problem.cluster.devices, problem.constraints)]
    stages: list[Stage] = []
    for stage in placed:
        device_ids = [
            unused[kind].pop(0).id for kind, count in enumerate(stage.group.counts) for _ in range(count)
        ]
        stages.append(_stage(problem, stage, device_ids))
    return tuple(stages)


def _stage(problem: Problem, placed: PlacedStage, device_ids: Sequence[str]) -> Stage:
    choice, model = placed.choice, problem.model
    stage = Stage(
        layer_start=placed.layer_start,
        layer_stop=placed.layer_stop,
        split=TensorSplit(
            device_ids=tuple(device_ids),
            q_heads=tuple(heads * model.q_heads_per_kv_head for heads in choice.kv_heads),
            kv_heads=choice.kv_heads,
            ffn_columns=choice.ffn_columns,
            vocab_rows=choice.vocab_rows,
        ),
        weight_format=choice.weight_format,
        activation_format=problem.activation_format,
        kv_format=problem.kv_format,
        has_embedding=placed.layer_start == 0,
        has_head=placed.layer_stop == model.num_layers,
    )
    return with_streamed_layers(problem, stage)
