"""Constraints as they are typed: `--stage a+b:3:1=0-11`, `--pin laptop=0-3`, `--exclude old`, `--reserve desk=2GiB`."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apportion.types.constraints import Constraints, FixedStage, Pin
from apportion.types.errors import UsageError
from apportion.types.names import near_names, unknown_name

if TYPE_CHECKING:
    from apportion.types.cluster import Cluster
    from apportion.types.model import ModelSpec

_RANGE = re.compile(r"(\d{1,6})(?:\s*[-–]\s*(\d{1,6}))?")
_SHARES = re.compile(r"(?P<devices>[^:]+)(?P<shares>(?::[1-9]\d{0,5})*)")


def read_constraints(
    model: "ModelSpec",
    cluster: "Cluster",
    *,
    stages: Sequence[str] | None,
    pins: Sequence[str] | None,
    excluded: Sequence[str] | None,
    use_all: bool | None,
) -> Constraints:
    """Raises UsageError."""
    return Constraints(
        use_all=bool(use_all),
        excluded=tuple(
            dict.fromkeys(one for name in excluded or () for one in named_devices(cluster, name, "--exclude"))
        ),
        pins=tuple(_pin(model, cluster, text) for text in pins or ()),
        stages=tuple(_stage(cluster, text) for text in stages or ()),
    )


def known_device(cluster: "Cluster", name: str, option: str) -> str:
    """The id of a device, also of one that is written HOST/ID. Raises UsageError."""
    spellings = {device.id: device.id for device in cluster.devices}
    spellings |= {f"{device.host}/{device.id}": device.id for device in cluster.devices}
    if name.strip() in spellings:
        return spellings[name.strip()]
    raise UsageError(f"{option}: {unknown_name('device', name, spellings)}")


def named_devices(cluster: "Cluster", name: str, option: str) -> tuple[str, ...]:
    """One device, or all of a host. Raises UsageError."""
    of_host = tuple(device.id for device in cluster.devices if device.host == name.strip())
    if of_host and name.strip() not in {device.id for device in cluster.devices}:
        return of_host
    return (known_device(cluster, name, option),)


def sizes_by_device(
    cluster: "Cluster", texts: Sequence[str] | None, option: str
) -> tuple[tuple[str, int], ...]:
    """Of `--reserve laptop=2GiB` and the like. Raises UsageError."""
    from apportion.types.units import parse_bytes

    found: list[tuple[str, int]] = []
    for text in texts or ():
        name, equals, size = text.rpartition("=")
        try:
            num_bytes = parse_bytes(size)
        except ValueError as error:
            raise UsageError(f"{option} '{text}': {error}") from None
        if not equals:
            raise UsageError(f"{option} '{text}': write it like {cluster.devices[0].id}=2GiB")
        found.append((known_device(cluster, name, option), num_bytes))
    return tuple(found)


def _pin(model: "ModelSpec", cluster: "Cluster", text: str) -> Pin:
    name, equals, layers = text.rpartition("=")
    if not equals:
        return Pin(device_id=known_device(cluster, text, "--pin"))
    device_id = known_device(cluster, name, "--pin")
    last = model.num_layers - 1
    ends = {"embedding": (0, 1), "head": (last, last + 1)}
    start, stop = ends.get(layers.strip()) or _layers(layers, f"--pin '{text}'", (*ends,), device_id)
    return Pin(device_id=device_id, layer_start=start, layer_stop=stop)


def _stage(cluster: "Cluster", text: str) -> FixedStage:
    named, equals, layers = text.rpartition("=")
    match = _SHARES.fullmatch(named)
    if not equals or match is None:
        first = cluster.devices[0].id
        raise UsageError(
            f"--stage '{text}': write it like {first}=0-11, or {first}+OTHER=0-11 for layers that two devices share, or"
            f" {first}+OTHER:3:1=0-11 with their shares"
        )
    known = {device.id for device in cluster.devices}
    names = [match["devices"]] if match["devices"].strip() in known else match["devices"].split("+")
    device_ids = tuple(known_device(cluster, name, "--stage") for name in names)
    shares = tuple(int(share) for share in match["shares"].split(":")[1:])
    if shares and len(shares) != len(device_ids):
        raise UsageError(
            f"--stage '{text}': {len(shares)} shares for {len(device_ids)} devices; give one each"
        )
    start, stop = _layers(layers, f"--stage '{text}'", (), device_ids[0])
    return FixedStage(device_ids=device_ids, layer_start=start, layer_stop=stop, shares=shares)


def _layers(text: str, place: str, words: Sequence[str], device_id: str) -> tuple[int, int]:
    """Half-open, of both ends as typed."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        near = near_names(text, words)
        meant = f"; did you mean {near[0]}?" if near else ""
        others = "".join(f", {device_id}={word}" for word in words)
        raise UsageError(f"{place}: layers are written like {device_id}=0-11 (both included){others}{meant}")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise UsageError(f"{place}: layer {last} comes before {first}; write the lower one first")
    return first, last + 1
