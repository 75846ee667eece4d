"""Options that `plan` and `run` share, and the plan that they ask for."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apportion.cli.kv_choice import typical_tokens, with_kv_choice
from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.types.cluster import Cluster
    from apportion.types.model import ModelSpec
    from apportion.types.workload import Workload

MAX_DEFAULT_CONTEXT = 4096
MAX_DEFAULT_PROMPT = 512
MAX_DEFAULT_OUTPUT = 128

DEVICES_PANEL = "Devices"
"""Headings of `--help`, in which every option of `plan`, `run`, `bench` and `whatif` has its place."""
GOAL_PANEL = "Goal and demands"
FORMATS_PANEL = "Weights and KV cache"
DIVISION_PANEL = "How to divide"
GENERATION_PANEL = "Generation"
OUTPUT_PANEL = "Output"


class ObjectiveChoice(StrEnum):
    LATENCY = "latency"
    THROUGHPUT = "throughput"
    FEWEST_DEVICES = "fewest-devices"


Model = Annotated[
    str,
    typer.Argument(
        help="'demo', a model folder, a config.json or .gguf file, a name like llama-3.1-8b, or a hub id."
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DEVICES_PANEL,
        help='Devices of this machine, like "laptop=cpu:600MiB@0.5, card=cuda:0", or any, like '
        '"tower: rtx-4090 + 2x rtx-3060-12gb; laptop: m2-max; link tower-laptop 1Gbit 0.3ms".',
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option(
        "--cluster",
        rich_help_panel=DEVICES_PANEL,
        help="TOML file of devices on several hosts and their links.",
    ),
]
ObjectiveOption = Annotated[
    ObjectiveChoice | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL,
        help="Time of one request alone (default), tokens/s of all (default with a rate, limit or replicas), or as few "
        "devices as will do.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(rich_help_panel=GOAL_PANEL, min=1, help="Most tokens in a sequence [default: up to 4096]."),
]
Concurrency = Annotated[
    int | None, typer.Option(rich_help_panel=GOAL_PANEL, min=1, help="Sequences at once [default: 1].")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL, min=1, help="Typical prompt [default: 512, at most half the context]."
    ),
]
OutputTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL,
        min=1,
        help="Typical output [default: 128, at most a quarter of the context].",
    ),
]
ArrivalRate = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL, min=1e-9, help="Requests per second to serve, instead of --concurrency."
    ),
]
TtftLimit = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL,
        min=1e-9,
        help="Most seconds to a first token, as the mean of all requests arriving together.",
    ),
]
TpotLimit = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=GOAL_PANEL, min=1e-9, help="Most seconds per output token with all sequences running."
    ),
]
SwapSpace = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=FORMATS_PANEL,
        help="Host memory beside each device for sequences that must make room, like 64MiB [default: none].",
    ),
]
KvTokens = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=FORMATS_PANEL,
        help="Tokens of KV cache for all sequences together, by their actual lengths: a number, a percentage of "
        "concurrency × context, or 'max' for all memory that the division leaves [default: 100%].",
    ),
]
Replicas = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=DIVISION_PANEL,
        help="Independent pipelines that share out the sequences: a number, or auto for the best one [default: 1].",
    ),
]
Replica = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=DIVISION_PANEL,
        min=0,
        help="Take this replica of a plan with several, counted from 0.",
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
        rich_help_panel=FORMATS_PANEL,
        help="Format of the weights, or several of fp32, bf16, fp16, int8, int4 to choose from for each stage, like "
        "'bf16,int8'; 'auto' is as in the files, also quantised ones [default: auto; fp32 on CPUs for plain ones].",
    ),
]


class KvFormatChoice(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


KvFormat = Annotated[
    KvFormatChoice | None,
    typer.Option(
        rich_help_panel=FORMATS_PANEL,
        help="Format of keys and values: as the weights, fp16 where these are quantised; on GPUs as the hidden states "
        "[default: auto].",
    ),
]


class StreamChoice(StrEnum):
    NEVER = "never"
    AUTO = "auto"


Stream = Annotated[
    StreamChoice | None,
    typer.Option(
        rich_help_panel=DIVISION_PANEL,
        help="Layers streamed from host memory in every step, if nothing else fits [default: auto].",
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

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "PlanChoices":
        """From a command's arguments, which have the names of these fields; others are left alone."""
        typed = {one.name: arguments[one.name] for one in fields(cls) if one.name in arguments}
        return cls(**{**typed, "no_calibration": typed["no_calibration"] or None})

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
    workload = Workload(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        max_context_tokens=context,
        objective=_objective(choices).value,
        arrival_rate=choices.arrival_rate,
        ttft_limit_s=choices.ttft_limit,
        tpot_limit_s=choices.tpot_limit,
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
    together = choices.demanding or choices.replicas is not None
    return choices.objective or (ObjectiveChoice.THROUGHPUT if together else ObjectiveChoice.LATENCY)


def cluster_from_options(choices: PlanChoices) -> "Cluster":
    """This machine's own devices where none are named."""
    from apportion.catalog.cluster_text import make_cluster, parse_devices, read_cluster_toml
    from apportion.probe.local import all_local_devices, local_devices

    if choices.devices is not None and choices.cluster is not None:
        raise UsageError("give either --devices or --cluster")
    if choices.cluster is not None:
        return read_cluster_toml(choices.cluster, all_local_devices)
    if choices.devices is not None:
        return parse_devices(choices.devices, all_local_devices)
    return make_cluster(local_devices(), [])
