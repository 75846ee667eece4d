"""Executes a plan in front of a person: the plan, the text as it comes, then measured against predicted."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from apportion.calibrate.observation import PHASES, observe
from apportion.calibrate.store import add_observations, calibration_file
from apportion.cli.render import print_plan
from apportion.cli.run_stats import Output, RunStats, print_run, run_stats
from apportion.cli.stop_signals import check_stop_signals
from apportion.engine.engine import Engine
from apportion.engine.pipelines import served
from apportion.engine.report import WorkerReport
from apportion.engine.text import Text
from apportion.engine.timing import Timing
from apportion.probe.hardware import hardware_names
from apportion.probe.watch import Conditions, Watch
from apportion.types.plan import Plan
from apportion.types.request import Request, TokenEvent
from apportion.types.step_costs import PreemptMode


def generate(
    plan: Plan,
    folder: Path,
    text: Text,
    prompts: Sequence[str],
    requests: Sequence[Request],
    *,
    preempt: PreemptMode,
    details: bool = False,
) -> RunStats:
    """Text goes to stdout, everything else to stderr. Every worker has ended when this returns or raises."""
    console = Console(stderr=True)
    print_plan(console, plan, details=details)
    ran = execute([plan], folder, text, prompts, requests, preempt=preempt)
    (engine,), (timing,) = ran.engines, ran.timings
    stats = run_stats(
        plan,
        ran.outputs,
        requests,
        timing,
        engine.sent_bytes(),
        engine.reports,
        engine.scheduler.metrics(),
        preempt,
    )
    print_run(console, stats, details=details)
    alone_tpot_s = timing.tpot_s if len(requests) == 1 else None
    keep_measurements(console, plan, engine.reports, alone_tpot_s, ran.conditions)
    return stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """What pipelines did with requests that came together. `timings` and `request_ids` are by pipeline."""

    engines: Sequence[Engine]
    outputs: list[Output]
    whole: Timing
    timings: list[Timing]
    conditions: Conditions
    request_ids: list[list[int]]


def execute(
    plans: Sequence[Plan],
    folder: Path,
    text: Text,
    prompts: Sequence[str],
    requests: Sequence[Request],
    *,
    preempt: PreemptMode,
) -> Executed:
    """Streams the texts to stdout. Every worker has ended when this returns or raises."""
    terminal = Terminal(text, prompts, requests[0].n)
    number_of: dict[int, int] = {}
    with served(
        plans,
        folder,
        text.eos_token_ids,
        preempt=preempt,
        max_open=len(requests),
        while_waiting=check_stop_signals,
        placed=number_of.__setitem__,
    ) as serving:
        whole, timings, watch = Timing(), [Timing() for _ in plans], Watch()
        for event in serving.stream(requests):
            whole.record(event)
            timings[number_of[event.request_id]].record(event)
            terminal.show(event)
            check_stop_signals()
        conditions = watch.conditions()
    return Executed(
        engines=serving.engines,
        outputs=terminal.outputs(),
        whole=whole,
        timings=timings,
        conditions=conditions,
        request_ids=[sorted(i for i, number in number_of.items() if number == n) for n in range(len(plans))],
    )


def keep_measurements(
    console: Console,
    plan: Plan,
    reports: Mapping[str, WorkerReport],
    alone_tpot_s: float | None,
    conditions: Conditions,
) -> None:
    """For the next plan on this machine; what fails here is a warning, the text has been generated."""
    if conditions.busy:
        console.print(f"{conditions.statement}: the next plan learns nothing from this run", highlight=False)
    work = {
        device_id: {phase: report.phase(phase) for phase in PHASES} for device_id, report in reports.items()
    }
    seen = observe(
        plan,
        work,
        hardware_names(plan.cluster),
        run=datetime.now(UTC).isoformat(),
        alone_tpot_s=alone_tpot_s or None,
        conditions=conditions,
    )
    add_observations(calibration_file(), seen, lambda text: console.print(f"apportion: warning: {text}"))


class Terminal:
    """Streams a single text; of several, each is printed whole, in order, once it and those before it end."""

    def __init__(self, text: Text, prompts: Sequence[str], n: int) -> None:
        self._token_ids: list[list[int]] = [[] for _ in range(len(prompts) * n)]
        """Of every sample of every prompt in turn."""
        self._cached_tokens = [0] * len(self._token_ids)
        self._text = text
        self._prompts = prompts
        self._n = n
        self._stream = text.stream()
        self._finished: set[int] = set()
        self._next = 0

    def show(self, event: TokenEvent) -> None:
        index = event.request_id * self._n + event.sample
        token_ids = self._token_ids[index]
        token_ids.append(event.token_id)
        self._cached_tokens[index] = event.cached_tokens
        if len(self._token_ids) == 1:
            first = self._prompts[0] if len(token_ids) == 1 else ""
            last = "\n" if event.finish_reason else ""
            self._write(first + self._stream.push(event.token_id) + last)
        elif event.finish_reason:
            self._finished.add(index)
            self._show_finished()

    def outputs(self) -> list[Output]:
        return [
            Output(
                text=self._text.decode(token_ids),
                token_ids=token_ids,
                prompt=index // self._n,
                sample=index % self._n,
                cached_tokens=cached_tokens,
            )
            for index, (token_ids, cached_tokens) in enumerate(
                zip(self._token_ids, self._cached_tokens, strict=True)
            )
        ]

    def _show_finished(self) -> None:
        while self._next in self._finished:
            prompt, sample = divmod(self._next, self._n)
            label = f"{prompt + 1}" if self._n == 1 else f"{prompt + 1}.{sample + 1}"
            self._write(f"[{label}] {self._prompts[prompt]}")
            self._write(self._text.decode(self._token_ids[self._next]) + "\n\n")
            self._next += 1

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
