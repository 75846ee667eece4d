"""Too few KV blocks for all: sequences make room for each other, and every text stays what it is alone."""

import pytest
from contract import is_within
from plans import BLOCK_TOKENS, cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import with_swap_space
from apportion.engine.engine import Engine
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams
from apportion.types.step_costs import PreemptMode

MIB = 2**20
NUM_REQUESTS = 6
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
REQUESTS = [
    Request(id=i, prompt_ids=tuple((i * 37 + j * 11) % 900 + 4 for j in range(6 + 3 * i)), sampling=SAMPLING)
    for i in range(NUM_REQUESTS)
]


def plan(num_kv_blocks: int, num_samples: int = NUM_REQUESTS) -> Plan:
    """A stage of two members, then one of one: every member mirrors the tables and moves its own part."""
    devices = [cpu_device(name, 60 * MIB) for name in ("a", "b", "c")]
    made = hand_plan(
        read_model_spec(resolve_model("demo", weights=True)),
        [[3, 1], [1]],
        [3, 5],
        concurrency=num_samples,
        num_kv_blocks=num_kv_blocks,
        microbatches=2,
        kv_format="fp16",
        devices=devices,
    )
    return with_swap_space(made, MIB)


def generate(engine: Engine, requests: list[Request]) -> dict[tuple[int, int], list[int]]:
    drawn: dict[tuple[int, int], list[int]] = {}
    for event in engine.generate(requests):
        drawn.setdefault((event.request_id, event.sample), []).append(event.token_id)
    return drawn


@pytest.fixture(scope="module")
def alone() -> dict[tuple[int, int], list[int]]:
    texts: dict[tuple[int, int], list[int]] = {}
    with Engine(plan(64), resolve_model("demo", weights=True), []) as engine:
        for request in REQUESTS:
            texts |= generate(engine, [request])
    return texts


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
def test_texts_do_not_depend_on_who_made_room(mode: PreemptMode, alone: dict[tuple[int, int], list[int]]):
    short = plan(26)
    assert sum(len(r.prompt_ids) + SAMPLING.max_tokens for r in REQUESTS) / 2 > 26 * BLOCK_TOKENS
    folder = resolve_model("demo", weights=True)
    with Engine(short, folder, [], preempt=mode) as engine:
        assert generate(engine, REQUESTS) == alone
    counts = engine.scheduler.metrics().preemptions
    assert (mode == "recompute") <= (counts.num_swaps == 0)
    assert (mode == "swap") <= (counts.num_recomputes == 0)
    assert counts.num_swaps + counts.num_recomputes > 0
    for report in engine.reports.values():
        assert (report.use_s["swap"] > 0) == (counts.num_swaps > 0)
        assert is_within(report.peak_bytes, short.memory[report.device_id].engine_bytes)


def test_samples_and_cancelled_requests_under_shortage(alone: dict[tuple[int, int], list[int]]):
    """Request 4 has three samples, request 5 is cancelled half way: the others do not notice."""
    requests = [*REQUESTS[:4], Request(id=4, prompt_ids=REQUESTS[4].prompt_ids, sampling=SAMPLING, n=3)]
    short = plan(30, num_samples=8)
    drawn: dict[tuple[int, int], list[int]] = {}
    with Engine(short, resolve_model("demo", weights=True), []) as engine:
        for request in (*requests, REQUESTS[5]):
            engine.submit(request)
        while engine.scheduler.num_unfinished:
            for event in engine.step():
                drawn.setdefault((event.request_id, event.sample), []).append(event.token_id)
            if len(drawn.get((5, 0), [])) == 3:
                engine.cancel(5)
    assert drawn.pop((5, 0))[:3] == alone[5, 0][:3]
    wanted = {(i, 0): alone[i, 0] for i in range(5)} | {(4, sample): alone[4, 0] for sample in (1, 2)}
    assert drawn == wanted
    assert engine.scheduler.metrics().used_blocks == 0
