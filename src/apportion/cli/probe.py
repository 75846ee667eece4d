"""`apportion probe`: what this machine's devices and the links between its processes can do."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.types.errors import ClusterError
from apportion.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from apportion.probe.machine import Machine


def probe(
    out: Annotated[Path | None, typer.Option(help="Write a file for --cluster.")] = None,
) -> None:
    """Measure this machine's devices and host links; links to other hosts are not measured."""
    from rich.console import Console
    from rich.progress import Progress

    from apportion.probe.machine import NUM_STEPS, cluster_toml, probe_machine

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=NUM_STEPS)
        machine = probe_machine(lambda what: progress.update(task, description=what, advance=1))
    console = Console()
    console.print(_device_table(machine))
    console.print(_link_table(machine))
    console.print("A processor is measured, its 16-bit products assumed; a card's figures are its driver's.")
    console.print("Links to other hosts are not measured: write them in the cluster file.")
    if out is not None:
        try:
            out.write_text(cluster_toml(machine))
        except OSError as error:
            raise ClusterError(f"cannot write {out}: {error.strerror}") from None


def _device_table(machine: "Machine") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Devices", title_justify="left")
    table.add_column("device")
    table.add_column("hardware")
    for column in ("memory", "reads", "fp32", "16 bit"):
        table.add_column(column, justify="right")
    for device in machine.devices:
        table.add_row(
            escape(device.id),
            escape(machine.names[device.id]),
            format_bytes(device.memory_bytes),
            f"{device.mem_bytes_per_s / 1e9:.1f} GB/s",
            f"{device.flops_per_s['fp32'] / 1e9:.0f} GFLOP/s",
            f"{device.flops_per_s['bf16'] / 1e9:.0f} GFLOP/s",
        )
    return table


def _link_table(machine: "Machine") -> "Table":
    from rich.table import Table

    table = Table(title="Inside this host", title_justify="left")
    table.add_column("path")
    table.add_column("latency", justify="right")
    table.add_column("rate", justify="right")
    table.add_row("memory copy, one thread", "", f"{machine.copy_bytes_per_s / 1e9:.1f} GB/s")
    for name, rates in (("Unix socket (groups)", machine.unix_socket), ("TCP loopback", machine.loopback)):
        table.add_row(name, format_seconds(rates.latency_s), f"{rates.bytes_per_s / 1e9:.2f} GB/s")
    return table
