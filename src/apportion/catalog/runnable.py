"""What can be planned but not run here."""

from apportion.catalog.families import RUNNABLE
from apportion.types.cluster import DeviceKind
from apportion.types.errors import ClusterError, ModelError, UsageError
from apportion.types.plan import Plan

RUNNABLE_KINDS: tuple[DeviceKind, ...] = ("cpu", "cuda")


def check_runnable(plan: Plan) -> None:
    """Raises UsageError where the engine has no implementation for the model, a format or a device in use."""
    if plan.model.family not in RUNNABLE:
        raise ModelError(
            f"{plan.model.name}: models of the family {plan.model.family} can be planned, but not run;"
            f" those that run are {', '.join(sorted(RUNNABLE))}"
        )
    for name in plan.weight_formats_in_use:
        if name != plan.activation_format:
            raise UsageError(
                f"{name} weights with {plan.activation_format} activations can be planned and exported to other"
                f" engines, but not run; run with --weights {plan.activation_format}"
            )
    for device_id in plan.device_ids:
        kind = plan.cluster.device(device_id).kind
        if kind not in RUNNABLE_KINDS:
            raise ClusterError(
                f"device {device_id} is a {kind} device, which can be planned for, but not run on;"
                f" run on {' or '.join(RUNNABLE_KINDS)}"
            )
