"""`apportion whatif`: a plan's problem with changes, planned again and set beside it."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apportion.asked.by_hand import named_devices, read_constraints, sizes_by_device
from apportion.cli import options
from apportion.types.errors import ClusterError
from apportion.types.names import unknown_name

if TYPE_CHECKING:
    from apportion.planner.explain.whatif import LinkChange
    from apportion.types.cluster import Cluster, Device


PlanFile = Annotated[Path, typer.Argument(help="A plan, as `plan --out` wrote it.")]
Remove = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=options.DEVICES_PANEL,
        help="A device, or a host, to do without. Repeat.",
    ),
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE",
        rich_help_panel=options.DEVICES_PANEL,
        help="Devices as for --devices, like 'rtx-4070' or '2x rtx-4070'; of several hosts 'tower:rtx-4070'. Repeat.",
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
Memory = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE=SIZE",
        rich_help_panel=options.DEVICES_PANEL,
        help="Other memory for a device: 'laptop=12GiB'. Repeat.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print figures, reasons and plan as JSON.")]


def whatif(
    file: PlanFile,
    remove: Remove = None,
    add: Add = None,
    link: LinkOption = None,
    memory: Memory = None,
    reserve: options.Reserve = None,
    stage: options.FixedStages = None,
    pin: options.Pins = None,
    exclude: options.Exclude = None,
    use_all: options.UseAll = False,
    context: options.Context = None,
    concurrency: options.Concurrency = None,
    weights: options.Weights = None,
    kv_format: options.KvFormat = None,
    replica: options.Replica = None,
    as_json: AsJson = False,
) -> None:
    """Plan again with other devices, links or demands."""
    from rich.console import Console

    from apportion.asked.weights import changed_formats, with_asked_weights
    from apportion.cli.render_whatif import print_whatif, whatif_json
    from apportion.planner.explain.whatif import Changes, changed_cluster, what_if
    from apportion.planner.plan_file import read_plan

    before = read_plan(file, replica)
    if before.model.stored is None:
        before = replace(before, model=with_asked_weights(before.model, weights))
    changes = Changes(
        remove=tuple(one for name in remove or () for one in named_devices(before.cluster, name, "--remove")),
        add=_added(add or (), before.cluster),
        links=tuple(_link(text) for text in link or ()),
        context_tokens=context,
        concurrency=concurrency,
        weight_formats=changed_formats(before.model, weights),
        kv_format=None if kv_format is None else kv_format.value,
    )
    cluster = changed_cluster(before.cluster, changes)
    changes = replace(
        changes,
        memory=sizes_by_device(cluster, memory, "--memory"),
        reserve=sizes_by_device(cluster, reserve, "--reserve"),
        constraints=read_constraints(
            before.model, cluster, stages=stage, pins=pin, excluded=exclude, use_all=use_all
        ),
    )
    after = what_if(before, changes)
    if as_json:
        sys.stdout.write(whatif_json(before, after))
    else:
        print_whatif(Console(), before, after)


def _added(texts: Sequence[str], cluster: "Cluster") -> "tuple[Device, ...]":
    found: list[Device] = []
    for text in texts:
        found += _devices(text, replace(cluster, devices=(*cluster.devices, *found)))
    return tuple(found)


def _devices(text: str, cluster: "Cluster") -> "tuple[Device, ...]":
    """Devices written as for --devices, on the host named before them or the only one there is; without a name of their
    own they are called what they are, with a number where that is taken.

    A CPU shares this machine's cores with the CPUs that its host has already.
    """
    from apportion.catalog.cluster_text import parse_devices
    from apportion.probe.local import all_local_devices
    from apportion.types.cluster import LOCAL_HOST

    hosts = list(dict.fromkeys(device.host for device in cluster.devices))
    named, colon, rest = (part.strip() for part in text.partition(":"))
    host = named if colon and named in hosts else None
    sharing = sum(device.kind == "cpu" and device.host in (host, *hosts[:1]) for device in cluster.devices)
    try:
        added = parse_devices(
            rest if host else text, lambda number: all_local_devices(number + sharing)
        ).devices
    except ClusterError as error:
        raise ClusterError(str(error).replace("--devices", "--add", 1)) from None
    elsewhere = [device.host for device in added if device.host != LOCAL_HOST]
    if elsewhere:
        raise ClusterError(f"--add '{text}': {unknown_name('host', elsewhere[0], hosts)}")
    if host is None and len(hosts) > 1:
        ways = " or ".join(f"{name}:{text}" for name in hosts[:3])
        raise ClusterError(f"--add '{text}': the plan has several hosts; write {ways}")
    taken = {device.id for device in cluster.devices}
    names = [device.id for device in added] if "=" in text else _free_names(added, taken)
    return tuple(
        replace(device, id=name, host=host or hosts[0]) for device, name in zip(added, names, strict=True)
    )


def _free_names(added: "Sequence[Device]", taken: set[str]) -> list[str]:
    """As the devices are called, or where any of these names is taken with the next numbers."""
    names = [device.id for device in added]
    if not taken.intersection(names):
        return names
    base = names[0].removesuffix("-1") if len(names) > 1 else names[0]
    numbers = (number for number in count(2) if f"{base}-{number}" not in taken)
    return [f"{base}-{next(numbers)}" for _ in names]


def _link(text: str) -> "LinkChange":
    from apportion.catalog.toml_table import TomlTable
    from apportion.planner.explain.whatif import LinkChange

    name, equals, bandwidth = text.partition("=")
    if not (name and equals and bandwidth):
        raise ClusterError(f"--link '{text}': write it like tower-laptop=10Gbit")
    table = TomlTable(f"--link '{text}'", {"bandwidth": bandwidth})
    return LinkChange(name=name.strip(), bytes_per_s=table.bandwidth())
