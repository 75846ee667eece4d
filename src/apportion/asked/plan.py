"""From what is asked for to a plan."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.asked.by_hand import read_constraints, sizes_by_device
from apportion.asked.choices import PlanChoices, StreamChoice, cluster_from_options, workload_from_options
from apportion.asked.for_engine import check_engine, plan_for_engine, windows_elsewhere
from apportion.asked.kv_tokens import MOST
from apportion.types.errors import InfeasibleError, UsageError

if TYPE_CHECKING:
    from apportion.catalog.described import Description
    from apportion.types.cluster import Cluster
    from apportion.types.constraints import Constraints
    from apportion.types.model import ModelSpec
    from apportion.types.plan import Plan
    from apportion.types.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a plan is asked for: what was typed, read, probed and calibrated."""

    model: "ModelSpec"
    cluster: "Cluster"
    workload: "Workload"
    weight_formats: tuple[str, ...]
    swap_bytes: int
    constraints: "Constraints"


def plan_from_options(
    source: "Path | Description",
    choices: PlanChoices,
    when_measured: Callable[["ModelSpec"], None] = lambda _: None,
) -> "Plan":
    """`when_measured` is called with the model once this machine need not be quiet any more.

    Raises UsageError for what was typed, InfeasibleError where the devices cannot hold it."""
    return plan_asked(ask(source, choices, when_measured), choices)


def ask(
    source: "Path | Description",
    choices: PlanChoices,
    when_measured: Callable[["ModelSpec"], None] = lambda _: None,
) -> Asked:
    from apportion.asked.weights import AUTO, chosen_formats, with_asked_weights
    from apportion.catalog.model_config import read_model_spec

    check_engine(choices)
    swap_bytes = _swap_bytes(choices.swap_space)
    model = with_asked_weights(read_model_spec(source), choices.weights)
    workload = workload_from_options(model, choices)
    cluster = cluster_from_options(choices)
    for device_id, num_bytes in sizes_by_device(cluster, choices.reserve, "--reserve"):
        cluster = cluster.with_reserve(device_id, num_bytes)
    constraints = read_constraints(
        model,
        cluster,
        stages=choices.stage,
        pins=choices.pin,
        excluded=choices.exclude,
        use_all=choices.use_all,
    )
    when_measured(model)
    # Other engines compute in 16 bits on CPUs, too.
    weights = choices.weights or (AUTO if choices.for_engine else None)
    formats = chosen_formats(model, cluster, weights)
    if not choices.no_calibration:
        from apportion.calibrate.here import calibrate_here

        # What earlier runs measured replaces what is assumed.
        cluster = calibrate_here(cluster, formats, lambda text: _tell(f"apportion: warning: {text}")).cluster
    return Asked(
        model=model,
        cluster=cluster,
        workload=workload,
        weight_formats=formats,
        swap_bytes=swap_bytes,
        constraints=constraints,
    )


def plan_asked(asked: Asked, choices: PlanChoices) -> "Plan":
    """One pipeline."""
    from apportion.catalog.datasheet import common_cards
    from apportion.planner.build import make_plan

    if choices.for_engine is not None:
        plan = plan_for_engine(asked, choices.for_engine, asked.constraints)
    else:
        try:
            plan = make_plan(
                asked.model,
                asked.cluster,
                asked.workload,
                asked.weight_formats,
                asked.constraints,
                streaming=_may_stream(choices),
                cards=common_cards(),
            )
        except InfeasibleError as error:
            raise InfeasibleError(f"{error}{windows_elsewhere(asked)}") from None
    return _with_host_and_free_memory(plan, asked.swap_bytes, choices.kv_tokens)


def _may_stream(choices: PlanChoices) -> bool:
    """A division by hand streams only where that is typed."""
    if choices.stream is None:
        return not choices.stage
    return choices.stream is not StreamChoice.NEVER


def _swap_bytes(given: str | None) -> int:
    """Raises UsageError."""
    from apportion.types.units import parse_bytes

    try:
        return 0 if given is None else parse_bytes(given)
    except ValueError as error:
        raise UsageError(f"--swap-space: {error}") from None


def _with_host_and_free_memory(plan: "Plan", swap_bytes: int, kv_tokens: str | None) -> "Plan":
    from apportion.cost.kv_capacity import with_most_kv

    return with_swap_space(with_most_kv(plan) if kv_tokens == MOST else plan, swap_bytes)


def with_swap_space(plan: "Plan", swap_bytes: int) -> "Plan":
    from apportion.cost import memory

    return memory.with_swap_space(plan, swap_bytes) if swap_bytes else plan


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
