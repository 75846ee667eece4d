"""Plans as JSON: every key is known, every number finite and not negative."""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from apportion.types.errors import PlanError
from apportion.types.plan import PLAN_VERSION, Plan

_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


def plan_json(plan: Plan) -> str:
    return _PLAN.dump_json(plan, indent=2).decode() + "\n"


def write_plan(plan: Plan, path: Path) -> None:
    try:
        path.write_text(plan_json(plan))
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from None


def read_plan(path: Path) -> Plan:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read plan {path}: {error}") from None
    return parse_plan(text, str(path))


def parse_plan(text: str, source: str) -> Plan:
    """Raises PlanError naming the place in `source` that is wrong."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise PlanError(f"{source} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise PlanError(f"{source} is not a plan: a JSON object is expected")
    document = cast(dict[str, object], given)
    version = document.get("version")
    if version != PLAN_VERSION:
        raise PlanError(
            f"{source} is a plan of version {version}; this program reads version {PLAN_VERSION}: plan again"
        )
    _check_numbers(document, source)
    try:
        plan = _PLAN.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PlanError(f"{source}: {place}: {first['msg'].lower()}") from None
    _check_keys(document, _PLAN.dump_python(plan, mode="json"), source)
    if not plan.stages:
        raise PlanError(f"{source}: stages: at least one is needed")
    return plan


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
            raise PlanError(f"{here}: unknown key")
        _check_keys(item, inner[key], here)


def _items(value: object) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in cast(Mapping[object, object], value).items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [(str(index), item) for index, item in enumerate(cast(Sequence[object], value))]
    return []
