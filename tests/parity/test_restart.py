"""A run that goes on under other plans, on the same worker processes, while its streams are open."""

import asyncio
from contextlib import ExitStack
from dataclasses import replace

import pytest
from contract import COUNTER_ERROR_BYTES, is_within
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.async_engine import AsyncEngine
from apportion.engine.engine import Engine
from apportion.transport.links import COORDINATOR, Outbox
from apportion.transport.wire import Kind, pack_result
from apportion.types.errors import EngineError
from apportion.types.plan import DeviceMemory, Plan
from apportion.types.request import Request, SamplingParams, StepResult

NUM_REQUESTS = 4
SAMPLING = SamplingParams(max_tokens=28, ignore_eos=True)
REQUESTS = [
    Request(
        id=i,
        prompt_ids=tuple((i * 37 + j * 11) % 900 + 4 for j in range(5 + 4 * i)),
        sampling=SAMPLING if i % 2 == 0 else replace(SAMPLING, temperature=1.0, seed=i),
    )
    for i in range(NUM_REQUESTS)
]
FOLDER = resolve_model("demo", weights=True)


def tight(
    groups: list[list[int]], layers: list[int], devices: str, num_threads: int = 1, **sizes: int
) -> Plan:
    """On these devices, which have not a byte more than it takes."""
    memory: dict[str, DeviceMemory] = {}
    for _ in range(2):
        made = hand_plan(
            read_model_spec(FOLDER),
            groups,
            layers,
            concurrency=NUM_REQUESTS,
            devices=[
                replace(
                    cpu_device(name, memory[name].engine_bytes if memory else 2**30), num_threads=num_threads
                )
                for name in devices
            ],
            **sizes,
        )
        memory = made.memory
    return made


THREE_STAGES = tight([[1], [1], [1]], [2, 5, 1], "abc", microbatches=3)
TWO_STAGES = tight([[1], [1]], [3, 5], "ca", chunk_tokens=8)
GROUP = tight([[2, 1]], [8], "ab", num_kv_blocks=52)
WITH_A_NEW_DEVICE = tight([[1], [1, 3]], [4, 4], "bda")
TWO_THREADS = tight([[1]], [8], "c", num_threads=2)


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[int]]:
    drawn: dict[int, list[int]] = {one.id: [] for one in REQUESTS}
    with Engine(THREE_STAGES, FOLDER, []) as engine:
        for event in engine.generate(REQUESTS):
            drawn[event.request_id].append(event.token_id)
    return drawn


def held(memory: DeviceMemory) -> int:
    return memory.weights_bytes + memory.kv_bytes


def check_memory(engine: Engine) -> None:
    """Each holds its place to the byte, and has not come to more than what is planned: nothing is left of the old."""
    assert set(engine.reports) == set(engine.plan.device_ids)
    for device_id, report in engine.reports.items():
        planned = engine.plan.memory[device_id]
        assert report.held_bytes == held(planned)
        assert report.held_bytes <= report.peak_bytes + COUNTER_ERROR_BYTES
        assert is_within(report.peak_bytes, planned.engine_bytes)


def test_streams_go_on_under_other_plans_token_by_token(undisturbed: dict[int, list[int]]):
    plans = iter((TWO_STAGES, GROUP, TWO_THREADS, WITH_A_NEW_DEVICE, THREE_STAGES))
    drawn: dict[int, list[int]] = {one.id: [] for one in REQUESTS}
    pids: dict[str, int | None] = {}
    with Engine(THREE_STAGES, FOLDER, []) as engine:
        for request in REQUESTS:
            engine.submit(request)
        steps = num_stale = 0
        while engine.num_unfinished:
            for event in engine.step():
                drawn[event.request_id].append(event.token_id)
            steps += 1
            if steps % 10 == 0 and (plan := next(plans, None)) is not None:
                num_stale += engine.num_in_flight
                assert engine.restart(plan) == []
                pids |= {name: pid for name, pid in engine.worker_pids().items() if name not in pids}
                assert engine.worker_pids() == pids
        assert next(plans, None) is None
        assert num_stale > 0
        engine.collect()
        check_memory(engine)
    assert drawn == undisturbed


@pytest.mark.parametrize(
    "plan", [TWO_STAGES, GROUP, WITH_A_NEW_DEVICE], ids=["stages", "group", "new device"]
)
def test_a_place_taken_later_holds_and_sends_what_one_taken_at_once_does(plan: Plan):
    """Whole sequences run to their end in it."""
    with Engine(plan, FOLDER, []) as engine:
        wanted = [event.token_id for event in engine.generate(REQUESTS[:1])]
        engine.collect()
        at_once = dict(engine.reports)
        sent = engine.sent_bytes()
    with Engine(THREE_STAGES, FOLDER, []) as engine:
        list(engine.generate(REQUESTS))
        engine.restart(plan)
        assert [event.token_id for event in engine.generate(REQUESTS[:1])] == wanted
        engine.collect()
        check_memory(engine)
        assert engine.sent_bytes() == sent
        for name, report in engine.reports.items():
            assert (report.parameters, report.read_bytes) == (
                at_once[name].parameters,
                at_once[name].read_bytes,
            )


def test_what_belongs_to_an_older_generation_is_dropped(undisturbed: dict[int, list[int]]):
    """A result of a step that was never scheduled, and steps that nobody can run."""
    drawn: list[int] = []
    with Engine(THREE_STAGES, FOLDER, []) as engine, ExitStack() as exits:
        engine.restart(TWO_STAGES)
        stale, *workers = (Outbox(engine.run_dir, name) for name in (COORDINATOR, "0", "1", "2"))
        for outbox in (stale, *workers):
            exits.callback(outbox.close)
        engine.submit(REQUESTS[0])
        while engine.num_unfinished:
            stale.send(Kind.RESULT, pack_result(StepResult(step_id=999, token_ids={0: (1,)}, logits={})))
            for worker in workers:
                worker.send(Kind.STEP, b"no batch")
            drawn += [event.token_id for event in engine.step()]
    assert drawn == undisturbed[0]


def test_requests_that_a_smaller_plan_cannot_hold_end_with_an_error_and_others_go_on(
    undisturbed: dict[int, list[int]],
):
    """The new plan's context is 40 tokens: request 0 has 5 + 28 in the end, request 3 has 17 + 26 already."""
    smaller = tight([[1], [1]], [3, 5], "ca", max_context_tokens=40)

    async def collected(engine: AsyncEngine[Engine], one: Request, begun: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async for event in engine.generate(one):
            tokens.append(event.token_id)
            if len(tokens) == 26:
                begun.set()
        return tokens

    async def use(engine: AsyncEngine[Engine]) -> list[object]:
        begun = asyncio.Event()
        streams = [
            asyncio.create_task(collected(engine, one, begun if one.id == 3 else asyncio.Event()))
            for one in (replace(REQUESTS[0], sampling=SAMPLING), REQUESTS[3])
        ]
        await begun.wait()
        await asyncio.wrap_future(engine.restart(0, smaller))
        return await asyncio.gather(*streams, return_exceptions=True)

    with Engine(THREE_STAGES, FOLDER, []) as stepped, AsyncEngine([stepped], [NUM_REQUESTS]) as engine:
        short, long = asyncio.run(use(engine))
    assert short == undisturbed[0]
    assert isinstance(long, EngineError)
    assert "40" in str(long)
