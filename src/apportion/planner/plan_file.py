"""Plans as JSON: every key is known, every number finite and not negative."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from apportion.planner.outdated import outdated_error
from apportion.types.errors import PlanError
from apportion.types.files import write_file
from apportion.types.json_text import parse_json
from apportion.types.names import near_names, one_of
from apportion.types.plan import PLAN_VERSION, Plan
from apportion.types.replicated import ReplicatedPlan

Planned = Plan | ReplicatedPlan

_PLAN = cast(TypeAdapter[Planned], TypeAdapter(Plan))
_REPLICATED = cast(TypeAdapter[Planned], TypeAdapter(ReplicatedPlan))


def plan_json(plan: Planned) -> str:
    adapter = _REPLICATED if isinstance(plan, ReplicatedPlan) else _PLAN
    return adapter.dump_json(plan, indent=2).decode() + "\n"


def write_plan(plan: Planned, path: Path) -> None:
    write_file(path, plan_json(plan), "plan")


def read_plan(path: Path, replica: int | None = None) -> Plan:
    """One pipeline: of a plan with several the replica of this number."""
    plan = read_planned(path)
    return one_pipeline(plan, replica, str(path))


def read_planned(path: Path) -> Planned:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read plan {path}: {error}") from None
    return parse_planned(text, str(path))


def one_pipeline(plan: Planned, replica: int | None, source: str) -> Plan:
    """Raises PlanError where it is not clear which is meant."""
    if isinstance(plan, Plan):
        if replica is not None:
            raise PlanError(f"{source} is one pipeline, without replicas; leave out --replica")
        return plan
    last = len(plan.replicas) - 1
    if replica is None and last > 0:
        raise PlanError(f"{source} has {last + 1} replicas; take one of them: --replica 0 to {last}")
    if replica is not None and replica > last:
        raise PlanError(f"{source} has no replica {replica}; its last is {last}")
    return plan.replicas[replica or 0]


def parse_plan(text: str, source: str) -> Plan:
    """Raises PlanError naming the place in `source` that is wrong."""
    return one_pipeline(parse_planned(text, source), None, source)


def parse_planned(text: str, source: str) -> Planned:
    """Raises PlanError naming the place in `source` that is wrong."""
    document = _document(text, source)
    adapter = _REPLICATED if "replicas" in document else _PLAN
    try:
        plan = adapter.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{source}: {place}: {first['msg'].lower()}") from None
    _check_keys(document, adapter.dump_python(plan, mode="json"), source)
    if isinstance(plan, ReplicatedPlan) and not plan.replicas:
        raise PlanError(f"{source}: replicas: at least one is needed")
    for one in plan.replicas if isinstance(plan, ReplicatedPlan) else (plan,):
        if not one.stages:
            raise PlanError(f"{source}: stages: at least one is needed")
    return plan


def _document(text: str, source: str) -> dict[str, object]:
    try:
        given = parse_json(text)
    except ValueError as error:
        raise PlanError(f"{source} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise PlanError(f"{source} is not a plan: a JSON object is expected")
    document = cast(dict[str, object], given)
    if document.get("version") != PLAN_VERSION:
        raise outdated_error(document, source)
    _check_numbers(document, source)
    return document


def _check_numbers(value: object, place: str) -> None:
    if isinstance(value, (int, float)) and not (isfinite(value) and value >= 0):
        raise PlanError(f"{place}: {value} is not a finite number ≥ 0")
    for key, item in _items(value):
        _check_numbers(item, f"{place}: {key}" if ": " not in place else f"{place}.{key}")


def _check_keys(given: object, known: object, place: str) -> None:
    inner = dict(_items(known))
    for key, item in _items(given):
        here = f"{place}: {key}" if ": " not in place else f"{place}.{key}"
        if key not in inner:
            near = near_names(key, tuple(inner))
            raise PlanError(f"{here}: unknown key" + (f"; did you mean {one_of(near)}?" if near else ""))
        _check_keys(item, inner[key], here)


def _items(value: object) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in cast(Mapping[object, object], value).items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(str(index), item) for index, item in enumerate(cast(Sequence[object], value))]
    return []
