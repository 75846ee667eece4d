"""A plan that `run` and `bench` are given, instead of making one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from apportion.asked.choices import PlanChoices
from apportion.types.errors import PlanError, UsageError

if TYPE_CHECKING:
    from apportion.planner.plan_file import Planned
    from apportion.types.plan import Plan


class GivenPlan(NamedTuple):
    """What was typed."""

    file: Path | None
    replica: int | None


def given_plan(file: Path | None, replica: int | None) -> GivenPlan:
    """Raises UsageError for a replica of no plan."""
    if file is None and replica is not None:
        raise UsageError(
            f"--replica {replica} takes one of --plan's replicas; give a --plan, or leave it out"
        )
    return GivenPlan(file, replica)


def read_given_plan(given: GivenPlan, folder: Path, choices: PlanChoices) -> "Plan":
    """One pipeline. Raises UsageError beside options that make a plan, PlanError for a plan of another model, or of
    several replicas without one being named."""
    from apportion.planner.plan_file import one_pipeline

    return one_pipeline(read_given_replicas(given, folder, choices), None, str(given.file))


def read_given_replicas(given: GivenPlan, folder: Path, choices: PlanChoices) -> "Planned":
    """As it is, or of several replicas the one that is named, or the only one there is."""
    from apportion.catalog.model_config import read_model_spec
    from apportion.planner.plan_file import one_pipeline, read_planned
    from apportion.types.replicated import ReplicatedPlan

    assert given.file is not None
    typed = [name for name, value in asdict(choices).items() if value is not None]
    if typed:
        names = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise UsageError(f"--plan already says how to divide the model; leave out {names}")
    plan, model = read_planned(given.file), read_model_spec(folder)
    if plan.model.fingerprint != model.fingerprint:
        raise PlanError(
            f"{given.file} was made for {plan.model.name} ({plan.model.fingerprint}), not for {model.name}"
            f" ({model.fingerprint}); plan this model anew"
        )
    several = isinstance(plan, ReplicatedPlan) and len(plan.replicas) > 1
    return plan if several and given.replica is None else one_pipeline(plan, given.replica, str(given.file))
