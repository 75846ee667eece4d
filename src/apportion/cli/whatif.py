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
from apportion.types.names import near_names, one_of

if TYPE_CHECKING:
    from apportion.planner.explain.whatif import LinkChange
    from apportion.types.cluster import Cluster, Device, Link


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
        help="Devices as for --devices, like 'rtx-4070' or '2x rtx-4070'; of several hosts, or a new one, "
        "'tower: rtx-4070'. Repeat.",
    ),
]
LinkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--link",
        metavar="LINK",
        rich_help_panel=options.DEVICES_PANEL,
        help='Other figures of the link between two hosts, or one between hosts that have none: "tower-laptop 10Gbit '
        '0.2ms". Repeat.',
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

    from apportion.asked.for_engine import maker
    from apportion.asked.weights import changed_formats, with_asked_weights
    from apportion.cli.render_whatif import print_whatif, whatif_json
    from apportion.planner.explain.whatif import Changes, changed_cluster, what_if
    from apportion.planner.plan_file import read_plan

    before = read_plan(file, replica)
    if before.model.stored is None:
        before = replace(before, model=with_asked_weights(before.model, weights))
    added, inside = _added(add or (), before.cluster)
    joined, links = _links(link or (), before.cluster, added, inside)
    changes = Changes(
        remove=tuple(one for name in remove or () for one in named_devices(before.cluster, name, "--remove")),
        add=added,
        join=joined,
        links=links,
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
    after = what_if(before, changes, maker(before))
    if as_json:
        sys.stdout.write(whatif_json(before, after))
    else:
        print_whatif(Console(), before, after)


def _added(texts: Sequence[str], cluster: "Cluster") -> "tuple[tuple[Device, ...], tuple[Link, ...]]":
    """And the links inside hosts that are new."""
    hosts = {device.host for device in cluster.devices}
    found: list[Device] = []
    inside: list[Link] = []
    for text in texts:
        devices, links = _devices(text, replace(cluster, devices=(*cluster.devices, *found)))
        found += devices
        inside += [link for link in links if link.src not in {*hosts, *(one.src for one in inside)}]
    return tuple(found), tuple(inside)


def _devices(text: str, cluster: "Cluster") -> "tuple[tuple[Device, ...], tuple[Link, ...]]":
    """Devices written as for --devices, on the host named before them or the only one there is; without a name of their
    own they are called what they are, with a number where that is taken. Beside them the links inside their hosts.

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
        parsed = parse_devices(rest if host else text, lambda number: all_local_devices(number + sharing))
    except ClusterError as error:
        raise ClusterError(str(error).replace("--devices", "--add", 1)) from None
    added = parsed.devices
    new_host = any(device.host != LOCAL_HOST for device in added)
    if host is None and not new_host and len(hosts) > 1:
        ways = " or ".join(f"{name}:{text}" for name in hosts[:3])
        raise ClusterError(f"--add '{text}': the plan has several hosts; write {ways}")
    taken = {device.id for device in cluster.devices}
    names = [device.id for device in added] if "=" in text else _free_names(added, taken)
    placed = tuple(
        replace(device, id=name, host=device.host if new_host else host or hosts[0])
        for device, name in zip(added, names, strict=True)
    )
    return placed, tuple(link for link in parsed.links if link.src == link.dst and new_host)


def _free_names(added: "Sequence[Device]", taken: set[str]) -> list[str]:
    """As the devices are called, or where any of these names is taken with the next numbers."""
    names = [device.id for device in added]
    if not taken.intersection(names):
        return names
    base = names[0].removesuffix("-1") if len(names) > 1 else names[0]
    numbers = (number for number in count(2) if f"{base}-{number}" not in taken)
    return [f"{base}-{next(numbers)}" for _ in names]


def _links(
    texts: Sequence[str], cluster: "Cluster", added: "Sequence[Device]", inside: "Sequence[Link]"
) -> "tuple[tuple[Link, ...], tuple[LinkChange, ...]]":
    """What joins hosts that no link joins so far, and what changes of the others. Raises ClusterError, as for a host
    that is new and that nothing joins."""
    from apportion.catalog.cluster_rules import of_engine
    from apportion.catalog.device_text import link_of
    from apportion.catalog.link_text import read_link
    from apportion.planner.explain.whatif import LinkChange

    devices = (*cluster.devices, *added)
    hosts = list(dict.fromkeys(device.host for device in devices))
    joined = {frozenset((link.src, link.dst)) for link in (*cluster.links, *inside)}
    new: list[Link] = list(inside)
    changes: list[LinkChange] = []
    for text in texts:
        place, words = f"--link '{text}'", text.strip().removeprefix("link ").strip()
        src, dst, figures = read_link(place, words, hosts, [device.id for device in devices])
        if figures.bytes_per_s is None and figures.latency_s is None:
            raise ClusterError(f"{place}: write it like {src}-{dst} 10Gbit 0.2ms")
        if {src, dst} <= set(hosts) and frozenset((src, dst)) not in joined:
            if figures.bytes_per_s is None:
                raise ClusterError(f"{place}: nothing joins them so far; give its bandwidth too, like 1Gbit")
            new.append(of_engine(link_of(src, dst, figures.bytes_per_s, figures.latency_s), devices))
            joined.add(frozenset((src, dst)))
        else:
            changes.append(
                LinkChange(name=f"{src}-{dst}", bytes_per_s=figures.bytes_per_s, latency_s=figures.latency_s)
            )
    _check_reached(cluster, added, new)
    return tuple(new), tuple(changes)


def _check_reached(cluster: "Cluster", added: "Sequence[Device]", new: "Sequence[Link]") -> None:
    """Raises ClusterError for a new host without a link to another."""
    hosts = list(dict.fromkeys(device.host for device in cluster.devices))
    for host in dict.fromkeys(device.host for device in added):
        if host in hosts or any(host in (link.src, link.dst) and link.src != link.dst for link in new):
            continue
        near = near_names(host, hosts)
        meant = f"; did you mean {one_of(near)}?" if near else ""
        raise ClusterError(
            f"--add: host '{host}' is new, and no link joins it to {one_of(hosts)}: add --link '{hosts[0]}-{host} 1Gbit"
            f" 0.3ms', with its figures{meant}"
        )
