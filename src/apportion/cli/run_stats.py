"""The figures of a finished run beside the plan's: the content of `run --stats-json` and of the closing table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from apportion.cli.prediction import Speed, predicted_speed
from apportion.cost.traffic import run_link_bytes
from apportion.engine.report import WorkerReport
from apportion.engine.timing import Timing
from apportion.types.metrics import SchedulerMetrics
from apportion.types.plan import Plan
from apportion.types.request import Request
from apportion.types.step_costs import PreemptMode
from apportion.types.units import format_bytes, format_seconds, spoken_seconds, three_digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One sample of one prompt, both counted from 0; `cached_tokens` of the prompt came from the prefix cache."""

    text: str
    token_ids: list[int]
    prompt: int
    sample: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkBytes:
    src: str
    dst: str
    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    id: str
    budget_bytes: int
    planned_bytes: int
    peak_bytes: int
    read_bytes: int
    streamed_bytes: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """`run --stats-json`, whose keys are stable."""

    outputs: list[Output]
    measured: Speed
    predicted: Speed
    links: list[LinkBytes]
    devices: list[DeviceUse]
    scheduler: SchedulerMetrics


def run_stats(
    plan: Plan,
    outputs: list[Output],
    requests: Sequence[Request],
    timing: Timing,
    sent_bytes: dict[tuple[str, str], int],
    reports: dict[str, WorkerReport],
    metrics: SchedulerMetrics,
    preempt: PreemptMode,
) -> RunStats:
    """Bytes are predicted for what was computed: cached tokens are not, those that had to make room are twice. Speed is
    predicted for the requests, all samples of one as long as its longest."""
    output_tokens = [len(output.token_ids) for output in outputs]
    computed = [
        len(requests[output.prompt].prompt_ids) - output.cached_tokens
        for output in outputs
        if output.sample == 0
    ]
    computed.append(metrics.preemptions.recomputed_tokens)
    further = sum(output.sample > 0 for output in outputs)
    predicted_bytes = run_link_bytes(plan, computed, output_tokens, further_samples=further)
    return RunStats(
        outputs=outputs,
        measured=Speed.of(timing),
        predicted=predicted_speed(plan, as_long(requests, outputs), preempt),
        links=[
            LinkBytes(
                src=src,
                dst=dst,
                predicted_bytes=predicted_bytes.get((src, dst), 0),
                measured_bytes=sent_bytes.get((src, dst), 0),
            )
            for src, dst in sorted(predicted_bytes.keys() | sent_bytes.keys())
        ],
        devices=[_device_use(plan, reports[device_id]) for device_id in plan.device_ids],
        scheduler=metrics,
    )


def as_long(requests: Sequence[Request], outputs: Sequence[Output]) -> list[Request]:
    """The requests, each asking for as many tokens as its longest sample drew."""
    longest = [0] * len(requests)
    for output in outputs:
        longest[output.prompt] = max(longest[output.prompt], len(output.token_ids))
    return [
        replace(request, sampling=replace(request.sampling, max_tokens=num))
        for request, num in zip(requests, longest, strict=True)
    ]


def _device_use(plan: Plan, report: WorkerReport) -> DeviceUse:
    return DeviceUse(
        id=report.device_id,
        budget_bytes=plan.cluster.device(report.device_id).usable_bytes,
        planned_bytes=plan.memory[report.device_id].engine_bytes,
        peak_bytes=report.peak_bytes,
        read_bytes=report.read_bytes,
        streamed_bytes=report.streamed_bytes,
        parameters=report.parameters,
    )


def print_run(console: Console, stats: RunStats, *, details: bool = False) -> None:
    console.print()
    console.print(_speed_table(stats))
    if details:
        if stats.links:
            console.print(_link_table(stats))
        console.print(_device_table(stats))
    else:
        for line in _kept(stats):
            console.print(line, highlight=False)
    if rows := _block_rows(stats.scheduler):
        console.print(_block_table(rows))


def _speed_table(stats: RunStats) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in ("", "measured", "predicted", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    measured, predicted = stats.measured, stats.predicted
    rows = [
        ("first token", measured.ttft_s, predicted.ttft_s, spoken_seconds),
        ("every further token", measured.tpot_s, predicted.tpot_s, spoken_seconds),
        ("tokens/s, prompts included", measured.tokens_per_s, predicted.tokens_per_s, three_digits),
    ]
    for name, seen, expected, form in rows:
        table.add_row(name, form(seen), form(expected), f"{seen / expected:.2f}" if expected else "-")
    return table


def _kept(stats: RunStats) -> Iterator[str]:
    """Whether links and memory were as planned, in a line each."""
    if stats.links:
        measured, predicted = (
            sum(link.measured_bytes for link in stats.links),
            sum(link.predicted_bytes for link in stats.links),
        )
        exact = all(link.measured_bytes == link.predicted_bytes for link in stats.links)
        yield f"links carried {measured:,} bytes, " + (
            "as predicted" if exact else f"predicted {predicted:,}"
        )
    if stats.devices:
        fullest = max(stats.devices, key=lambda device: device.peak_bytes / device.planned_bytes)
        yield (
            f"memory: at most {fullest.peak_bytes / fullest.planned_bytes:.0%} of what was planned "
            f"({escape(fullest.id)}: {format_bytes(fullest.peak_bytes)} of {format_bytes(fullest.planned_bytes)})"
        )


def _link_table(stats: RunStats) -> Table:
    table = Table(title="Bytes on each link")
    table.add_column("from → to")
    table.add_column("measured", justify="right")
    table.add_column("predicted", justify="right")
    for link in stats.links:
        table.add_row(f"{link.src} → {link.dst}", f"{link.measured_bytes:,}", f"{link.predicted_bytes:,}")
    return table


def _device_table(stats: RunStats) -> Table:
    table = Table(title="Memory of each worker")
    table.add_column("device")
    streams = any(device.streamed_bytes for device in stats.devices)
    for column in ("peak", "planned", "budget", "read from disk", *(["streamed"] if streams else [])):
        table.add_column(column, justify="right")
    for device in stats.devices:
        sizes = [device.peak_bytes, device.planned_bytes, device.budget_bytes, device.read_bytes]
        sizes += [device.streamed_bytes] if streams else []
        table.add_row(device.id, *(format_bytes(size) for size in sizes))
    return table


def _block_rows(metrics: SchedulerMetrics) -> list[tuple[str, str]]:
    """What happened to KV blocks beyond being filled; [] where nothing did."""
    counts = metrics.preemptions
    rows = [
        ("prompt tokens found in the prefix cache", metrics.cached_tokens, f"{metrics.cached_tokens:,}"),
        ("blocks saved by sharing, at most", metrics.peak_saved_blocks, f"{metrics.peak_saved_blocks:,}"),
        ("blocks copied before a write", metrics.copied_blocks, f"{metrics.copied_blocks:,}"),
        ("cached blocks evicted", metrics.evicted_blocks, f"{metrics.evicted_blocks:,}"),
        (
            "sequences swapped out",
            counts.num_swaps,
            f"{counts.num_swaps:,} ({format_bytes(counts.swapped_bytes)}, {format_seconds(counts.swap_s)}"
            " by the model)",
        ),
        (
            "sequences dropped to recompute",
            counts.num_recomputes,
            f"{counts.num_recomputes:,} ({counts.recomputed_tokens:,} tokens, {format_seconds(counts.recompute_s)}"
            " by the model)",
        ),
    ]
    return [(name, shown) for name, count, shown in rows if count]


def _block_table(rows: list[tuple[str, str]]) -> Table:
    table = Table(title="KV blocks", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table
