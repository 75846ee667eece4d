"""Options that `plan` and `run` share, and the plan that they ask for."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli.balance_choice import balance_limit
from apportion.cli.kv_choice import typical_tokens, with_kv_choice
from apportion.cli.quantity import per_second, seconds, tokens
from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.catalog.cluster_rules import Here
    from apportion.types.cluster import Cluster
    from apportion.types.model import ModelSpec
    from apportion.types.workload import Workload

MAX_DEFAULT_CONTEXT = 4096
MAX_DEFAULT_PROMPT = 512
MAX_DEFAULT_OUTPUT = 128

OUTPUT_PANEL = "Options"
"""Headings of `--help`, in which every option of `plan`, `run`, `bench` and `whatif` has its place; typer puts the one
of this name first."""
DEVICES_PANEL = "Devices"
GOAL_PANEL = "Goal and demands"
FORMATS_PANEL = "Weights and KV cache"
DIVISION_PANEL = "How to divide"
GENERATION_PANEL = "Generation"


MOST = 2**31 - 1
"""Of tokens, sequences and whatever else is counted."""
MOST_SEED = 2**64 - 1


def finite(value: float | None) -> float | None:
    """A callback of numbers, which may be written "nan". Raises UsageError."""
    if value is not None and not isfinite(value):
        raise UsageError(f"{value} is no finite number")
    return value


class ObjectiveChoice(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    FEWEST_DEVICES = "fewest-devices"
    COMMUNICATION = "communication"


Model = Annotated[
    str,
    typer.Argument(
        help="'demo', a folder, config.json or .gguf file, a name (llama-3.1-8b), or a hub id.",
        show_default=False,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        rich_help_panel=DEVICES_PANEL,
        help='Any by name: "tower: rtx-4090 + 2x rtx-3060-12gb; laptop: m2-max; link tower-laptop 1Gbit 0.3ms"; or '
        "this machine's: \"a=cpu:600MiB@0.5, card=cuda:0\". Default: this machine's GPUs, else its CPU.",
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster", metavar="FILE", rich_help_panel=DEVICES_PANEL, help="A TOML file of devices and links."
    ),
]
ObjectiveOption = Annotated[
    ObjectiveChoice | None,
    typer.Option(
        metavar="GOAL",
        rich_help_panel=GOAL_PANEL,
        help="latency: one request alone (default). throughput: all together. fewest-devices. communication: little "
        "on the links.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=GOAL_PANEL,
        parser=tokens,
        help="Longest sequence, like 8k. Default: 4096, or the model's.",
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER", rich_help_panel=GOAL_PANEL, min=1, max=MOST, help="Sequences at once. Default: 1."
    ),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=GOAL_PANEL,
        parser=tokens,
        help="Typical prompt. Default: 512, at most half the context.",
    ),
]
OutputTokens = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=GOAL_PANEL,
        parser=tokens,
        help="Typical output. Default: 128, at most a quarter of it.",
    ),
]
ArrivalRate = Annotated[
    float | None,
    typer.Option(
        metavar="RATE",
        rich_help_panel=GOAL_PANEL,
        parser=per_second,
        help="Requests, like 2/s or 30/min, instead of --concurrency.",
    ),
]
TtftLimit = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        rich_help_panel=GOAL_PANEL,
        parser=seconds,
        help="Longest time to the first token, like 500ms (mean of requests that arrive together).",
    ),
]
TpotLimit = Annotated[
    float | None,
    typer.Option(
        metavar="TIME",
        rich_help_panel=GOAL_PANEL,
        parser=seconds,
        help="Longest time per output token, like 50ms, all sequences running.",
    ),
]
Balance = Annotated[
    str | None,
    typer.Option(
        metavar="PART",
        rich_help_panel=GOAL_PANEL,
        help="How far a stage's time may be from their mean, like 5% or 20ms (--objective communication).",
    ),
]
SwapSpace = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        rich_help_panel=FORMATS_PANEL,
        help="Host memory for sequences that must make room, like 64MiB. Default: none.",
    ),
]
KvTokens = Annotated[
    str | None,
    typer.Option(
        metavar="TOKENS",
        rich_help_panel=FORMATS_PANEL,
        help="KV cache of all sequences: a number of tokens, a percentage of concurrency × context, or 'max'. "
        "Default: 100%.",
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER",
        rich_help_panel=DIVISION_PANEL,
        help="Independent pipelines that share the requests: a number, or 'auto'. Default: 1.",
    ),
]
Replica = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        rich_help_panel=DIVISION_PANEL,
        min=0,
        help="Which replica of a plan with several, from 0.",
    ),
]
NoCalibration = Annotated[
    bool,
    typer.Option(
        "--no-calibration",
        rich_help_panel=DEVICES_PANEL,
        help="Ignore what earlier runs on this machine measured.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FORMATS",
        rich_help_panel=FORMATS_PANEL,
        help="fp32, bf16, fp16, int8, int4, or a file's (q4_k_m, awq, mxfp4, mlx-4bit, …); of several ('bf16,int8') "
        "each stage has its best. Default: as in the files, fp32 on CPUs.",
    ),
]


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


KvFormat = Annotated[
    KvFormatChoice | None,
    typer.Option(
        metavar="FORMAT",
        rich_help_panel=FORMATS_PANEL,
        help="Of keys and values: fp32, bf16, fp16; q8_0, fp8, q4_0 … are for export. Default: as the weights, fp16 "
        "if quantised.",
    ),
]


ForEngine = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        rich_help_panel=DIVISION_PANEL,
        help="Plan what vllm, sglang, llama.cpp, ollama, accelerate or exllamav3 can execute, with its buffers free.",
    ),
]


class StreamChoice(StrEnum):
    NEVER = "never"
    AUTO = "auto"


Stream = Annotated[
    StreamChoice | None,
    typer.Option(
        rich_help_panel=DIVISION_PANEL,
        help="Whether layers that fit nowhere are read from host memory in every step. Default: auto.",
    ),
]


Details = Annotated[
    bool,
    typer.Option(
        "--details",
        rich_help_panel=OUTPUT_PANEL,
        help="Show everything: shares, KV blocks, balance, certificate.",
    ),
]
UseAll = Annotated[
    bool,
    typer.Option("--use-all", rich_help_panel=DIVISION_PANEL, help="Give every device some of the layers."),
]
FixedStages = Annotated[
    list[str] | None,
    typer.Option(
        "--stage",
        metavar="DEVICE=LAYERS",
        rich_help_panel=DIVISION_PANEL,
        help="Divide by hand: 'gpu0=0-11', 'gpu1+gpu2=12-31' to share layers. Repeat; the rest is planned.",
    ),
]
Pins = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="DEVICE=LAYERS",
        rich_help_panel=DIVISION_PANEL,
        help="Layers a device must hold, among others: 'gpu0=0-3', 'gpu0=embedding', 'gpu0=head'. Repeat.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=DIVISION_PANEL,
        help="A device, or a host, to give no layers. Repeat.",
    ),
]
Reserve = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE=SIZE", rich_help_panel=DEVICES_PANEL, help="Memory to keep free: 'gpu0=2GiB'. Repeat."
    ),
]


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
        typer.echo(
            "note: of a Mac only the CPU is measured; for its GPU name it, like --devices m2-max-32gb",
            err=True,
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
