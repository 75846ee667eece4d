"""What a plan for another engine leaves out, because no division into whole layers says it."""

from rich.console import Console
from rich.markup import escape

from apportion.export.engines import faster_experts
from apportion.export.limits import engine_of
from apportion.types.plan import Plan
from apportion.types.units import spoken_seconds


def print_faster_way(console: Console, plan: Plan) -> None:
    """Prints the experts' division where it beats the plan, and how to have it."""
    limits, split = plan.constraints.engine, faster_experts(plan)
    if limits is None or split is None:
        return
    rate, own = (f"{one:.3g} tokens/s" for one in (split.tokens_per_s, plan.estimate.tokens_per_s))
    console.print(
        f"[bold]faster in {limits.name}:[/] {escape(split.statement)}: {rate} with the prompts' time,"
        f" {spoken_seconds(split.tpot_s)} a token, instead of {own}. That is what export prints: add --out plan.json,"
        f" then `apportion export plan.json --to {engine_of(limits)}`"
    )
