"""`apportion probe`: what this machine's devices can do, and the links inside it and to other machines."""

import os
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.types.cluster import LOCAL_HOST
from apportion.types.errors import UsageError
from apportion.types.files import check_writable, write_file
from apportion.types.text_file import read_text
from apportion.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from apportion.probe.channel import Address
    from apportion.probe.host_rates import LinkRates
    from apportion.probe.machine import Machine
    from apportion.probe.network import Network
    from apportion.probe.watch import Conditions


def probe(
    hosts: Annotated[
        str | None,
        typer.Option(
            help='Other machines that run `probe --listen`, like "tower=10.0.0.3, laptop=10.0.0.4".'
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Answer other machines' probes here, until Ctrl-C."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the secret that the machines share, 16 characters or more; - reads it from stdin. "
            "Default: the environment's APPORTION_KEY."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a file for --cluster.")] = None,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Take as long as it needs, instead of 15 seconds.")
    ] = False,
) -> None:
    """Measure this machine's devices and links.

    With --hosts those of other machines too, and the network between."""
    key = _key(key_file)
    if listen is not None:
        if hosts is not None or out is not None:
            raise UsageError("--listen only answers: give --hosts and --out on the machine that asks")
        _listen(listen, key)
        return
    check_writable(out, "--out")
    addresses = _addresses(hosts)
    machines, network, conditions = _measured(addresses, key, thorough=thorough)
    _show(machines, network)
    _save(machines[LOCAL_HOST], conditions)
    if out is not None:
        _write(machines, network, out)


def _key(file: Path | None) -> str:
    """Never from the command line, which everybody on a machine can read. Raises UsageError."""
    if file is None:
        return os.environ.get("APPORTION_KEY", "")
    try:
        return (sys.stdin.read() if str(file) == "-" else read_text(file)).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --key-file {file}: {error}") from None


def _listen(listen: str, key: str) -> None:
    from apportion.probe.channel import parse_address
    from apportion.probe.listen import listening, serve

    address = parse_address(listen)
    with listening(address, key) as server:
        typer.echo(f"listening on {address[0]}:{server.getsockname()[1]}; Ctrl-C ends it", err=True)
        serve(server, key, lambda line: typer.echo(line, err=True))


def _addresses(hosts: str | None) -> "dict[str, Address]":
    from apportion.probe.channel import parse_address

    addresses: dict[str, Address] = {}
    for part in (hosts or "").split(",") if hosts is not None else ():
        name, _, address = (piece.strip() for piece in part.partition("="))
        if not name.isprintable() or name in ("", LOCAL_HOST, *addresses) or '"' in name or "\\" in name:
            raise UsageError(f"--hosts: '{part.strip()}' is not NAME=ADDRESS with a name of its own")
        addresses[name] = parse_address(address or name)
    return addresses


def _measured(
    addresses: "Mapping[str, Address]", key: str, *, thorough: bool
) -> "tuple[dict[str, Machine], Network, Conditions]":
    """And how busy others kept this machine while it was measured."""
    from rich.console import Console
    from rich.progress import Progress

    from apportion.probe.machine import NUM_STEPS, probe_machine
    from apportion.probe.network import num_steps, probe_network
    from apportion.probe.watch import Watch

    console, total = Console(stderr=True), NUM_STEPS + num_steps(len(addresses))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task, steps = progress.add_task("", total=total), count(1)

        def begin(what: str) -> None:
            progress.update(task, description=what, advance=1)
            if not console.is_terminal:
                console.print(f"measuring, {next(steps)} of {total}: {what}", highlight=False, markup=False)

        network = probe_network(addresses, key, begin)
        watch = Watch()
        machine = probe_machine(begin, thorough=thorough)
        return {LOCAL_HOST: machine, **network.machines}, network, watch.conditions()


