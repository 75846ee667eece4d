"""`apportion run`: plan, start the workers, stream the text, and hold the prediction against what was measured."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from apportion.asked.choices import PlanChoices
from apportion.asked.replicas import number_asked, planned_replicas
from apportion.asked.runnable import check_engine, check_preempt, check_runs_here
from apportion.cli import options
from apportion.cli.given_plan import GivenPlan, given_plan, read_given_replicas
from apportion.cli.quantity import tokens
from apportion.types.errors import UsageError
from apportion.types.files import check_writable, write_file
from apportion.types.replicated import ReplicatedPlan
from apportion.types.request import Request, SamplingParams
from apportion.types.text_file import read_text

if TYPE_CHECKING:
    from apportion.cli.generate_replicas import ReplicasStats
    from apportion.cli.run_stats import RunStats
    from apportion.engine.text import Text
    from apportion.planner.plan_file import Planned


class Preempt(StrEnum):
    """How a sequence makes room for others; see types.step_costs.PreemptMode."""

    AUTO = "auto"
    SWAP = "swap"
    RECOMPUTE = "recompute"


PreemptOption = Annotated[
    Preempt,
    typer.Option(
        rich_help_panel=options.GENERATION_PANEL,
        help="How sequences make room for others: swapped out, computed anew, or what is cheaper.",
    ),
]


def run(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line, run together.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Execute this plan instead of making one.")] = None,
    devices: options.Devices = None,
    cluster: options.ClusterFile = None,
    objective: options.ObjectiveOption = None,
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    prompt_tokens: options.PromptTokens = None,
    output_tokens: options.OutputTokens = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
    no_calibration: options.NoCalibration = False,
    replica: options.Replica = None,
    replicas: options.Replicas = None,
    stage: options.FixedStages = None,
    pin: options.Pins = None,
    exclude: options.Exclude = None,
    use_all: options.UseAll = False,
    reserve: options.Reserve = None,
    swap_space: options.SwapSpace = None,
    kv_tokens: options.KvTokens = None,
    kv_format: options.KvFormat = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            rich_help_panel=options.GENERATION_PANEL,
            parser=tokens,
            metavar="TOKENS",
            help="Most tokens to generate for each prompt.",
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            rich_help_panel=options.GENERATION_PANEL,
            min=0.0,
            callback=options.finite,
            help="0 always takes the likeliest token.",
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            rich_help_panel=options.GENERATION_PANEL,
            min=0.001,
            max=1.0,
            callback=options.finite,
            help="Draw among this much probability.",
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            rich_help_panel=options.GENERATION_PANEL,
            min=0,
            max=options.MOST_SEED,
            help="Of the draws; the same seed gives the same text.",
        ),
    ] = 0,
    n: Annotated[
        int,
        typer.Option(
            "--n",
            rich_help_panel=options.GENERATION_PANEL,
            min=1,
            max=options.MOST,
            help="Samples of each prompt; they share its blocks.",
        ),
    ] = 1,
    preempt: PreemptOption = Preempt.AUTO,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", rich_help_panel=options.GENERATION_PANEL, help="Go on to --max-tokens."),
    ] = False,
    stats_json: Annotated[Path | None, typer.Option(help="Write outputs and figures to this file.")] = None,
    details: options.Details = False,
) -> None:
    """Generate text with a model divided among devices."""
    drawing = _sampling(max_tokens, temperature, top_p, seed, ignore_eos)
    choices = PlanChoices.of(locals())
    _run(
        model,
        _Asked(_prompt_texts(prompt, prompts), drawing, n, preempt),
        given_plan(plan, replica),
        choices,
        _Shown(check_writable(stats_json, "--stats-json"), details),
    )


def _sampling(
    max_tokens: int, temperature: float, top_p: float, seed: int, ignore_eos: bool
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, ignore_eos=ignore_eos
    )


class _Asked(NamedTuple):
    prompts: list[str]
    sampling: SamplingParams
    n: int
    preempt: Preempt


class _Shown(NamedTuple):
    """Where figures go beside the terminal, and how much of them it shows."""

    stats_file: Path | None
    details: bool


def _run(
    model: str,
    asked: _Asked,
    given: GivenPlan,
    choices: PlanChoices,
    shown: _Shown,
) -> None:
    from apportion.catalog.hub import resolve_model
    from apportion.catalog.model_config import read_model_spec

    check_engine()
    from apportion.engine.text import Text
    from apportion.scheduler.admission import check_tokens

    folder = resolve_model(model, weights=True)
    text = Text(folder)
    requests = [
        Request(id=i, prompt_ids=_prompt_ids(text, prompt), sampling=asked.sampling, n=asked.n)
        for i, prompt in enumerate(asked.prompts)
    ]
    vocab_rows = read_model_spec(folder).vocab_rows
    for request in requests:
        check_tokens(request, vocab_rows)
    plan = _plan(given, folder, choices, requests)
    check_runs_here(plan)
    check_preempt(plan, asked.preempt.value)
    from apportion.cli.generate import generate  # beside the preloading
    from apportion.cli.generate_replicas import generate_replicas

    stats: RunStats | ReplicasStats
    if isinstance(plan, ReplicatedPlan):
        stats = generate_replicas(
            plan, folder, text, asked.prompts, requests, preempt=asked.preempt.value, details=shown.details
        )
    else:
        stats = generate(
            plan, folder, text, asked.prompts, requests, preempt=asked.preempt.value, details=shown.details
        )
    if shown.stats_file is not None:
        write_file(shown.stats_file, json.dumps(asdict(stats), indent=2) + "\n", "--stats-json")


def _prompt_ids(text: "Text", prompt: str) -> tuple[int, ...]:
    """Raises UsageError for a prompt of no tokens: there is nothing to continue."""
    prompt_ids = text.encode(prompt)
    if not prompt_ids:
        raise UsageError("the prompt is empty, and this model has no token to begin with; give it some text")
    return prompt_ids


def _prompt_texts(prompt: str | None, file: Path | None) -> list[str]:
    """Raises UsageError."""
    if (prompt is None) == (file is None):
        raise UsageError("give either a prompt or --prompts FILE")
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        texts = [line for line in read_text(file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompts {file}: {error}") from None
    if not texts:
        raise UsageError(f"--prompts {file} has no prompt; write one a line")
    return texts


def _plan(given: GivenPlan, folder: Path, choices: PlanChoices, requests: Sequence[Request]) -> "Planned":
    """The given plan, or the best for exactly these requests where nothing else is asked for."""
    from apportion.engine.launcher import preload

    if given.file is not None:
        return read_given_replicas(given, folder, choices)
    prompt_tokens = max(len(request.prompt_ids) for request in requests)
    output_tokens = requests[0].sampling.max_tokens
    if choices.context is not None and prompt_tokens >= choices.context:
        raise UsageError(
            f"a prompt has {prompt_tokens} tokens and --context is {choices.context}, of which one is needed for"
            f" output; shorten it, or give --context {prompt_tokens + output_tokens}"
        )
    context = choices.context or prompt_tokens + output_tokens
    choices = replace(
        choices,
        context=context,
        concurrency=choices.concurrency or sum(request.n for request in requests),
    )
    if choices.kv_tokens is None:  # else typical requests are shorter than these
        choices = replace(
            choices,
            prompt_tokens=choices.prompt_tokens or prompt_tokens,
            output_tokens=choices.output_tokens or min(output_tokens, context - prompt_tokens),
        )
    return planned_replicas(folder, choices, number_asked(choices.replicas), partial(preload, folder))
