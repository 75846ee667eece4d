"""The tables of `bench`."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from apportion.cli.bench_levels import Level
from apportion.engine.report import USES
from apportion.types.plan import Plan
from apportion.types.units import format_seconds, spoken_seconds, three_digits


def print_ceiling(console: Console, plan: Plan, ceiling: Mapping[str, float]) -> None:
    for device_id, rate in ceiling.items():
        emulated = " (emulated)" if plan.cluster.device(device_id).emulated else ""
        console.print(f"ceiling: {device_id}{emulated} reads {_giga(rate)} GB/s of memory")


def print_levels(console: Console, levels: Sequence[Level]) -> None:
    console.print(_speed_table(levels))
    console.print(_use_table(levels))


def _speed_table(levels: Sequence[Level]) -> Table:
    table = Table(title="Speed, and × of the prediction")
    for column in (
        "at once",
        "first token",
        "a token",
        "tokens/s",
        "decode tokens/s",
        "prefill tokens/s",
        "coordinator",
    ):
        table.add_column(column, justify="right")
    for level in levels:
        seen, expected = level.measured, level.predicted
        table.add_row(
            str(level.concurrency),
            f"{spoken_seconds(seen.ttft_s)} {_ratio(seen.ttft_s, expected.ttft_s)}",
            f"{spoken_seconds(seen.tpot_s)} {_ratio(seen.tpot_s, expected.tpot_s)}",
            f"{three_digits(seen.tokens_per_s)} {_ratio(seen.tokens_per_s, expected.tokens_per_s)}",
            three_digits(level.decode_tokens_per_s),
            three_digits(level.prefill_tokens_per_s),
            f"{format_seconds(level.coordinator_s)}/step",
        )
    return table


def _use_table(levels: Sequence[Level]) -> Table:
    table = Table(
        title="Where each device's time went, and the weights that it read while computing decode steps"
    )
    for column in ("at once", "stage", "device", *USES, "weights", "of ceiling"):
        table.add_column(column, justify="right")
    for level in levels:
        for device in level.devices:
            shares = (f"{device.share[use]:.1%}" for use in USES)
            rate = f"{_giga(device.weights_bytes_per_s)} GB/s"
            table.add_row(
                str(level.concurrency),
                str(device.stage),
                device.id,
                *shares,
                rate,
                f"{device.of_ceiling:.0%}",
            )
        table.add_section()
    return table


def _giga(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f}"


def _ratio(seen: float, expected: float) -> str:
    return f"×{seen / expected:.2f}" if expected else ""
