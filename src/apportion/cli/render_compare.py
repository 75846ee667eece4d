"""`plan --compare`: the plan beside the usual rules, in 80 columns."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_summary import SPEED
from apportion.planner.baselines.compare import Baseline
from apportion.types.plan import Estimate, Plan
from apportion.types.units import format_seconds, three_digits


def print_comparison(console: Console, plan: Plan, baselines: Sequence[Baseline]) -> None:
    table = Table(title=f"The usual rules, by the same cost model ({SPEED})", title_justify="left")
    table.add_column("rule")
    for column in (plan.workload.objective, "tokens/s", "TTFT", "TPOT", "gain"):
        table.add_column(column, justify="right")
    table.add_row("this plan", *_figures(plan.certificate.value, plan.estimate), "", end_section=True)
    for baseline in baselines:
        name, division = escape(f"{baseline.rule}\n  {baseline.used_by}"), baseline.division
        if division is None:
            table.add_row(name, "not feasible", *[""] * 4)
        else:
            gain = f"{division.value / plan.certificate.value:.2f}×"
            table.add_row(name, *_figures(division.value, division.estimate), gain)
    console.print(table)
    for baseline in baselines:
        if baseline.division is None:
            console.print(escape(f"{baseline.rule} is not feasible: {baseline.why_not}"))
    others = [
        f"{one.rule} ({one.division.chunk_tokens})"
        for one in baselines
        if one.division and one.division.chunk_tokens != plan.chunk_tokens
    ]
    if others:
        console.print(f"with another prefill chunk than {plan.chunk_tokens}: {', '.join(others)}")


def _figures(value: float, estimate: Estimate) -> tuple[str, str, str, str]:
    return (
        format_seconds(value),
        three_digits(estimate.tokens_per_s),
        format_seconds(estimate.ttft_s),
        format_seconds(estimate.tpot_s),
    )
