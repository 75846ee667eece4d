"""`apportion plan`: the best division of a model among devices, with its certificate."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.asked.choices import PlanChoices
from apportion.asked.replicas import number_asked, planned_replicas
from apportion.cli import options
from apportion.cli.replicas import pictures, refuse_beside
from apportion.types.errors import UsageError
from apportion.types.files import check_writable

if TYPE_CHECKING:
    from apportion.planner.plan_file import Planned

AsJson = Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")]
Out = Annotated[Path | None, typer.Option(help="Write the plan to this file.")]
Compare = Annotated[bool, typer.Option("--compare", help="Show what the usual rules come to.")]
WhyOption = Annotated[bool, typer.Option("--why", help="Show what would help, and what each device adds.")]


def _checked_picture(path: Path | None) -> Path | None:
    """Refused before the planning, which may take long."""
    if path is not None:
        from apportion.plot.write import check_picture_path

        check_picture_path(path)
    return path


Plot = Annotated[
    Path | None,
    typer.Option(callback=_checked_picture, help="Draw the plan to this .svg or .png file."),
]


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
    stream: options.Stream = None,
    arrival_rate: options.ArrivalRate = None,
    ttft_limit: options.TtftLimit = None,
    tpot_limit: options.TpotLimit = None,
    balance: options.Balance = None,
    replicas: options.Replicas = None,
    for_engine: options.ForEngine = None,
    stage: options.FixedStages = None,
    pin: options.Pins = None,
    exclude: options.Exclude = None,
    use_all: options.UseAll = False,
    reserve: options.Reserve = None,
    no_calibration: options.NoCalibration = False,
    swap_space: options.SwapSpace = None,
    kv_tokens: options.KvTokens = None,
    kv_format: options.KvFormat = None,
    as_json: AsJson = False,
    out: Out = None,
    compare: Compare = False,
    why: WhyOption = False,
    details: options.Details = False,
    plot: Plot = None,
) -> None:
    """Divide a model among devices, and prove how good the division is."""
    from apportion.catalog.described import described
    from apportion.catalog.hub import resolve_model

    if as_json and (compare or why):
        raise UsageError("--json prints the plan alone; leave out --compare and --why")
    check_writable(out, "--out")
    choices = PlanChoices.of(locals())
    number = number_asked(replicas)
    if number != 1:
        refuse_beside(compare=compare, why=why)
    made = planned_replicas(described(model) or resolve_model(model, weights=False), choices, number)
    _write(made, out, plot)
    shown = {
        "--details": details,
        "--why": why,
        "--compare": compare,
        "--plot plan.svg": plot is not None,
        "--for llama.cpp": for_engine is not None,
    }
    more = [option for option, given in shown.items() if not given]
    _show(made, as_json=as_json, compare=compare, why=why, details=details, more=more)


def _write(made: "Planned", out: Path | None, plot: Path | None) -> None:
    if out is not None:
        from apportion.planner.plan_file import write_plan

        write_plan(made, out)
    if plot is not None:
        from apportion.plot.write import write_picture

        for one, path in pictures(made, plot):
            write_picture(one, path)


def _show(
    made: "Planned", *, as_json: bool, compare: bool, why: bool, details: bool, more: list[str]
) -> None:
    if as_json:
        from apportion.planner.plan_file import plan_json

        sys.stdout.write(plan_json(made))
        return
    from rich.console import Console

    from apportion.cli.render import print_plan
    from apportion.types.replicated import ReplicatedPlan

    console = Console()
    if isinstance(made, ReplicatedPlan):
        from apportion.cli.render_replicas import print_replicas

        print_replicas(console, made, details=details)
        return
    print_plan(console, made, details=details, more=more)
    if made.constraints.engine is not None:
        from apportion.cli.render_engine import print_faster_way

        print_faster_way(console, made)
    if made.workload.objective == "communication":
        from apportion.cli.render_communication import print_communication

        print_communication(console, made)
    if made.constraints.statement:
        from apportion.cli.render_constraints import print_cost
        from apportion.planner.explain.constrained import cost_of_constraints

        cost = cost_of_constraints(made)
        if cost is not None:
            print_cost(console, made, cost)
    if compare:
        from apportion.cli.render_compare import print_comparison
        from apportion.planner.baselines.compare import plan_baselines

        print_comparison(console, made, plan_baselines(made))
    if why:
        from apportion.cli.render_why import print_why
        from apportion.planner.explain.why import explain

        print_why(console, made, explain(made))
