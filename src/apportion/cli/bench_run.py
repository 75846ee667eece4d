"""Executes `bench`: the ceiling, then the rounds, interleaved over the concurrencies, so that a drift of the machine's
speed falls on all alike."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apportion.cli.bench_levels import Bench, Lengths, Level, Round, level
from apportion.cli.bench_render import print_ceiling, print_levels
from apportion.cli.generate import StopSignals, keep_measurements
from apportion.cli.render import print_plan
from apportion.runtime.ceiling import read_bytes_per_s
from apportion.runtime.engine import Engine
from apportion.runtime.trace import Trace
from apportion.types.errors import UsageError
from apportion.types.plan import Plan

_FILE_WIDTH = 120
"""Of tables where no terminal says how wide it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """`folder` may be a config.json where the weights are random."""

    plan: Plan
    folder: Path
    random_weights: bool
    levels: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    rounds: int
    trace_file: Path | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """The last line of `bench`, whose keys are stable. `ceiling_bytes_per_s` by device id."""

    model: str
    weight_format: str
    random_weights: bool
    prompt_tokens: int
    output_tokens: int
    rounds: int
    ceiling_bytes_per_s: dict[str, float]
    levels: list[Level]


def run_bench(job: BenchRun) -> BenchResult:
    """Tables go to stdout. Every worker has ended when this returns or raises."""
    plan, console = job.plan, Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    print_plan(console, plan)
    stop_signals = StopSignals()
    lengths = Lengths(
        prompt_tokens=job.prompt_tokens, output_tokens=job.output_tokens, vocab_rows=plan.model.vocab_rows
    )
    tracing = job.trace_file is not None
    with Engine(plan, job.folder, [], random_weights=job.random_weights, trace=tracing) as engine:
        ceiling = _ceiling(plan)
        print_ceiling(console, plan, ceiling)
        bench, trace = Bench(engine, lengths, stop_signals.check), Trace(plan)
        bench.warm_up()
        engine.meter.take_spans()
        rounds: dict[int, list[Round]] = {num: [] for num in job.levels}
        for _ in range(job.rounds):
            for num in job.levels:
                one = bench.round(num)
                rounds[num].append(one)
                trace.add(one.reports, engine.meter.take_spans())
    levels = [level(plan, rounds[num], lengths, ceiling) for num in job.levels]
    print_levels(console, levels)
    for num in job.levels:
        last = rounds[num][-1]
        keep_measurements(console, plan, last.reports, last.timing.tpot_s if num == 1 else None)
    if job.trace_file is not None:
        _write_trace(job.trace_file, trace)
    return BenchResult(
        model=plan.model.name,
        weight_format=plan.stages[0].weight_format,
        random_weights=job.random_weights,
        prompt_tokens=job.prompt_tokens,
        output_tokens=job.output_tokens,
        rounds=job.rounds,
        ceiling_bytes_per_s=ceiling,
        levels=levels,
    )


def _ceiling(plan: Plan) -> dict[str, float]:
    cores = frozenset(os.sched_getaffinity(0))
    return {
        device_id: read_bytes_per_s(plan.cluster.device(device_id), cores) for device_id in plan.device_ids
    }


def _write_trace(file: Path, trace: Trace) -> None:
    try:
        file.write_text(json.dumps(trace.document()))
    except OSError as error:
        raise UsageError(f"cannot write --trace {file}: {error.strerror}") from None
