"""Where a worker's time goes: counted by a clock that the test moves, then held against a real run."""

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.engine.report import DECODE, PREFILL, USES, Spans, WorkerReport, WorkMeter
from apportion.engine.trace import Trace
from apportion.types.plan import Plan
from apportion.types.request import Chunk, Request, SamplingParams, ScheduledBatch

SAMPLING = SamplingParams(max_tokens=1)
OUTPUT_TOKENS = 24


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def batch(*lengths: int) -> ScheduledBatch:
    chunks = [
        Chunk(sequence_id=i, start=5, token_ids=(0,) * length, block_ids=(0,), sampling=SAMPLING)
        for i, length in enumerate(lengths)
    ]
    return ScheduledBatch(step_id=7, chunks=tuple(chunks))


def report(meter: WorkMeter) -> WorkerReport:
    return WorkerReport(
        device_id="d",
        parameters=0,
        read_bytes=0,
        streamed_bytes=0,
        held_bytes=0,
        peak_bytes=0,
        sent_bytes={},
        **meter.report(),
    )


def test_steps_are_added_up_by_phase_and_mixed_ones_left_out(clock: Clock):
    """Of decode the fullest."""
    meter = WorkMeter()
    for one in (batch(1), batch(1, 1), batch(1), batch(1, 1), batch(4, 3), batch(4, 1)):
        meter.begin_step(clock.now_s)
        clock.now_s += 0.5
        meter.spent("exchange", clock.now_s - 0.01, clock.now_s)
        meter.end_step(one)
    decode, prefill = report(meter).phase(DECODE), report(meter).phase(PREFILL)
    assert (decode.num_steps, decode.num_sequences, decode.num_tokens, decode.busy_s) == (2, 4, 4, 1.0)
    assert (prefill.num_steps, prefill.num_tokens, prefill.start_tokens) == (1, 7, 10)
    assert decode.exchange_s == pytest.approx(0.02)
    meter.clear()
    assert meter.work[DECODE].num_steps == 0


@pytest.mark.parametrize(
    ("sent_s", "link_s", "bubble_s"),
    [
        (103, 1, 3),  # sent after three seconds of nothing, on its way for one
        (99, 4, 0),  # sent before the last step ended, and only now here
        (105, 0, 4),  # another clock's reading: never more than the wait
    ],
)
def test_waiting_is_link_from_when_the_message_was_sent(
    sent_s: float, link_s: float, bubble_s: float, clock: Clock
):
    meter = WorkMeter(trace=True)
    clock.now_s += 4
    meter.begin_step(sent_s)
    clock.now_s += 2
    meter.spent("exchange", clock.now_s - 0.5, clock.now_s)
    meter.spent("swap", clock.now_s - 0.25, clock.now_s)
    clock.now_s += 1
    meter.end_step(batch(1))
    clock.now_s += 10
    seen = report(meter)
    expected = {"compute": 2.25, "exchange": 0.5, "swap": 0.25, "link": link_s, "bubble": bubble_s + 10}
    assert seen.use_s == pytest.approx(expected)
    assert seen.wall_s == pytest.approx(sum(expected.values()))
    spans = Spans.unpack(seen.spans)
    assert sum(s.ended_s - s.begun_s for s in spans if s.use == "link") == pytest.approx(link_s)
    (step,) = (s for s in spans if s.use == "compute")
    assert (step.begun_s, step.ended_s, step.step_id, step.num_tokens) == (104, 107, 7, 1)


def plan() -> Plan:
    """Two members, then one device at a fifth of its speed: the first stage waits most of the time."""
    devices = [cpu_device("a"), cpu_device("b"), cpu_device("slow", speed=0.2)]
    model = read_model_spec(resolve_model("demo", weights=False))
    return hand_plan(model, [[1, 1], [1]], [4, 4], devices=devices)


@dataclass(frozen=True, kw_only=True)
class Seen:
    reports: dict[str, WorkerReport]
    least_s: float
    """Wall time here between the reports before and those after the run, and with the time of asking for them."""
    most_s: float


def run(engine: Engine, first_id: int, num: int) -> Seen:
    outer_s = time.perf_counter()
    engine.collect()
    inner_s = time.perf_counter()
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    ids = range(first_id, first_id + num)
    for _ in engine.generate(
        [Request(id=i, prompt_ids=tuple(range(i, i + 9)), sampling=sampling) for i in ids]
    ):
        pass
    least_s = time.perf_counter() - inner_s
    return Seen(reports=engine.collect(), least_s=least_s, most_s=time.perf_counter() - outer_s)


def test_uses_add_up_to_the_wall_time_and_the_trace_shows_them():
    with Engine(plan(), resolve_model("demo", weights=True), [], trace=True) as engine:
        trace = Trace(engine.plan)
        seen = []
        for i in range(2):
            seen.append(run(engine, 2 * i, 2))
            trace.add(seen[-1].reports, engine.meter.take_spans())
    for one in seen:
        for report in one.reports.values():
            assert set(report.use_s) == set(USES)
            assert min(report.use_s.values()) >= 0
            assert one.least_s <= sum(report.use_s.values()) <= one.most_s
        a, b, slow = (one.reports[name].use_s for name in ("a", "b", "slow"))
        assert a["exchange"] > 0 < b["exchange"]
        assert slow["exchange"] == 0 == a["swap"]
        assert slow["compute"] > 2 * max(a["compute"], b["compute"])
        assert min(a["bubble"], b["bubble"]) > slow["bubble"]
    check_trace(json.loads(json.dumps(trace.document())), seen)


def check_trace(document: dict[str, Any], seen: list[Seen]) -> None:
    events = document["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(1, 0): "a", (1, 1): "b", (2, 0): "slow"}
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append(event)
    assert rows.keys() == {(0, 0), *names}
    for row, device_id in names.items():
        outer, inner = [], []
        for event in rows[row]:
            (inner if event["name"] in ("exchange", "swap") else outer).append(event)
        outer.sort(key=lambda event: event["ts"])
        for one, following in pairwise(outer):
            assert one["ts"] + one["dur"] <= following["ts"] + 0.01  # µs
        for event in inner:
            assert any(is_within(event, step) for step in outer if step["name"].startswith("step"))
        wall_us = 1e6 * sum(one.reports[device_id].wall_s for one in seen)
        assert sum(event["dur"] for event in outer) == pytest.approx(wall_us, rel=1e-3)
    tokens = [e["args"]["tokens"] for e in rows[2, 0] if e["name"].startswith("step")]
    assert sum(tokens) == 2 * 2 * (9 + OUTPUT_TOKENS - 1)


def is_within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return (
        outer["ts"] - 0.01 <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.01
    )