def _save(machine: "Machine", conditions: "Conditions") -> None:
    """For the plans that follow; a file that cannot be written is a warning."""
    from apportion.probe.saved import probe_file, save_rates

    if conditions.busy:
        typer.echo(
            f"{conditions.statement}: plans do not start from these rates; probe again when it is quiet."
        )
    if not machine.products_measured:
        return
    try:
        save_rates(machine.threads, machine.disk_bytes_per_s, conditions)
    except OSError as error:
        typer.echo(f"probe {probe_file()} cannot be written: {error.strerror}", err=True)
        return
    if conditions.busy:
        typer.echo(
            f"{conditions.statement}: plans do not start from these rates; probe again when it is quiet."
        )
    else:
        typer.echo(f"Plans for this machine's processor start from these rates: {probe_file()}")


def _write(machines: "Mapping[str, Machine]", network: "Network", out: Path) -> None:
    from apportion.probe.cluster_file import cluster_toml

    write_file(out, cluster_toml(machines, network.links), "--out")


def _show(machines: "Mapping[str, Machine]", network: "Network") -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for host, machine in machines.items():
        console.print(_device_table(host, machine))
        console.print(_link_table(host, machine))
    console.print("A processor is measured; a card's figures are its driver's.")
    for host, machine in machines.items():
        if not machine.products_measured:
            console.print(
                f"Products of 16-bit and int8 weights of {escape(host)} are assumed: torch is missing, or they are "
                "being compiled for the first time; --thorough waits for them."
            )
    if len(machines) == 1:
        console.print(
            "Links to other hosts are not measured: name them with --hosts, or write them in the file."
        )
        return
    console.print(_network_table(network))
    for (src, dst), reason in network.missing.items():
        console.print(
            f"{src} cannot measure {dst} ({reason}): the link between them is left out", markup=False
        )


def _device_table(host: str, machine: "Machine") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"Devices of {host}"), title_justify="left")
    table.add_column("device")
    table.add_column("hardware", overflow="fold")
    for column in ("memory", "reads", "fp32", "16 bit", "int8"):
        table.add_column(column, justify="right")
    for device in machine.devices:
        table.add_row(
            escape(device.id),
            escape(machine.names[device.id]),
            format_bytes(device.memory_bytes),
            f"{device.mem_bytes_per_s / 1e9:.1f} GB/s",
            f"{device.flops_per_s['fp32'] / 1e9:.0f} GFLOP/s",
            f"{device.flops_per_s['bf16'] / 1e9:.0f} GFLOP/s",
            f"{device.flops_per_s['int8'] / 1e9:.0f} GFLOP/s",
        )
    return table


def _link_table(host: str, machine: "Machine") -> "Table":
    from rich.markup import escape

    table = _rate_table(escape(f"Inside {host}"), "path")
    for threads, rates in sorted(machine.threads.items()):
        number = "one thread" if threads == 1 else f"{threads} threads together"
        table.add_row(f"weights read, {number}", "", f"{rates.read_bytes_per_s / 1e9:.1f} GB/s")
    table.add_row("memory copy, one thread", "", f"{machine.copy_bytes_per_s / 1e9:.1f} GB/s")
    if machine.disk_bytes_per_s is not None:
        table.add_row("disk, past the page cache", "", f"{machine.disk_bytes_per_s / 1e9:.1f} GB/s")
    for name, rates in (("Unix socket (groups)", machine.unix_socket), ("TCP loopback", machine.loopback)):
        _add_rates(table, name, rates)
    return table


def _network_table(network: "Network") -> "Table":
    from rich.markup import escape

    table = _rate_table("Between hosts", "link")
    for (src, dst), rates in network.links.items():
        _add_rates(table, escape(f"{src} – {dst}"), rates)
    return table


def _rate_table(title: str, first: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first)
    table.add_column("latency", justify="right")
    table.add_column("rate", justify="right")
    return table


def _add_rates(table: "Table", name: str, rates: "LinkRates") -> None:
    table.add_row(name, format_seconds(rates.latency_s), f"{rates.bytes_per_s / 1e9:.3g} GB/s")
