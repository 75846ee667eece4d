"""`apportion verify`: check a plan file from the file alone."""

from pathlib import Path
from typing import Annotated

import typer


def verify(file: Annotated[Path, typer.Argument(help="A plan, as `plan --out` wrote it.")]) -> None:
    """Recompute every figure of a plan; exit code 1 if one is wrong."""
    from rich.console import Console
    from rich.markup import escape

    from apportion.cli.render import print_checks
    from apportion.planner.plan_file import read_planned
    from apportion.planner.verify.plan import verify as check_plan
    from apportion.planner.verify.replicas import verify_replicas
    from apportion.types.replicated import ReplicatedPlan

    plan = read_planned(file)
    checks = verify_replicas(plan) if isinstance(plan, ReplicatedPlan) else check_plan(plan)
    wrong = [check.name for check in checks if not check.ok]
    console = Console()
    said = (
        f"wrong in {len(wrong)} of {len(checks)} checks: {', '.join(wrong)}"
        if wrong
        else (f"right: all {len(checks)} checks, made from the file alone, agree with it")
    )
    console.print(escape(f"{file} is {said}"), highlight=False)
    print_checks(console, checks)
    if wrong:
        raise typer.Exit(1)
