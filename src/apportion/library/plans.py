"""Plans for programs: the options of `apportion plan` as keyword arguments."""

from collections.abc import Mapping, Sequence
from math import inf
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from apportion.asked.choices import KvFormatChoice, ObjectiveChoice, PlanChoices, StreamChoice
from apportion.types.errors import UsageError
from apportion.types.names import unknown_name

if TYPE_CHECKING:
    from apportion.types.plan import Plan
    from apportion.types.replicated import ReplicatedPlan


class PlanOptions(TypedDict, total=False):
    """What is left out has the default of `apportion plan`, whose help says what each means."""

    devices: str | Sequence[str]
    """Like "laptop=cpu:12MiB@0.5, desk=cpu:13MiB" or "tower: rtx-4090 + rtx-3060-12gb", or a list of one host's devices
    like ["rtx-3090", "rtx-3060-12gb"]; this machine's by default."""
    cluster: str | PathLike[str]
    """A TOML file of devices and links, instead of `devices`."""
    objective: Literal["latency", "throughput", "fewest-devices", "communication"]
    context: int
    """Tokens of the longest sequence, prompt and output."""
    concurrency: int
    """Sequences at once; further ones wait for a place. 1 by default."""
    prompt_tokens: int
    output_tokens: int
    """Of a typical request, whose time is minimised."""
    arrival_rate: float
    """Requests per second that must be served, instead of `concurrency`."""
    ttft_limit_s: float
    tpot_limit_s: float
    balance: str
    weights: str
    kv_format: str
    kv_tokens: int | str
    swap_space: str
    stream: Literal["auto", "never"]
    for_engine: str
    stages: Sequence[str]
    pins: Sequence[str]
    exclude: Sequence[str]
    use_all: bool
    reserve: Sequence[str]
    calibration: bool
    """Whether what earlier runs on this machine measured counts."""


_RENAMED = {"ttft_limit_s": "ttft_limit", "tpot_limit_s": "tpot_limit", "stages": "stage", "pins": "pin"}
"""Options that PlanChoices knows by the name of the command's."""
_CHOICES = {"objective": ObjectiveChoice, "stream": StreamChoice, "kv_format": KvFormatChoice}


def plan(model: str | PathLike[str], **options: Unpack[PlanOptions]) -> "Plan":
    """The best division of a model among devices, certified.

    `model` is "demo", a name ("llama-3.1-8b"), a folder, config.json or GGUF file, a hub id, or a description
    ("layers=64 hidden=5120 …"). Raises UsageError for what is given, InfeasibleError where the devices cannot hold it.
    """
    from apportion.asked.plan import plan_from_options
    from apportion.catalog.described import described
    from apportion.catalog.hub import resolve_model

    name = str(model)
    return plan_from_options(described(name) or resolve_model(name, weights=False), plan_choices(options))


def read_plan(file: str | PathLike[str], replica: int | None = None) -> "Plan":
    """The plan in a file, or of one with several replicas the one of this number. Raises PlanError."""
    from apportion.planner.plan_file import read_plan

    return read_plan(Path(file), replica)


def write_plan(plan: "Plan | ReplicatedPlan", file: str | PathLike[str]) -> None:
    """Raises UsageError where that cannot be."""
    from apportion.planner.plan_file import write_plan

    write_plan(plan, Path(file))


def plan_choices(options: Mapping[str, Any]) -> PlanChoices:
    """Raises UsageError for a value, TypeError for a name that is none."""
    unknown = next((name for name in options if name not in PlanOptions.__annotations__), None)
    if unknown is not None:
        raise TypeError(unknown_name("option", unknown, list(PlanOptions.__annotations__)))
    given = {name: _checked(name, value) for name, value in options.items() if value is not None}
    devices = given.get("devices")
    if devices is not None and not isinstance(devices, str):
        given["devices"] = " + ".join(devices)
    if "cluster" in given:
        given["cluster"] = Path(given["cluster"])
    if "kv_tokens" in given:
        given["kv_tokens"] = str(given["kv_tokens"])
    no_calibration = not given.pop("calibration", True)
    typed = {_RENAMED.get(name, name): value for name, value in given.items()}
    always = dict.fromkeys(
        (
            "devices",
            "cluster",
            "objective",
            "context",
            "concurrency",
            "prompt_tokens",
            "output_tokens",
            "weights",
        )
    )
    return PlanChoices.of(always | typed | {"no_calibration": no_calibration})


def check_count(name: str, value: object) -> None:
    """Raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r} is no whole number from 1")


def _checked(name: str, value: Any) -> Any:
    """Raises UsageError."""
    if name in ("stages", "pins", "exclude", "reserve"):
        return list(value)
    if (choices := _CHOICES.get(name)) is not None:
        known = [one.value for one in choices]
        if value not in known:
            raise UsageError(f"{name}: {unknown_name('value', str(value), known)}")
        return choices(value)
    if name in ("context", "concurrency", "prompt_tokens", "output_tokens"):
        check_count(name, value)
    elif name in ("arrival_rate", "ttft_limit_s", "tpot_limit_s") and not 0 < float(value) < inf:
        raise UsageError(f"{name}={value!r} is no finite number > 0")
    return value
