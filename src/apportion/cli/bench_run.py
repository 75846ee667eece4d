"""Executes `bench`: the ceiling, then the rounds, interleaved over the concurrencies, so that a drift of the machine's
speed falls on all alike."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apportion.cli.bench_choices import Measured
from apportion.cli.bench_levels import Bench, Level, Round, level
from apportion.cli.bench_render import print_ceiling, print_levels
from apportion.cli.generate import keep_measurements
from apportion.cli.render import print_plan
from apportion.cli.stop_signals import check_stop_signals
from apportion.engine.ceiling import read_bytes_per_s
from apportion.engine.engine import Engine
from apportion.engine.trace import Trace
from apportion.types.files import write_file
from apportion.types.plan import Plan

_FILE_WIDTH = 120
"""Of tables where no terminal says how wide it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """The last line of `bench --json`, whose keys are stable. `ceiling_bytes_per_s` by device id."""

    model: str
    weight_format: str
    random_weights: bool
    prompt_tokens: int
    output_tokens: int
    rounds: int
    ceiling_bytes_per_s: dict[str, float]
    levels: list[Level]


def run_bench(plan: Plan, folder: Path, measured: Measured, *, random_weights: bool) -> BenchResult:
    """Tables go to stdout; `folder` may be a config.json where the weights are random. Every worker has ended when this
    returns or raises."""
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    print_plan(console, plan, details=measured.details)
    trace = Trace(plan) if measured.trace_file is not None else None
    with Engine(
        plan,
        folder,
        [],
        random_weights=random_weights,
        trace=trace is not None,
        while_waiting=check_stop_signals,
    ) as engine:
        ceiling = _ceiling(plan)
        print_ceiling(console, plan, ceiling)
        rounds = _rounds(Bench(engine, measured.lengths, check_stop_signals), measured, trace)
    levels = [level(plan, rounds[num], measured.lengths, ceiling) for num in measured.levels]
    print_levels(console, levels)
    for num in measured.levels:
        quietest = min(rounds[num], key=lambda one: one.conditions.others_share)
        keep_measurements(
            console, plan, quietest.reports, quietest.timing.tpot_s if num == 1 else None, quietest.conditions
        )
    if measured.trace_file is not None and trace is not None:
        write_file(measured.trace_file, json.dumps(trace.document()), "--trace")
    return BenchResult(
        model=plan.model.name,
        weight_format=plan.stages[0].weight_format,
        random_weights=random_weights,
        prompt_tokens=measured.lengths.prompt_tokens,
        output_tokens=measured.lengths.output_tokens,
        rounds=measured.rounds,
        ceiling_bytes_per_s=ceiling,
        levels=levels,
    )


def _rounds(bench: Bench, measured: Measured, trace: Trace | None) -> dict[int, list[Round]]:
    """By concurrency."""
    bench.warm_up()
    rounds: dict[int, list[Round]] = {num: [] for num in measured.levels}
    for _ in range(measured.rounds):
        for num in measured.levels:
            one = bench.round(num)
            rounds[num].append(one)
            if trace is not None:
                trace.add(one.reports, one.coordinator_spans)
    return rounds


def _ceiling(plan: Plan) -> dict[str, float]:
    cores = frozenset(os.sched_getaffinity(0))
    return {
        device_id: read_bytes_per_s(plan.cluster.device(device_id), cores) for device_id in plan.device_ids
    }
