"""Plans as JSON. What is read is not believed: every key is known, every number finite and within reason, every text
printable, and the whole hangs together (`plan_structure`)."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import cast

from pydantic import TypeAdapter, ValidationError

from apportion.planner.outdated import outdated_error
from apportion.planner.plan_structure import first_fault
from apportion.types.errors import PlanError
from apportion.types.files import write_file
from apportion.types.json_text import parse_json
from apportion.types.names import near_names, one_of
from apportion.types.plan import PLAN_VERSION, Plan
from apportion.types.replicated import ReplicatedPlan
from apportion.types.text_file import read_text

Planned = Plan | ReplicatedPlan
Place = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

_MOST = 1e18
"""Of any figure: beyond it, products of a few have no finite value."""
_MOST_SHOWN = 40
_POSITIVE = frozenset(
    (
        "concurrency",
        "prompt_tokens",
        "output_tokens",
        "max_context_tokens",
        "kv_tokens",
        "most_sequences",
        "arrival_rate",
        "ttft_limit_s",
        "tpot_limit_s",
        "hidden_size",
        "q_heads",
        "kv_heads",
        "head_dim",
        "kv_lora_rank",
        "ffn_columns",
        "vocab_rows",
        "window_tokens",
        "block_tokens",
        "num_kv_blocks",
        "microbatches",
        "chunk_tokens",
        "group_size",
        "step_tokens",
        "value",
        "lower_bound",
        "memory_bytes",
        "host_cores",
        "ffn_block_columns",
    )
)
"""Of these nothing has none."""

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
        text = read_text(path)
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
        place = _path(first["loc"])
        raise PlanError(f"{source}: {place}: {first['msg'].lower()}") from None
    _check_keys(document, adapter.dump_python(plan, mode="json"), source)
    fault = first_fault(plan)
    if fault is not None:
        raise PlanError(f"{source}: {fault[0]}: {fault[1]}")
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
    for place, value in _leaves(document, ()):
        problem = _value_problem(place, value)
        if problem is not None:
            raise PlanError(f"{source}: {_path(place)}: {problem}")
    return document


def _path(place: Place) -> str:
    """`stages[1].layer_start`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in place]
    return "".join(steps).removeprefix(".")


def _value_problem(place: Place, value: object) -> str | None:
    if isinstance(value, str):
        return None if value.isprintable() else f"{value!r} cannot be printed"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= _MOST or isnan(value):
        return f"{_shown(value)} is not a finite number ≥ 0" + (f" and ≤ {_MOST:g}" if value > _MOST else "")
    if value == 0 and place[-1] in _POSITIVE:
        return "it is 0, and must be more"
    return None


def _shown(value: float) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def _leaves(value: object, place: Place) -> Iterator[tuple[Place, object]]:
    inner = _items(value)
    if not inner:
        yield place, value
    for key, item in inner:
        yield from _leaves(item, (*place, key))


def _check_keys(given: object, known: object, source: str, place: Place = ()) -> None:
    inner = dict(_items(known))
    for key, item in _items(given):
        if key not in inner:
            near = near_names(str(key), [str(name) for name in inner])
            meant = f"; did you mean {one_of(near)}?" if near else ""
            raise PlanError(f"{source}: {_path((*place, key))}: unknown key{meant}")
        _check_keys(item, inner[key], source, (*place, key))


def _items(value: object) -> list[tuple[str | int, object]]:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in cast(Mapping[object, object], value).items()]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(enumerate(cast(Sequence[object], value)))
    return []
