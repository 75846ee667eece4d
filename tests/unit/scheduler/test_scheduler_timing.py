"""Time in the pipeline: prompts beside decoding, balance of microbatches, who goes first. Stages are out of phase."""

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import ceil

import pytest
from fake_pipeline import FakePipeline, make_scheduler, request, run

from apportion.scheduler.scheduler import Scheduler
from apportion.scheduler.waiting import AGING_STEPS
from apportion.types.request import ScheduledBatch, TokenEvent
from apportion.types.step_costs import even_costs

COSTS = replace(even_costs(1), decode_token_s=0.05, context_token_s=0.01)


def stage(speed: float) -> Callable[[ScheduledBatch], float]:
    """A batch takes its tokens' time, and a little whatever it holds."""
    return lambda batch: (0.01 + batch.num_tokens) / speed


def decode_gaps_s(scheduler: Scheduler, pipeline: FakePipeline) -> list[float]:
    """Between the tokens of request 0, while request 1 of many chunks is prefilled."""
    scheduler.add(request(0, 2, max_tokens=60))
    drawn_s: list[float] = []
    prefilling = False
    while not prefilling or scheduler.num_unfinished == 2:
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
        for event in scheduler.complete(pipeline.finish_first()):
            if event.request_id == 0 and prefilling:
                drawn_s.append(pipeline.now_s)
            if event.request_id == 1:
                return [b - a for a, b in pairwise(drawn_s)]
        if not prefilling and pipeline.now_s > 0:
            scheduler.add(request(1, 1500, max_tokens=1))
            prefilling = True
    raise AssertionError("the prompt must end before the decoding sequence")


@pytest.mark.parametrize(
    "speeds",
    [(1.0,), (1.0, 1.0), (1.0, 4.0), (4.0, 1.0), (1.0, 1.0, 1.0), (3.0, 1.0, 2.0), (8.0, 8.0, 1.0, 8.0)],
)
@pytest.mark.parametrize("microbatches", [1, 6])
def test_decode_waits_for_a_long_prompt_no_longer_than_a_chunk(speeds: tuple[float, ...], microbatches: int):
    """Its own way through the stages, in a full batch, is not waiting; nor does the prompt leave a stage idle."""
    chunk_tokens = 64
    stages_s = [(0.01 + chunk_tokens) / speed for speed in speeds]
    costs = replace(COSTS, prefill_depth=ceil(sum(stages_s) / max(stages_s)))
    scheduler = make_scheduler(
        costs=costs,
        num_kv_blocks=500,
        max_context_tokens=1900,
        chunk_tokens=chunk_tokens,
        microbatches=microbatches,
        max_in_flight=max(microbatches, len(speeds) + 1),
    )
    pipeline = FakePipeline(4, [stage(speed) for speed in speeds])
    gaps = decode_gaps_s(scheduler, pipeline)
    assert len(gaps) >= 3
    assert max(gaps) <= sum(stages_s) + max(stages_s) + 0.1
    # 1500 tokens beside the decode tokens: the slowest stage has been busy nearly all the time
    assert pipeline.now_s <= (1500 + len(gaps) + 5) / min(speeds) + 2 * sum(stages_s)


def test_a_batch_that_leaves_ready_sequences_to_the_next_carries_no_prefill():
    scheduler = make_scheduler(microbatches=2, max_in_flight=4, num_kv_blocks=200, costs=even_costs(4))
    for i in range(4):
        scheduler.add(request(i, 1, max_tokens=50))
    pipeline = FakePipeline(4)
    pipeline.submit(scheduler.schedule())
    pipeline.submit(scheduler.schedule())
    for _ in range(2):
        scheduler.complete(pipeline.finish_first())
    scheduler.add(request(9, 60, max_tokens=1))
    batches = [[len(c.token_ids) for c in b.chunks] for b in iter(scheduler.schedule, None)]
    assert batches[0] == [1, 1]
    assert batches[1] == [1, 1, 16]


