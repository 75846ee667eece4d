"""Devices and links as people write them: `--devices "laptop=cpu:600MiB@0.5, desk=cpu:900MiB, card=cuda:0"`.

`local` are the devices of this machine as probed: a written device takes its rates from the one it names. An
emulated device (`@speed` below 1) computes at that share of the rates, with overhead longer by as much. Longer
descriptions, of several hosts and of GPUs by their names, are read by device_text, files by cluster_toml.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from apportion.catalog.cluster_rules import (
    NOWHERE,
    Here,
    Local,
    emulate,
    make_cluster,
    parse_memory,
    parse_speed,
)
from apportion.catalog.cluster_toml import read_cluster_toml
from apportion.catalog.device_text import check_memory, local_device, parse_groups
from apportion.types.cluster import LOCAL_HOST, Cluster, Device
from apportion.types.errors import ClusterError
from apportion.types.units import check_point

__all__ = ["emulate", "make_cluster", "parse_devices", "read_cluster_toml"]

_DEVICE = re.compile(
    r"(?P<id>[\w.+-]+)=(?P<torch>cpu|cuda:\d+)(?::(?P<memory>[^@:]+))?(?:@(?P<speed>[^@]+))?"
)


def parse_devices(text: str, local: Local, here: Here = NOWHERE) -> Cluster:
    """The devices that `--devices` names. Raises ClusterError."""
    text = " ".join(text.split())
    if not text.isprintable():
        raise ClusterError(f"--devices {text!r} cannot be printed in one line")
    try:
        return _parsed(text, local, here)
    except ClusterError:
        try:
            check_point(text)
        except ValueError as error:
            raise ClusterError(f"--devices: {error}") from None
        raise


def _parsed(text: str, local: Local, here: Here) -> Cluster:
    items = [item.strip() for item in text.split(",") if item.strip()]
    matches = [match for item in items if (match := _DEVICE.fullmatch(item))]
    if len(matches) < len(items) or any("+" in (match["memory"] or "") for match in matches):
        return parse_groups(text, local, here)
    of_cpus = [match for match in matches if match["torch"] == "cpu"]
    check_memory([(match["memory"], f"--devices '{match[0]}'") for match in of_cpus], here)
    found = local(max(1, sum(match["torch"] == "cpu" for match in matches)))
    return make_cluster([_parse_device(match, found) for match in matches], [])


def _parse_device(match: re.Match[str], local: Sequence[Device]) -> Device:
    place = f"--devices '{match[0]}'"
    found = local_device(match["torch"], local, place)
    memory_bytes = parse_memory(match["memory"], place) if match["memory"] else found.memory_bytes
    named = replace(found, id=match["id"], host=LOCAL_HOST, memory_bytes=memory_bytes)
    return emulate(named, parse_speed(match["speed"], place))
