"""`apportion whatif`: a plan's problem with changes, planned again and set beside it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.cli import options
from apportion.types.errors import ClusterError

if TYPE_CHECKING:
    from apportion.planner.explain.whatif import LinkChange
    from apportion.types.cluster import Cluster, Device


PlanFile = Annotated[Path, typer.Argument(help="A plan, as `plan --out` wrote it.")]
Remove = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=options.DEVICES_PANEL,
        help="A device to do without. May be repeated.",
    ),
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=options.DEVICES_PANEL,
        help='A device as for --devices, like "old=cpu:600MiB@0.5"; where the plan has several hosts, with its host '
        'before it: "tower:old=cpu:600MiB". May be repeated.',
    ),
]
LinkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--link",
        metavar="LINK",
        rich_help_panel=options.DEVICES_PANEL,
        help='Another bandwidth between two hosts, like "tower-laptop=10Gbit". May be repeated.',
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures, reasons and plan as JSON.")]


def whatif(
    file: PlanFile,
    remove: Remove = None,
    add: Add = None,
    link: LinkOption = None,
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    weights: options.Weights = None,
    kv_format: options.KvFormat = None,
    replica: options.Replica = None,
    as_json: AsJson = False,
) -> None:
    """Plan again with other devices, links or demands."""
    from rich.console import Console

    from apportion.cli.render_whatif import print_whatif, whatif_json
    from apportion.cli.weights import changed_formats
    from apportion.planner.explain.whatif import Changes, what_if
    from apportion.planner.plan_file import read_plan

    before = read_plan(file, replica)
    changes = Changes(
        remove=tuple(remove or ()),
        add=tuple(device for text in add or () for device in _devices(text, before.cluster)),
        links=tuple(_link(text) for text in link or ()),
        context_tokens=context,
        concurrency=concurrency,
        weight_formats=changed_formats(before.model, weights),
        kv_format=None if kv_format is None else kv_format.value,
    )
    after = what_if(before, changes)
    if as_json:
        sys.stdout.write(whatif_json(before, after))
    else:
        print_whatif(Console(), before, after)


def _devices(text: str, cluster: "Cluster") -> "tuple[Device, ...]":
    """Devices written as for --devices, on the host named before them or the only one there is.

    A CPU shares this machine's cores with the CPUs that its host has already.
    """
    from dataclasses import replace

    from apportion.catalog.cluster_text import parse_devices
    from apportion.probe.local import all_local_devices

    hosts = list(dict.fromkeys(device.host for device in cluster.devices))
    named, _, rest = text.partition(":")
    if "=" in named:
        named, rest = (hosts[0] if len(hosts) == 1 else ""), text
    if named not in hosts:
        problem = f"there is no host '{named}'" if named else "the plan has several hosts"
        raise ClusterError(
            f"--add '{text}': {problem}; write it like {hosts[0]}:name=cpu:600MiB; hosts: {', '.join(hosts)}"
        )
    sharing = sum(device.kind == "cpu" and device.host == named for device in cluster.devices)
    added = parse_devices(rest, lambda number: all_local_devices(number + sharing))
    return tuple(replace(device, host=named) for device in added.devices)


def _link(text: str) -> "LinkChange":
    from apportion.catalog.toml_table import TomlTable
    from apportion.planner.explain.whatif import LinkChange

    name, equals, bandwidth = text.partition("=")
    if not (name and equals and bandwidth):
        raise ClusterError(f"--link '{text}': write it like tower-laptop=10Gbit")
    table = TomlTable(f"--link '{text}'", {"bandwidth": bandwidth})
    return LinkChange(name=name.strip(), bytes_per_s=table.bandwidth())
