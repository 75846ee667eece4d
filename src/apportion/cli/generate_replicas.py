"""Executes the replicas of a plan side by side in front of a person, as generate.py executes one pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from apportion.cli.generate import execute, keep_measurements
from apportion.cli.prediction import Speed
from apportion.cli.render_replicas import print_replicas
from apportion.cli.run_stats import Output, RunStats, print_run, run_stats
from apportion.engine.engine import Engine
from apportion.engine.text import Text
from apportion.engine.timing import Timing
from apportion.probe.watch import Conditions
from apportion.types.replicated import ReplicatedPlan
from apportion.types.request import Request
from apportion.types.step_costs import PreemptMode
from apportion.types.units import three_digits


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicasStats:
    """`run --stats-json` of several replicas; one that was given no prompt has null. Keys are stable."""

    outputs: list[Output]
    measured: Speed
    """Of all together."""
    replicas: list[RunStats | None]


def generate_replicas(
    plan: ReplicatedPlan,
    folder: Path,
    text: Text,
    prompts: Sequence[str],
    requests: Sequence[Request],
    *,
    preempt: PreemptMode,
    details: bool = False,
) -> ReplicasStats:
    """Text goes to stdout, everything else to stderr. Every worker has ended when this returns or raises."""
    console = Console(stderr=True)
    print_replicas(console, plan, details=details, more=False)
    ran = execute(plan.replicas, folder, text, prompts, requests, preempt=preempt)
    stats = [
        _stats(engine, [requests[i] for i in ids], ran.outputs, timing, preempt) if ids else None
        for engine, ids, timing in zip(ran.engines, ran.request_ids, ran.timings, strict=True)
    ]
    _show(console, ran.engines, stats, ran.whole, ran.conditions, details=details)
    return ReplicasStats(outputs=ran.outputs, measured=Speed.of(ran.whole), replicas=stats)


def _stats(
    engine: Engine,
    requests: Sequence[Request],
    outputs: Sequence[Output],
    timing: Timing,
    preempt: PreemptMode,
) -> RunStats:
    """Of one replica; its outputs say which prompt of all they are of."""
    place = {request.id: number for number, request in enumerate(requests)}
    own = [replace(output, prompt=place[output.prompt]) for output in outputs if output.prompt in place]
    metrics = engine.scheduler.metrics()
    stats = run_stats(
        engine.plan, own, requests, timing, engine.sent_bytes(), engine.reports, metrics, preempt
    )
    return replace(stats, outputs=[replace(output, prompt=requests[output.prompt].id) for output in own])


def _show(
    console: Console,
    engines: Sequence[Engine],
    stats: Sequence[RunStats | None],
    whole: Timing,
    conditions: Conditions,
    *,
    details: bool,
) -> None:
    for number, (engine, one) in enumerate(zip(engines, stats, strict=True)):
        if one is None:
            console.print(f"[bold]replica {number}[/] was given no prompt")
            continue
        console.print(f"[bold]replica {number}[/]: {len(one.outputs)} outputs")
        print_run(console, one, details=details)
        keep_measurements(console, engine.plan, engine.reports, None, conditions)
    console.print(f"together {three_digits(whole.tokens_per_s)} tokens/s")
