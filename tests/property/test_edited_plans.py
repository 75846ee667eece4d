"""A plan file is not believed: whatever one field is changed to, the plan is refused in one line, or it is one that
every verb can take."""

import copy
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import cluster, cpu, llama, workload
from rich.console import Console

from apportion.cli.render import print_plan
from apportion.cost.memory import parameters, plan_memory
from apportion.cost.statements import model_parameters, replicated_parameters
from apportion.planner.build import make_plan
from apportion.planner.plan_file import Planned, parse_plan, parse_planned, plan_json
from apportion.planner.replicas.build import make_replicated_plan
from apportion.types.errors import PlanError
from apportion.types.plan import Plan

ODD: list[Any] = [
    *(None, True, False, "", "x", "a\nb", "[/red]", "../../x", "\x1b[0m", [], {}, [1], {"a": 1}),
    *(0, 1, 2, 3, 7, 10**9, 2**63, 2**64, 10**400, -1, 0.5, 1e-300, 1e300, float("nan"), float("inf")),
    *("fp32", "int8", "nothing", "cpu", "cuda", "disk", "throughput", "even", "local", "a"),
]


SMALL = replace(llama(6, 512), vocab_rows=8000)


@cache
def documents() -> list[str]:
    """A pipeline with an uneven group, one that streams, and several replicas."""
    small = SMALL
    devices = [cpu("a", 0.12), cpu("b", 0.08, 0.5), cpu("c", 0.1)]
    work = workload(concurrency=2, context=1024)
    whole = make_plan(small, cluster(devices), work, ("bf16",), streaming=False)
    tight = [replace(cpu(name, 0.09), stream_bytes_per_s=5e9) for name in "ab"]
    streams = make_plan(small, cluster(tight), replace(work, concurrency=1), ("bf16",))
    many = make_replicated_plan(
        small,
        cluster([cpu(name, 0.4) for name in "ab"]),
        workload("throughput", 2, 1024),
        ("bf16",),
        2,
    )
    assert len(whole.device_ids) > 1
    assert any(stage.streamed_layers for stage in streams.stages)
    return [plan_json(plan) for plan in (whole, streams, many)]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    yield path
    for key, item in items:
        if not (path[-1:] == ("layers",) and key > 1):  # the others are as these: most draws would be of them
            yield from leaves(item, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    inner = copy.copy(document)
    inner[path[0]] = changed(document[path[0]], path[1:], value)
    return inner


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_one_field_changed_is_refused_or_harmless(data: st.DataObject):
    number = data.draw(st.integers(0, len(documents()) - 1))
    document = json.loads(documents()[number])
    path = data.draw(st.sampled_from([path for path in leaves(document) if path]))
    old: Any = document
    for key in path:
        old = old[key]
    near = [old + 1, old - 1, old * 2] if isinstance(old, (int, float)) else []
    value = data.draw(st.sampled_from([*ODD, *near]))
    check(json.dumps(changed(document, path, value)))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_field_left_out_is_refused_or_harmless(data: st.DataObject):
    number = data.draw(st.integers(0, len(documents()) - 1))
    document = json.loads(documents()[number])
    *path, last = data.draw(st.sampled_from([path for path in leaves(document) if path]))
    inner: Any = document
    for key in path:
        inner = inner[key]
    del inner[last]
    check(json.dumps(document))


def check(edited: str) -> None:
    try:
        planned = parse_planned(edited, "plan.json")
    except PlanError as error:
        message = str(error)
    else:
        takes(planned)
        return
    assert "\n" not in message
    assert message.startswith("plan.json")
    assert len(message) < 1000


def takes(planned: Planned) -> None:
    for plan in [planned] if isinstance(planned, Plan) else planned.replicas:
        hangs_together(plan)
    assert parse_planned(plan_json(planned), "again") == planned


def hangs_together(plan: Plan) -> None:
    """All that running it relies on, by counts that the check on reading does not make: the parameters that all members
    hold are the model's, and each has room for what the stages need."""
    held = sum(parameters(plan.model, s, rank) for s in plan.stages for rank in range(s.split.size))
    assert held == model_parameters(plan.model) + replicated_parameters(plan)
    assert [s.has_embedding for s in plan.stages].index(True) == 0
    assert [s.has_head for s in plan.stages].index(True) == len(plan.stages) - 1
    assert plan_memory(plan) == plan.memory
    assert plan.num_kv_blocks * plan.block_tokens < 10**8
    print_plan(Console(file=io.StringIO(), width=100), plan, details=True)


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("stages", 1, "layer_start"), 9, r"stages\[1\]\.layer_start"),
        (("stages", 1, "layer_start"), 0, r"stages\[1\]\.layer_start"),
        (("stages", 0, "has_head"), True, r"stages\[0\]\.has_head"),
        (("num_kv_blocks",), 10**9, "memory"),
        (("num_kv_blocks",), 10**400, "num_kv_blocks"),
        (("microbatches",), 10**9, "microbatches"),
        (("stages", 0, "split", "device_ids", 0), "nobody", r"stages\[0\]\.split\.device_ids"),
        (("cluster", "devices", 0, "id"), "../../x", r"cluster\.devices\[0\]\.id"),
        (("cluster", "devices", 0, "torch_device"), "meta", r"cluster\.devices\[0\]\.torch_device"),
        (("cluster", "devices", 0, "num_threads"), 10**6, r"cluster\.devices\[0\]\.num_threads"),
        (("estimate", "stage_s"), [], r"estimate\.stage_s"),
        (("stages", 0, "split", "ffn_columns", 0), 1, r"stages\[0\]\.split\.ffn_columns"),
    ],
)
def test_the_place_is_named(path: tuple[Any, ...], value: Any, place: str):
    text = stages_text() if path[0] == "stages" and "split" not in path else documents()[0]
    with pytest.raises(PlanError, match=place):
        parse_plan(json.dumps(changed(json.loads(text), path, value)), "plan.json")


@cache
def stages_text() -> str:
    plan = make_plan(
        SMALL,
        cluster([cpu("a", 0.15), cpu("b", 0.15, 0.5, "other")]),
        workload(context=1024),
        ("bf16",),
        streaming=False,
    )
    assert len(plan.stages) == 2
    return plan_json(plan)
