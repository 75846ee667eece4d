"""What a plan's constraints cost, in 80 columns."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_summary import SPEED
from apportion.planner.explain.constrained import Cost
from apportion.types.plan import Estimate, Plan, Stage
from apportion.types.units import format_seconds

NOTHING = 5e-5
"""Relative: less is shown as no loss."""


def print_cost(console: Console, plan: Plan, cost: Cost) -> None:
    table = Table(title="Beside the best plan without constraints", title_justify="left")
    table.add_column("")
    for column in ("this plan", "the best"):
        table.add_column(column, justify="right")
    best = cost.best
    table.add_row(_objective(plan), format_seconds(plan.certificate.value), format_seconds(best.value))
    for row in zip(_rows(plan.estimate), _rows(best.estimate), strict=True):
        table.add_row(row[0][0], *(figure for _, figure in row))
    table.add_section()
    ours, theirs = _layers(plan.stages), _layers(best.stages)
    for device in plan.cluster.devices:
        if device.id in ours or device.id in theirs:
            table.add_row(escape(device.id), ours.get(device.id, "–"), theirs.get(device.id, "–"))
    console.print(table)
    console.print(escape(_conclusion(plan, cost)))
    for one in cost.dropped:
        saved = f"saves {1 - 1 / (1 + one.loss):.1%} of the time" if one.loss > NOTHING else "saves nothing"
        console.print(escape(f"· leaving out {one.typed} alone {saved}"))
    if cost.loss > NOTHING and cost.dropped and all(one.loss <= NOTHING for one in cost.dropped):
        console.print("they cost only together: each keeps what another would allow")


def _objective(plan: Plan) -> str:
    of = {"latency": "one request", "communication": "links in a step"}
    return of.get(plan.workload.objective, "an output token")


def _rows(estimate: Estimate) -> tuple[tuple[str, str], ...]:
    return (
        ("first token", format_seconds(estimate.ttft_s)),
        ("every further one", format_seconds(estimate.tpot_s)),
        (SPEED, f"{estimate.tokens_per_s:.1f}"),
    )


def _layers(stages: tuple[Stage, ...]) -> dict[str, str]:
    """By device, with its part of the KV heads where others hold the same layers."""
    return {
        device_id: f"{stage.layer_start}–{stage.layer_stop - 1}"
        + (f", {heads}/{sum(stage.split.kv_heads)} heads" if stage.split.size > 1 else "")
        for stage in stages
        for device_id, heads in zip(stage.split.device_ids, stage.split.kv_heads, strict=True)
    }


def _conclusion(plan: Plan, cost: Cost) -> str:
    if cost.loss <= NOTHING:
        return f"{plan.constraints.statement}: this costs nothing, no plan is better"
    links = " on links" if plan.workload.objective == "communication" else ""
    return (
        f"{plan.constraints.statement}: this costs {cost.loss:.1%} more time{links}. The"
        f" bottleneck is {plan.estimate.bottleneck}; of the best plan it is {cost.best.estimate.bottleneck}"
    )