@pytest.mark.parametrize("microbatches", [1, 2, 5])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 32])
def test_a_prompt_is_through_in_as_many_turns_as_it_has_chunks(microbatches: int, chunk_tokens: int):
    """Whoever decodes beside it: 31 sequences, more than a chunk holds."""
    scheduler = make_scheduler(
        costs=even_costs(1),
        num_kv_blocks=2000,
        max_context_tokens=250,
        max_sequences=32,
        chunk_tokens=chunk_tokens,
        microbatches=microbatches,
        max_in_flight=max(microbatches, 2),
    )
    pipeline = FakePipeline(4)
    for i in range(31):
        scheduler.add(request(i, 3, max_tokens=200))
    drawn, chunks, decoded = [0] * 32, [], 0
    while not drawn[31]:
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
            chunks += [len(c.token_ids) for c in batch.chunks if c.sequence_id == 31]
            assert batch.num_tokens <= scheduler.limits.step_tokens == chunk_tokens + 31
        for event in scheduler.complete(pipeline.finish_first()):
            drawn[event.request_id] += 1
        if not decoded and all(drawn[:31]):
            scheduler.add(request(31, 70, max_tokens=1))
            decoded = sum(drawn)
    assert chunks == [chunk_tokens] * (70 // chunk_tokens) + [70 % chunk_tokens] * (70 % chunk_tokens > 0)
    # The turn that was under way when it came, and its own; in each every other sequence draws a token.
    assert sum(drawn[:31]) - decoded <= 31 * (len(chunks) + 1)


def test_microbatches_are_balanced_in_time():
    """Two sequences of 400 tokens and ten of 4: by number, one batch would have both long ones and four short."""
    scheduler = make_scheduler(
        microbatches=2,
        max_in_flight=2,
        num_kv_blocks=500,
        max_context_tokens=800,
        max_sequences=16,
        chunk_tokens=512,
        costs=COSTS,
    )
    pipeline = FakePipeline(4)
    lengths = [400, 401, *range(4, 14)]
    for i, length in enumerate(lengths):
        scheduler.add(request(i, length, max_tokens=40))
    batches: list[ScheduledBatch] = []
    for _ in range(60):
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
            batches.append(batch)
        scheduler.complete(pipeline.finish_first())
    steady = [sum(COSTS.decode_s(chunk.stop) for chunk in batch.chunks) for batch in batches[30:]]
    assert all(0.97 < a / b < 1.03 for a, b in pairwise(steady))  # contexts grow from one to the next
    assert all(len(batch.chunks) <= 12 for batch in batches)


def first_tokens(events: list[TokenEvent]) -> list[int]:
    return list(dict.fromkeys(event.request_id for event in events))


def test_a_lower_priority_number_goes_first():
    events: list[TokenEvent] = []
    arrivals = {0: [request(0, 8), request(1, 8, priority=1), request(2, 8), request(3, 8, priority=-1)]}
    run(make_scheduler(max_sequences=1), arrivals, record=events.append)
    assert first_tokens(events) == [3, 0, 2, 1]


def test_whoever_makes_room_is_the_last_by_rank():
    scheduler = make_scheduler(num_kv_blocks=16)
    order: list[int] = []
    arrivals = {0: [request(0, 9, 20), request(1, 9, 20, priority=-1), request(2, 9, 20)]}
    run(
        scheduler,
        arrivals,
        record=lambda event: order.append(event.request_id) if event.finish_reason else None,
    )
    assert scheduler.metrics().preemptions.num_recomputes > 0
    assert order[0] == 1
    assert order[-1] == 2


def test_nobody_is_overtaken_for_longer_than_the_stated_number_of_steps():
    """Urgent requests keep coming; a patient one is served once they came AGING_STEPS after it, and no later."""
    scheduler, pipeline = make_scheduler(max_sequences=1, max_in_flight=1, microbatches=1), FakePipeline(4)
    scheduler.add(request(10_000, 3, 1, priority=1))
    arrived_at: dict[int, int] = {}
    for step in range(3 * AGING_STEPS):
        scheduler.add(request(step, 3, 1))
        arrived_at[step] = step
        batch = scheduler.schedule()
        assert batch is not None
        pipeline.submit(batch)
        (event,) = scheduler.complete(pipeline.finish_first())
        if event.request_id == 10_000:
            assert step == AGING_STEPS
            return
        assert arrived_at[event.request_id] <= AGING_STEPS
    raise AssertionError("starved")


def schedule_s(num_sequences: int) -> float:
    """The least time of one `schedule()` while all decode in one batch."""
    scheduler = make_scheduler(
        num_kv_blocks=20 * num_sequences,
        max_sequences=num_sequences,
        chunk_tokens=2 * num_sequences,
        microbatches=1,
    )
    for i in range(num_sequences):
        scheduler.add(request(i, 2, max_tokens=50))
    pipeline = FakePipeline(4)
    times_s: list[float] = []
    while scheduler.num_unfinished:
        begun_s = time.perf_counter()
        batch = scheduler.schedule()
        if batch is not None:
            if len(batch.chunks) == num_sequences and batch.num_tokens == num_sequences:
                times_s.append(time.perf_counter() - begun_s)
            pipeline.submit(batch)
            continue
        scheduler.complete(pipeline.finish_first())
    assert len(times_s) > 20
    return min(times_s)


def test_a_step_takes_no_longer_than_its_sequences_ask_for():
    """Four times the sequences take about four times as long; looking each up among all took sixteen times."""
    assert schedule_s(512) < 8 * schedule_s(128)
