"""`plan --why`: what would relieve the bottleneck and what each device adds, in 80 columns."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_summary import SPEED
from apportion.planner.explain.why import Why
from apportion.planner.weigh import Division
from apportion.types.plan import Plan
from apportion.types.units import three_digits


def print_why(console: Console, plan: Plan, why: Why) -> None:
    reliefs = Table(title=f"What would help, planned again ({SPEED})", title_justify="left")
    reliefs.add_column("change")
    reliefs.add_column("tokens/s", justify="right")
    reliefs.add_column("objective better by", justify="right")
    for relief in why.reliefs:
        gain = f"{relief.gain:.1%}" if relief.gain >= 0.0005 else "nothing"
        reliefs.add_row(escape(relief.change), three_digits(relief.tokens_per_s), gain)
    console.print(reliefs)
    console.print(_device_table(plan, why))
    if any(part.division for part in why.left_out):
        console.print("with a device left out: the best division that uses it")


def _device_table(plan: Plan, why: Why) -> Table:
    table = Table(title=f"What each device adds ({SPEED})", title_justify="left")
    table.add_column("device")
    for column in ("tokens/s with", "without", "objective without it"):
        table.add_column(column, justify="right")
    ours = three_digits(plan.estimate.tokens_per_s)
    for part in why.losses:
        table.add_row(escape(part.device_id), ours, _tokens_per_s(part.division), _worse(plan, part.division))
    table.add_section()
    for part in why.left_out:
        name = escape(f"{part.device_id} (left out)")
        table.add_row(name, _tokens_per_s(part.division), ours, _better(plan, part.division))
    return table


def _tokens_per_s(division: Division | None) -> str:
    return "no division" if division is None else three_digits(division.estimate.tokens_per_s)


def _worse(plan: Plan, without: Division | None) -> str:
    """Of losing a device in use."""
    if without is None:
        return "nothing fits"
    ratio = without.value / plan.certificate.value
    return f"{ratio:.2f}× the time"


def _better(plan: Plan, forced: Division | None) -> str:
    """Of the plan against one that must use the device."""
    if forced is None:
        return "not usable"
    return f"{plan.certificate.value / forced.value:.2f}× the time"
