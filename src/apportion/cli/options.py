"""Options that `plan` and `run` share."""

from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from apportion.asked.choices import KvFormatChoice, ObjectiveChoice, StreamChoice
from apportion.cli.quantity import per_second, seconds, tokens
from apportion.types.errors import UsageError

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
