"""Plans of another version: what of them holds, as the command that plans again.

A version is not translated: what it was proven for may have another meaning now. But its cluster is read again from the
file itself (`--cluster old-plan.json`), and what was asked stands in its workload.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from apportion.planner.plan_structure import cluster_fault
from apportion.types.cluster import Cluster
from apportion.types.constraints import Constraints
from apportion.types.errors import PlanError
from apportion.types.json_text import parse_json
from apportion.types.plan import PLAN_VERSION
from apportion.types.text_file import read_text

_CLUSTER = TypeAdapter(Cluster)
_CONSTRAINTS = TypeAdapter(Constraints)
_OPTIONS: dict[str, tuple[str, object]] = {
    "max_context_tokens": ("--context", None),
    "concurrency": ("--concurrency", 1),
    "prompt_tokens": ("--prompt-tokens", None),
    "output_tokens": ("--output-tokens", None),
    "objective": ("--objective", "latency"),
    "arrival_rate": ("--arrival-rate", None),
    "ttft_limit_s": ("--ttft-limit", None),
    "tpot_limit_s": ("--tpot-limit", None),
    "kv_tokens": ("--kv-tokens", None),
    "kv_format": ("--kv-format", None),
}
"""Of a workload's fields: the option, and the value that it has anyway."""

Table = Mapping[str, object]


def outdated_error(document: Table, source: str) -> PlanError:
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        return PlanError(
            f"{source} is not a plan: it has no version; write one with: apportion plan MODEL --out plan.json"
        )
    return PlanError(
        f"{source} is a plan of version {version}, and this program reads version {PLAN_VERSION};"
        f" plan again: {plan_again(document, source)}"
    )


def plan_again(document: Table, source: str) -> str:
    """What to type: what was asked, as far as it stands in the document, on its own cluster where that can be read."""
    first = _table(_listed(document, "replicas")) or document
    name = _table(first.get("model")).get("name")
    words = ["apportion", "plan", name if isinstance(name, str) and name else "MODEL"]
    if _cluster(document) is not None:
        words += ["--cluster", source]
    words += [word for option, value in _asked(document) for word in (option, value)]
    words += _by_hand(first)
    formats = first.get("weight_formats")
    if isinstance(formats, list) and formats:
        words += ["--weights", ",".join(map(str, cast(list[object], formats)))]
    if "replicas" in document:
        number = document.get("num_asked")
        words += ["--replicas", "auto" if number is None else str(number)]
    return shlex.join([*words, "--out", source])


def _by_hand(first: Table) -> list[str]:
    """Its constraints, layers that are streamed though stages were typed, and its swap space."""
    words: list[str] = []
    constraints = _constraints(first)
    if constraints is not None:
        typed = (typed for typed, _ in constraints.parts())
        words += [word for text in typed if text.startswith("--") for word in text.split(" ", 1)]
    stages = first.get("stages")
    streams = isinstance(stages, list) and any(
        _table(stage).get("streamed_layers") for stage in cast(list[object], stages)
    )
    if streams and constraints is not None and constraints.stages:
        words += ["--stream", "auto"]
    swapped = [_table(used).get("swap_bytes") for used in _table(first.get("memory")).values()]
    most = max((size for size in swapped if isinstance(size, int)), default=0)
    return [*words, "--swap-space", f"{most}B"] if most else words


def _constraints(document: Table) -> Constraints | None:
    try:
        return _CONSTRAINTS.validate_python(document.get("constraints"))
    except (ValidationError, RecursionError):
        return None


def _asked(document: Table) -> list[tuple[str, str]]:
    workload = _table(document.get("workload"))
    by_rate = workload.get("arrival_rate") is not None
    said: list[tuple[str, str]] = []
    for field, (option, default) in _OPTIONS.items():
        value = workload.get(field)
        if (
            isinstance(value, (str, int, float))
            and value != default
            and not (by_rate and field == "concurrency")
        ):
            said.append((option, f"{value:g}" if isinstance(value, float) else str(value)))
    balance = _table(workload.get("balance"))
    for field, factor, unit in (("of_mean", 100, "%"), ("seconds", 1, "s")):
        value = balance.get(field)
        if isinstance(value, float):
            said.append(("--balance", f"{value * factor:.10g}{unit}"))
    return said


def read_planned_cluster(path: Path) -> Cluster:
    """The cluster in a plan of any version, with the fields that are known now. Raises PlanError."""
    try:
        given = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"cannot read cluster {path}: {error}") from None
    document = _table(given)
    found, constraints = _cluster(document), _constraints(document)
    if found is not None and constraints is not None and constraints.engine is not None:
        found = found.without_buffers(constraints.engine.buffer_bytes)
    if found is None or not found.devices:
        raise PlanError(
            f"{path} holds no cluster of a plan; name a TOML file, or a plan that `plan --out` wrote"
        )
    fault = cluster_fault(found)
    if fault is not None:
        raise PlanError(f"{path}: {fault[0]}: {fault[1]}")
    return found


def _cluster(document: Table) -> Cluster | None:
    try:
        return _CLUSTER.validate_python(document.get("cluster"))
    except (ValidationError, RecursionError):
        return None


def _table(value: object) -> Table:
    return cast(Table, value) if isinstance(value, Mapping) else {}


def _listed(document: Table, key: str) -> object:
    """The first of a list."""
    value = document.get(key)
    return cast(list[object], value)[0] if isinstance(value, list) and value else None
