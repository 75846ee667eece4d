"""What the catalogue knows, as a table in 80 columns."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.render_summary import counted


def print_catalogue(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[tuple[str, ...]],
    sources: Mapping[str, Sequence[str]],
    *,
    what: str,
    text: str | None,
    plan: str,
) -> None:
    """`plan` is the command that plans with the first, with {} for its name."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for name, read in sources.items():
        console.print(escape(f"{name}: {'; '.join(read)}"), highlight=False, soft_wrap=True)
    called = f" called like '{text}'" if text else ""
    for line in (f"{counted(len(rows), what, 's')}{called}", f"plan one with: {plan.format(rows[0][0])}"):
        console.print(escape(line), highlight=False, soft_wrap=True)
