"""A plan of least communication beside the fastest one, and how evenly a plan fills the memory of its devices."""

from rich.console import Console
from rich.table import Table

from apportion.cost.estimate import communication, whole_step_s
from apportion.cost.statements import Communication, epsilon_s, memory_spread, step_communication
from apportion.planner.explain.communication import fastest_beside
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import format_bytes, format_seconds
from apportion.types.workload import BalanceLimit


def print_communication(console: Console, plan: Plan) -> None:
    """Of one decode step of all sequences; the fastest is not certified here."""
    fastest = fastest_beside(plan)
    title = "Communication of a decode step" + (
        f" of {plan.workload.concurrency} sequences" if plan.workload.concurrency > 1 else ""
    )
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("plan")
    for column in ("on links", "bytes", "stages", "off mean", "tokens/s", "first token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("this plan", *_figures(plan, plan.stages, plan.estimate))
    if fastest is not None:
        name = f"fastest by {plan.workload.for_speed.objective}"
        table.add_row(name, *_figures(plan, fastest.stages, fastest.estimate))
    console.print(table)
    parts = communication(plan.model, plan.cluster, plan.workload, plan.stages)
    console.print(
        f"on links: {format_seconds(parts.hops_s)} between stages, {format_seconds(parts.groups_s)} inside groups, "
        f"{format_seconds(parts.coordinator_s)} from and to the coordinator",
        highlight=False,
    )
    if fastest is not None:
        slower = 1 - plan.estimate.tokens_per_s / fastest.estimate.tokens_per_s
        said = f"{slower:.1%} fewer tokens/s than the fastest" if slower > 5e-4 else "nothing: none is faster"
        console.print(f"it costs {said}", highlight=False)


def _figures(plan: Plan, stages: tuple[Stage, ...], estimate: Estimate) -> tuple[str, ...]:
    parts = communication(plan.model, plan.cluster, plan.workload, stages)
    step: Communication = step_communication(plan.model, plan.workload, stages)
    times_s = whole_step_s(plan.model, plan.cluster, plan.workload, stages)
    mean_s = sum(times_s) / len(times_s)
    return (
        format_seconds(parts.total_s),
        format_bytes(step.payload_bytes),
        str(len(stages)),
        f"{epsilon_s(times_s) / mean_s:.1%}" if len(stages) > 1 else "–",
        f"{estimate.tokens_per_s:.1f}",
        format_seconds(estimate.ttft_s),
    )


def balance_said(limit: BalanceLimit) -> str:
    if limit.seconds is not None:
        return format_seconds(limit.seconds)
    return f"{100 * (limit.of_mean or 0):g}%"


def spread_line(plan: Plan) -> str:
    """Over the devices in use, by what they use and by what part of their memory that is."""
    spread = memory_spread(plan)
    if len(plan.memory) == 1:
        return f"memory: {spread.mean_part:.0%} of the device's is used"
    return (
        f"memory: {spread.mean_part:.0%} of each device's is used on average, {100 * spread.range_part:.0f} points or "
        f"{format_bytes(spread.range_bytes)} from least to most, standard deviation {100 * spread.std_part:.1f} points"
        f" or {format_bytes(spread.std_bytes)}"
    )
