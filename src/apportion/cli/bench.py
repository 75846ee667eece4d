"""`apportion bench`: how fast a plan is, against what the memory allows and what was predicted, and where time goes."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.asked.choices import PlanChoices
from apportion.asked.plan import plan_from_options
from apportion.asked.runnable import check_engine, check_runs_here
from apportion.cli import options
from apportion.cli.bench_choices import Lengths, Measured
from apportion.cli.given_plan import GivenPlan, given_plan, read_given_plan
from apportion.cli.quantity import tokens
from apportion.types.errors import UsageError
from apportion.types.files import check_writable

if TYPE_CHECKING:
    from apportion.cli.bench_run import BenchResult
    from apportion.types.plan import Plan

Levels = Annotated[
    str,
    typer.Option(
        "--concurrency",
        rich_help_panel=options.GOAL_PANEL,
        help="Sequences at once, each measured: like 1,4,16.",
    ),
]
PromptTokens = Annotated[
    int,
    typer.Option(
        rich_help_panel=options.GOAL_PANEL, parser=tokens, metavar="TOKENS", help="Tokens of each prompt."
    ),
]
OutputTokens = Annotated[
    int,
    typer.Option(
        rich_help_panel=options.GOAL_PANEL, min=2, max=options.MOST, help="Tokens generated for each prompt."
    ),
]


def bench(
    model: options.Model,
    plan: Annotated[Path | None, typer.Option(help="Measure this plan instead of making one.")] = None,
    devices: options.Devices = None,
    cluster: options.ClusterFile = None,
    objective: options.ObjectiveOption = None,
    context: options.Context = None,
    concurrency: Levels = "1,4,16",
    prompt_tokens: PromptTokens = 512,
    output_tokens: OutputTokens = 64,
    weights: options.Weights = None,
    kv_format: options.KvFormat = None,
    stream: options.Stream = None,
    stage: options.FixedStages = None,
    pin: options.Pins = None,
    exclude: options.Exclude = None,
    use_all: options.UseAll = False,
    reserve: options.Reserve = None,
    no_calibration: options.NoCalibration = False,
    replica: options.Replica = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Measure any config's shapes; needs no checkpoint.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, max=options.MOST, help="Of each concurrency; medians are shown.")
    ] = 3,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace (opens in Perfetto).")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the figures as a last line of JSON.")
    ] = False,
    details: options.Details = False,
) -> None:
    """Measure a model divided among devices."""
    choices = PlanChoices(
        devices=devices,
        cluster=cluster,
        objective=objective,
        context=context,
        concurrency=None,
        prompt_tokens=None,
        output_tokens=None,
        weights=weights,
        kv_format=kv_format,
        stream=stream,
        no_calibration=no_calibration or None,
        stage=stage or None,
        pin=pin or None,
        exclude=exclude or None,
        use_all=use_all or None,
        reserve=reserve or None,
    )
    levels, lengths = _levels(concurrency), Lengths(prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    measured = Measured(
        levels=levels,
        lengths=lengths,
        rounds=rounds,
        trace_file=check_writable(trace, "--trace"),
        details=details,
    )
    folder, given = _folder(model, random_weights=random_weights), given_plan(plan, replica)
    result = _bench(folder, random_weights, given, choices, measured)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")


def _bench(
    folder: Path,
    random_weights: bool,
    given: GivenPlan,
    choices: PlanChoices,
    measured: Measured,
) -> "BenchResult":

    plan = _plan(given, folder, choices, measured)
    check_runs_here(plan)
    check_engine()
    from apportion.cli.bench_run import run_bench

    return run_bench(plan, folder, measured, random_weights=random_weights)


def _levels(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--concurrency '{text}': write numbers of sequences, like 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _folder(model: str, *, random_weights: bool) -> Path:
    from apportion.catalog.gguf_config import GGUF_SUFFIX
    from apportion.catalog.hub import resolve_model

    folder = resolve_model(model, weights=not random_weights)
    if folder.suffix == GGUF_SUFFIX:
        raise UsageError(
            f"'{model}' is a GGUF file; --random-weights needs a config.json or a catalogue name"
        )
    return folder


def _plan(given: GivenPlan, folder: Path, choices: PlanChoices, measured: Measured) -> "Plan":
    """The given plan, or the best for the most sequences at once. Raises UsageError where it is not made for them."""
    lengths, most = measured.lengths, max(measured.levels)
    tokens = lengths.prompt_tokens + lengths.output_tokens
    if given.file is None:
        return plan_from_options(
            folder,
            replace(
                choices,
                context=choices.context or tokens,
                concurrency=most,
                prompt_tokens=lengths.prompt_tokens,
                output_tokens=lengths.output_tokens,
            ),
        )
    plan = read_given_plan(given, folder, choices)
    workload = plan.workload
    if most > workload.concurrency or tokens > workload.max_context_tokens:
        raise UsageError(
            f"{given.file} is made for {workload.concurrency} sequences of up to {workload.max_context_tokens} tokens,"
            f" not for {most} of {tokens}; plan with --concurrency {most} --context {tokens}, or ask for less"
        )
    return plan
