"""`--for ENGINE`: a plan within what another engine can do, from the start."""

from typing import TYPE_CHECKING

from apportion.asked.choices import PlanChoices, StreamChoice
from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.asked.plan import Asked
    from apportion.types.constraints import Constraints
    from apportion.types.plan import Plan


def engine_named(name: str, option: str) -> str:
    """Raises UsageError for one that is not known."""
    from apportion.export.engines import ENGINES, MEANT
    from apportion.types.names import unknown_name

    if name not in ENGINES:
        raise UsageError(f"{option}: {unknown_name('engine', name, ENGINES, meant=MEANT)}")
    return name


def check_engine(choices: PlanChoices) -> None:
    """Raises UsageError for an engine that is not known, or is not planned for, or does not do what else is asked."""
    from apportion.export.engines import PLANNED_FOR

    if choices.for_engine is None:
        return
    engine = engine_named(choices.for_engine, "--for")
    if engine not in PLANNED_FOR:
        raise UsageError(
            f"--for {engine}: it divides evenly or not at all, so there is nothing to plan; "
            f"make a plan without --for, and give it to apportion export --to {engine}"
        )
    for name, given in (("--replicas", choices.replicas), ("--swap-space", choices.swap_space)):
        if given is not None:
            raise UsageError(f"{name} is not for other engines; leave out {name}, or --for {engine}")
    if choices.stream is StreamChoice.AUTO:
        raise UsageError(
            f"--stream auto is not for other engines, which do not stream as this one; leave it out, or --for {engine}"
        )


def plan_for_engine(asked: "Asked", engine: str, constraints: "Constraints") -> "Plan":
    """Raises PlanError where the engine has no use for the devices, InfeasibleError where they cannot hold the
    model."""
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.within import plan_within

    return plan_within(
        engine,
        asked.model,
        asked.cluster,
        asked.workload,
        asked.weight_formats,
        constraints,
        EnginePlanner(),
    )
