"""In words: where the division an engine would execute differs from the plan's."""

from collections.abc import Sequence

from apportion.types.plan import Plan, Stage


def differences(plan: Plan, stages: Sequence[Stage], engine: str) -> list[str]:
    """One sentence for each kind of difference."""
    return [
        *_left_out(plan, stages, engine),
        *_regrouped(plan, stages, engine),
        *_reshared(plan, stages, engine),
        *_moved_layers(plan, stages),
    ]


def _left_out(plan: Plan, stages: Sequence[Stage], engine: str) -> list[str]:
    used = {device_id for stage in stages for device_id in stage.split.device_ids}
    missing = [device_id for device_id in plan.device_ids if device_id not in used]
    if not missing:
        return []
    return [f"{engine} runs on GPUs of one make and no CPU; left out: {', '.join(missing)}"]


def _regrouped(plan: Plan, stages: Sequence[Stage], engine: str) -> list[str]:
    planned, executed = _groups(plan.stages), _groups(stages)
    used = {name for group in executed for name in group}
    if [group for group in (tuple(n for n in g if n in used) for g in planned) if group] == executed:
        return []
    sizes = {len(group) for group in planned}
    cannot = "give stages different tensor-parallel sizes" if len(sizes) > 1 else "share layers as planned"
    return [f"{engine} cannot {cannot}: stages of {_sizes(planned)} become {_sizes(executed)}"]


def _reshared(plan: Plan, stages: Sequence[Stage], engine: str) -> list[str]:
    executed = {stage.split.device_ids: stage.split for stage in stages}
    notes: list[str] = []
    for number, stage in enumerate(plan.stages):
        split, other = stage.split, executed.get(stage.split.device_ids)
        if other is None or (split.kv_heads, split.ffn_columns) == (other.kv_heads, other.ffn_columns):
            continue
        notes.append(
            f"{engine} cannot share stage {number} as planned: KV heads {_ratio(split.kv_heads)} become "
            f"{_ratio(other.kv_heads)}, FFN columns {_ratio(split.ffn_columns)} become "
            f"{_ratio(other.ffn_columns)}"
        )
    return notes


def _moved_layers(plan: Plan, stages: Sequence[Stage]) -> list[str]:
    def ranges(some: Sequence[Stage]) -> list[tuple[int, int]]:
        return [(stage.layer_start, stage.layer_stop) for stage in some]

    if ranges(plan.stages) == ranges(stages):
        return []
    placed = ", ".join(
        f"{stage.layer_start}–{stage.layer_stop - 1} on {'+'.join(stage.split.device_ids)}"
        for stage in stages
    )
    return [f"layers move: {placed}"]


def _groups(stages: Sequence[Stage]) -> list[tuple[str, ...]]:
    return [stage.split.device_ids for stage in stages]


def _sizes(groups: Sequence[tuple[str, ...]]) -> str:
    if all(len(group) == 1 for group in groups):
        return "single devices"
    *sizes, last = (str(len(group)) for group in groups)
    return (f"{', '.join(sizes)} and {last}" if sizes else last) + " devices"


def _ratio(shares: Sequence[int]) -> str:
    return ":".join(str(share) for share in shares)
