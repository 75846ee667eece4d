"""What a plan is asked for, as it is typed or given to `apportion.plan`: the workload and the cluster that follow."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apportion.asked.balance import balance_limit
from apportion.asked.kv_tokens import typical_tokens, with_kv_choice
from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.catalog.cluster_rules import Here
    from apportion.types.cluster import Cluster
    from apportion.types.model import ModelSpec
    from apportion.types.workload import Workload

MAX_DEFAULT_CONTEXT = 4096
MAX_DEFAULT_PROMPT = 512
MAX_DEFAULT_OUTPUT = 128


class ObjectiveChoice(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    FEWEST_DEVICES = "fewest-devices"
    COMMUNICATION = "communication"


class KvFormatChoice(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    Q8_0 = "q8_0"
    FP8 = "fp8"
    Q5_1 = "q5_1"
    Q5_0 = "q5_0"
    Q4_1 = "q4_1"
    Q4_0 = "q4_0"
    IQ4_NL = "iq4_nl"


class StreamChoice(StrEnum):
    NEVER = "never"
    AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoices:
    """What was typed; None where nothing was."""

    devices: str | None
    cluster: Path | None
    objective: ObjectiveChoice | None
    context: int | None
    concurrency: int | None
    prompt_tokens: int | None
    output_tokens: int | None
    weights: str | None
    no_calibration: bool | None = None
    stream: StreamChoice | None = None
    arrival_rate: float | None = None
    ttft_limit: float | None = None
    tpot_limit: float | None = None
    swap_space: str | None = None
    kv_tokens: str | None = None
    kv_format: KvFormatChoice | None = None
    replicas: str | None = None
    balance: str | None = None
    for_engine: str | None = None
    stage: list[str] | None = None
    pin: list[str] | None = None
    exclude: list[str] | None = None
    use_all: bool | None = None
    reserve: list[str] | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "PlanChoices":
        """From a command's arguments, which have the names of these fields; others are left alone."""
        typed = {one.name: arguments[one.name] for one in fields(cls) if one.name in arguments}
        return cls(
            **{name: None if value is False or value == [] else value for name, value in typed.items()}
        )

    @property
    def demanding(self) -> bool:
        """Whether a rate or a limit is asked for."""
        return not (self.arrival_rate is None and self.ttft_limit is None and self.tpot_limit is None)


def workload_from_options(model: "ModelSpec", choices: PlanChoices) -> "Workload":
    from apportion.types.workload import Workload

    context = choices.context or min(model.max_context_tokens, MAX_DEFAULT_CONTEXT)
    if context > model.max_context_tokens:
        raise UsageError(f"--context {context} is more than {model.name}'s {model.max_context_tokens}")
    concurrency = choices.concurrency or 1
    typical = typical_tokens(choices.kv_tokens, concurrency, context)
    prompt_tokens = choices.prompt_tokens or max(1, min(MAX_DEFAULT_PROMPT, typical // 2))
    output_tokens = choices.output_tokens or max(1, min(MAX_DEFAULT_OUTPUT, typical // 4))
    if prompt_tokens + output_tokens > context:
        raise UsageError(
            f"--prompt-tokens {prompt_tokens} and --output-tokens {output_tokens} do not fit in "
            f"--context {context}; give fewer, or a longer context"
        )
    objective = _objective(choices).value
    workload = Workload(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        max_context_tokens=context,
        objective=objective,
        arrival_rate=choices.arrival_rate,
        ttft_limit_s=choices.ttft_limit,
        tpot_limit_s=choices.tpot_limit,
        balance=balance_limit(choices.balance, objective),
        kv_format=None if choices.kv_format in (None, KvFormatChoice.AUTO) else choices.kv_format.value,
    )
    return with_kv_choice(workload, choices.kv_tokens)


def _objective(choices: PlanChoices) -> ObjectiveChoice:
    if choices.arrival_rate is not None and choices.concurrency is not None:
        raise UsageError(
            "give either --concurrency or --arrival-rate: the rate decides how many are in flight"
        )
    if choices.demanding and choices.objective is ObjectiveChoice.LATENCY:
        raise UsageError(
            "--objective latency is of one request alone; rates and limits go with throughput or fewest-devices"
        )
    if choices.objective is ObjectiveChoice.COMMUNICATION:
        _check_communication(choices)
    together = choices.demanding or choices.replicas is not None
    return choices.objective or (ObjectiveChoice.THROUGHPUT if together else ObjectiveChoice.LATENCY)


def tell_what_is_not_seen() -> None:
    """Of this machine, where nobody names its devices: GPUs are found through NVIDIA's driver alone."""
    if sys.platform == "darwin":
        sys.stderr.write(
            "note: of a Mac only the CPU is measured; for its GPU name it, like --devices m2-max-32gb\n"
        )


def this_machine() -> "Here":
    from apportion.catalog.cluster_rules import Here
    from apportion.probe.local import cuda_names
    from apportion.probe.processor import memory_bytes

    return Here(cards=lambda: tuple(cuda_names().values()), memory_bytes=memory_bytes)


def _check_communication(choices: PlanChoices) -> None:
    if choices.demanding:
        raise UsageError(
            "--objective communication counts what a step puts on links; rates and limits go with throughput or "
            "fewest-devices"
        )
    if choices.stream is StreamChoice.AUTO:
        raise UsageError(
            "--objective communication divides layers among devices that hold them; leave out --stream auto"
        )


def cluster_from_options(choices: PlanChoices) -> "Cluster":
    """This machine's own devices where none are named."""
    from apportion.catalog.cluster_text import make_cluster, parse_devices, read_cluster_toml
    from apportion.probe.local import all_local_devices, local_devices

    here = this_machine()

    if choices.devices is not None and choices.cluster is not None:
        raise UsageError("give either --devices or --cluster")
    if choices.cluster is not None and choices.cluster.suffix == ".json":
        from apportion.planner.outdated import read_planned_cluster

        return read_planned_cluster(choices.cluster)
    if choices.cluster is not None:
        return read_cluster_toml(choices.cluster, all_local_devices, here)
    if choices.devices is not None:
        return parse_devices(choices.devices, all_local_devices, here)
    tell_what_is_not_seen()
    return make_cluster(local_devices(), [])
