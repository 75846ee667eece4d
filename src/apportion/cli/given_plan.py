"""A plan that `run` and `bench` are given, instead of making one."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from apportion.cli.options import PlanChoices
from apportion.types.errors import PlanError, UsageError

if TYPE_CHECKING:
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
    """Raises UsageError beside options that make a plan, PlanError for a plan of another model."""
    from apportion.catalog.model_config import read_model_spec
    from apportion.planner.plan_file import read_plan

    assert given.file is not None
    typed = [name for name, value in asdict(choices).items() if value is not None]
    if typed:
        names = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise UsageError(f"--plan already says how to divide the model; leave out {names}")
    plan, model = read_plan(given.file, given.replica), read_model_spec(folder)
    if plan.model.fingerprint != model.fingerprint:
        raise PlanError(
            f"{given.file} was made for {plan.model.name} ({plan.model.fingerprint}), not for {model.name}"
            f" ({model.fingerprint}); plan this model anew"
        )
    return plan
