"""`apportion export`: a plan in the terms of another engine."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.asked.for_engine import engine_named
from apportion.cli import options

if TYPE_CHECKING:
    from apportion.export.launch import Export
    from apportion.types.plan import Plan

ENGINE_NAMES = "vllm, sglang, llama.cpp, ollama, accelerate, exllamav3 or mlx"


def export(
    file: Annotated[Path, typer.Argument(help="A plan, as `plan --out` wrote it.")],
    to: Annotated[str, typer.Option("--to", metavar="ENGINE", help=f"{ENGINE_NAMES}.")],
    replica: options.Replica = None,
) -> None:
    """Print a plan as another engine's commands.

    What that engine cannot execute is planned again, and what that costs is said beside them. Of a plan with several
    replicas each is printed, or the one that is named."""
    from apportion.planner.plan_file import one_pipeline, read_planned
    from apportion.types.replicated import ReplicatedPlan

    engine = engine_named(to, "--to")
    planned = read_planned(file)
    if isinstance(planned, ReplicatedPlan) and replica is None and engine != "accelerate":
        for number, one in enumerate(planned.replicas):
            sequences = one.workload.concurrency
            sys.stdout.write(f"# replica {number}: {sequences} of {planned.workload.concurrency} sequences\n")
            _export(one, engine)
    else:
        _export(one_pipeline(planned, replica, str(file)), engine)


def _export(plan: "Plan", engine: str) -> None:
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.engines import export as export_plan
    from apportion.export.weights import model_place

    exported = export_plan(plan, engine, EnginePlanner())
    notes = [f"# {note}\n" for note in exported.notes]
    if exported.device_map is not None:
        # JSON has no comments, and must be loadable as it is.
        sys.stderr.write("".join(notes))
        sys.stdout.write(json.dumps(exported.device_map, indent=2) + "\n")
    else:
        what, place = model_place(plan, engine)
        assigned = f"# MODEL: {what}\nMODEL=${{MODEL:-{shlex.quote(place)}}}\n"
        sys.stdout.write(assigned + _script(exported) + "".join(notes))


def _script(exported: "Export") -> str:
    hosts = {launch.host for launch in exported.launches}
    lines: list[str] = []
    for name, text in exported.files.items():
        # Unquoted, so that the shell puts in $MODEL.
        lines.append(f"cat > {name} <<END\n{text}END")
    for launch in exported.launches:
        if len(hosts) > 1:
            lines.append(f"# on {launch.host}")
        lines.append(launch.shell())
    return "\n".join(lines) + "\n"
