"""`whatif`: two plans side by side with reasons, as tables in 80 columns or as JSON."""

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_summary import SPEED
from apportion.planner.explain.whatif_reasons import (
    DeviceUse,
    Figure,
    device_names,
    device_use,
    figures,
    formatted,
    reasons,
)
from apportion.planner.plan_file import plan_json
from apportion.types.plan import Plan
from apportion.types.units import format_bytes

_SAID = {"tokens/s": SPEED}
"""Figures that JSON calls more shortly."""


def print_whatif(console: Console, before: Plan, after: Plan) -> None:
    console.print(f"[bold]{escape(before.model.name)}[/] as planned, and with the changes")
    table = Table(title="Figures", title_justify="left")
    table.add_column("figure")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for figure in figures(before, after):
        values = (formatted(value, figure.unit) for value in (figure.before, figure.after))
        table.add_row(_SAID.get(figure.name, escape(figure.name)), *values, _change(figure))
    console.print(table)
    console.print(_device_table(before, after))
    for reason in reasons(before, after):
        console.print(f"· {escape(reason)}")


def _change(figure: Figure) -> str:
    if figure.change is None:
        return "new"
    return "=" if figure.change == 0 else f"{figure.change:+.1%}"


def _device_table(before: Plan, after: Plan) -> Table:
    table = Table(title="Devices", title_justify="left")
    table.add_column("device")
    for column in ("layers, heads before", "after", "memory before", "after"):
        table.add_column(column, justify="right")
    old, new = device_use(before), device_use(after)
    for name in device_names(before, after):
        uses = (old.get(name), new.get(name))
        table.add_row(escape(name), *map(_layers, uses), *map(_memory, uses))
    return table


def _layers(use: DeviceUse | None) -> str:
    return "–" if use is None else f"{use.layers}, {use.heads}"


def _memory(use: DeviceUse | None) -> str:
    return "–" if use is None else format_bytes(use.memory_bytes)


def whatif_json(before: Plan, after: Plan) -> str:
    """The figures, the reasons and the new plan."""
    old, new = device_use(before), device_use(after)
    document = {
        "figures": {
            figure.name: {"unit": figure.unit, "before": figure.before, "after": figure.after}
            for figure in figures(before, after)
        },
        "devices": {
            name: {"before": _use_json(old.get(name)), "after": _use_json(new.get(name))}
            for name in device_names(before, after)
        },
        "bottleneck": {"before": before.estimate.bottleneck, "after": after.estimate.bottleneck},
        "reasons": reasons(before, after),
        "plan": json.loads(plan_json(after)),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _use_json(use: DeviceUse | None) -> dict[str, str | int] | None:
    if use is None:
        return None
    return {"layers": use.layers, "kv_heads": use.heads, "memory_bytes": use.memory_bytes}
