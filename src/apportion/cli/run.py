"""`apportion run`: plan, start the workers, stream the text, and hold the prediction against what was measured."""

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.cli import options
from apportion.types.errors import UsageError
from apportion.types.request import Request, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from apportion.runtime.text import Text


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
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate for each prompt.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among this much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws; the same seed gives the same text.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    stats_json: Annotated[Path | None, typer.Option(help="Write outputs and figures to this file.")] = None,
) -> None:
    """Generate text with a model divided among devices."""
    from apportion.catalog.hub import resolve_model
    from apportion.runtime.text import Text

    texts = _prompt_texts(prompt, prompts)
    folder = resolve_model(model, weights=True)
    text = Text(folder)
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, ignore_eos=ignore_eos
    )
    requests = [Request(id=i, prompt_ids=text.encode(one), sampling=sampling) for i, one in enumerate(texts)]
    choices = options.PlanChoices(
        devices=devices,
        cluster_file=cluster,
        objective=objective,
        context=context,
        concurrency=concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        weights=weights,
    )
    stats = execute(_plan(plan, folder, choices, requests), folder, text, texts, requests)
    if stats_json is not None:
        stats_json.write_text(json.dumps(asdict(stats), indent=2) + "\n")


def _prompt_texts(prompt: str | None, file: Path | None) -> list[str]:
    """Raises UsageError."""
    if (prompt is None) == (file is None):
        raise UsageError("give either a prompt or --prompts FILE")
    if file is None:
        assert prompt is not None
        return [prompt]
    try:
        texts = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --prompts {file}: {error}") from None
    if not texts:
        raise UsageError(f"--prompts {file} has no prompt; write one a line")
    return texts
