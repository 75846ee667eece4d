"""Whether what is asked for can run here."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError
from apportion.types.plan import Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.step_costs import PreemptMode

if TYPE_CHECKING:
    from apportion.planner.plan_file import Planned

_ENGINE_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "msgpack")


def check_engine() -> None:
    """Raises UsageError where a package is missing. Looks for them only: this process does without some."""
    missing = next((name for name in _ENGINE_PACKAGES if find_spec(name) is None), None)
    if missing is not None:
        raise UsageError(
            f"running needs {missing}, which is not installed; pip install torch==2.13.0, then apportion[run]"
        )


def check_runs_here(plan: "Planned") -> None:
    """Raises UsageError for devices of several hosts, which can be planned but not run yet, and for a model, a format
    or a device that the engine has no implementation for."""
    from apportion.catalog.runnable import check_runnable

    hosts = sorted({plan.cluster.device(device_id).host for device_id in plan.device_ids})
    if len(hosts) > 1:
        raise UsageError(
            f"the plan spans hosts {', '.join(hosts)}; run executes devices of one machine, plan with those of one host"
        )
    for one in pipelines(plan):
        check_runnable(one)


def check_preempt(plan: "Planned", preempt: PreemptMode) -> None:
    """Raises UsageError."""
    if preempt == "swap" and not all(one.num_swap_blocks for one in pipelines(plan)):
        raise UsageError("--preempt swap needs room in host memory; plan with --swap-space, such as 64MiB")


def pipelines(plan: "Planned") -> tuple[Plan, ...]:
    return plan.replicas if isinstance(plan, ReplicatedPlan) else (plan,)
