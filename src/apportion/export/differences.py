"""In words: where the division an engine executes differs from the plan's."""

from collections.abc import Sequence

from apportion.types.plan import Plan, Stage


def differences(plan: Plan, stages: Sequence[Stage], engine: str) -> list[str]:
    """One sentence, or none where they are the same."""
    if _divided(plan.stages) == _divided(stages):
        return []
    used = {device_id for stage in stages for device_id in stage.split.device_ids}
    missing = [device_id for device_id in plan.device_ids if device_id not in used]
    left_out = f"; without {', '.join(missing)}" if missing else ""
    placed = ", ".join(
        f"layers {stage.layer_start}–{stage.layer_stop - 1} on {'+'.join(stage.split.device_ids)}"
        for stage in stages
    )
    return [f"planned again within what {engine} can do and with its buffers left free: {placed}{left_out}"]


def _divided(stages: Sequence[Stage]) -> list[tuple[object, ...]]:
    return [
        (
            stage.layer_start,
            stage.layer_stop,
            stage.split.device_ids,
            stage.split.kv_heads,
            stage.split.ffn_columns,
        )
        for stage in stages
    ]
