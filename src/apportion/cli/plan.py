"""`apportion plan`: the best division of a model among devices, with its certificate."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from apportion.cli import options


def plan(
    model: options.Model,
    devices: options.Devices = None,
    cluster: options.ClusterFile = None,
    objective: options.ObjectiveOption = None,
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    prompt_tokens: options.PromptTokens = None,
    output_tokens: options.OutputTokens = None,
    weights: options.Weights = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
) -> None:
    """Divide a model among devices, and prove how good the division is."""
    from rich.console import Console

    from apportion.catalog.hub import resolve_model
    from apportion.cli.render import print_plan
    from apportion.planner.plan_file import plan_json, write_plan

    made = options.plan_from_options(
        resolve_model(model, weights=False),
        options.PlanChoices(
            devices=devices,
            cluster_file=cluster,
            objective=objective,
            context=context,
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            weights=weights,
        ),
    )
    if out is not None:
        write_plan(made, out)
    if as_json:
        sys.stdout.write(plan_json(made))
    else:
        print_plan(Console(), made)
