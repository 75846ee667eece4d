"""What can be planned but not run here."""

from pathlib import Path

from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.families import RUNNABLE
from apportion.catalog.quantisation import read_quantisation
from apportion.types.cluster import DeviceKind
from apportion.types.errors import ClusterError, ModelError, UsageError
from apportion.types.plan import Plan
from apportion.types.units import FORMAT_BYTES

RUNNABLE_KINDS: tuple[DeviceKind, ...] = ("cpu", "cuda")
RUNNABLE_FORMATS = ("fp32", "bf16", "fp16", "int8")


def check_files(folder: Path) -> None:
    """Raises ModelError for a model whose files hold quantised weights, by its config."""
    quantisation = read_quantisation(ConfigFields.read(folder / "config.json"))
    if quantisation is not None:
        raise ModelError(
            f"{folder} is in {quantisation.name}: such weights can be planned and exported to other engines, but not"
            " run; use its bf16, fp16 or fp32 version"
        )


def check_runnable(plan: Plan) -> None:
    """Raises UsageError where the engine has no implementation for the model, a format or a device in use."""
    if plan.model.family not in RUNNABLE:
        raise ModelError(
            f"{plan.model.name}: models of the family {plan.model.family} can be planned, but not run;"
            f" those that run are {', '.join(sorted(RUNNABLE))}"
        )
    for name in plan.weight_formats_in_use:
        if name not in RUNNABLE_FORMATS:
            raise UsageError(
                f"{name} weights can be planned and exported to other engines, but not run;"
                f" run with --weights {', '.join(RUNNABLE_FORMATS)}"
            )
    if plan.kv_format not in FORMAT_BYTES:
        raise UsageError(
            f"keys and values in {plan.kv_format} can be planned and exported to other engines, but not run;"
            f" run with --kv-format {', '.join(FORMAT_BYTES)}"
        )
    for device_id in plan.device_ids:
        kind = plan.cluster.device(device_id).kind
        if kind not in RUNNABLE_KINDS:
            raise ClusterError(
                f"device {device_id} is a {kind} device, which can be planned for, but not run on;"
                f" run on {' or '.join(RUNNABLE_KINDS)}"
            )
