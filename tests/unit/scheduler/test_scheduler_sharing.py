"""Blocks shared by sequences: prefix cache, samples of one prompt, and what a cancelled request leaves to others."""

import pytest
from fake_pipeline import FakePipeline, check_nothing_left, expected, make_scheduler, request, run

from apportion.scheduler.sequence import sample_seed
from apportion.types.request import TokenEvent
from apportion.types.step_costs import even_costs


def cached_by_request(arrivals, scheduler=None) -> tuple[dict[int, int], FakePipeline]:
    scheduler = scheduler or make_scheduler()
    pipeline, events = FakePipeline(4), list[TokenEvent]()
    outputs = run(scheduler, arrivals, pipeline, record=events.append)
    for arriving in arrivals.values():
        for each in arriving:
            assert outputs[each.id, 0] == expected(each)
    return {event.request_id: event.cached_tokens for event in events}, pipeline


@pytest.mark.parametrize("later", [0, 1, 30])
def test_a_shared_prompt_is_prefilled_once(later: int):
    """Also where the requests come together, and where the first has long ended."""
    first, *others = (request(i, 27, max_tokens=1, shared=24) for i in range(4))
    arrivals = {0: [first]}
    arrivals.setdefault(later, []).extend(others)
    cached, pipeline = cached_by_request(arrivals)
    assert cached == {0: 0, 1: 24, 2: 24, 3: 24}
    assert pipeline.computed_tokens == 27 + 3 * 3


def test_followers_wait_a_step_and_no_more():
    scheduler = make_scheduler(max_in_flight=4)
    for i in range(2):
        scheduler.add(request(i, 30, shared=28))
    spans = [[(c.sequence_id, c.start, c.stop) for c in b.chunks] for b in iter(scheduler.schedule, None)]
    assert spans == [[(0, 0, 16)], [(0, 16, 30)], [(1, 28, 30)]]


def test_a_prompt_found_whole_is_computed_from_its_last_block():
    """Its last token's logits are wanted."""
    cached, pipeline = cached_by_request(
        {0: [request(0, 16, 1, shared=16)], 5: [request(1, 16, 1, shared=16)]}
    )
    assert cached == {0: 0, 1: 12}
    assert pipeline.computed_tokens == 16 + 4


def test_what_a_conversation_said_before_is_found():
    first = request(0, 10, 9)
    turn = (*first.prompt_ids, *expected(first), 5, 6)
    second = type(first)(id=1, prompt_ids=turn, sampling=first.sampling)
    cached, _ = cached_by_request({0: [first], 30: [second]})
    assert cached == {0: 0, 1: 16}  # 18 computed tokens fill 4 blocks


def test_the_least_recently_used_is_evicted_first():
    scheduler = make_scheduler(num_kv_blocks=16)
    one_block = [request(i, 5, 1, shared=0) for i in range(3)]
    late = {0: [one_block[0]], 5: [one_block[1]], 10: [request(3, 5, 1)], 15: [request(4, 57, 1)]}
    run(scheduler, late)
    again, _ = cached_by_request(
        {0: [type(one_block[0])(id=9, prompt_ids=one_block[0].prompt_ids, sampling=one_block[0].sampling)]},
        scheduler,
    )
    assert again == {9: 0}
    assert scheduler.metrics().evicted_blocks > 0


def test_samples_share_their_prompt():
    """3 samples of 10 tokens: 3 blocks shared by 3 save 2 · 3; the last, half full, is copied for 2 of them."""
    scheduler, pipeline = make_scheduler(microbatches=1), FakePipeline(4)
    each = request(7, 10, 6, n=3)
    outputs = run(scheduler, {0: [each]}, pipeline)
    assert outputs == {(7, i): expected(each, sample_seed(0, i)) for i in range(3)}
    assert len({tuple(tokens) for tokens in outputs.values()}) == 3
    metrics = scheduler.metrics()
    assert metrics.peak_saved_blocks == (3 - 1) * 3
    assert metrics.copied_blocks == pipeline.moved["copy"] == 2
    assert pipeline.computed_tokens == 10 + 3 * 5


def test_samples_of_full_blocks_copy_nothing():
    scheduler, pipeline = make_scheduler(), FakePipeline(4)
    run(scheduler, {0: [request(7, 8, 6, n=4)]}, pipeline)
    assert (scheduler.metrics().peak_saved_blocks, pipeline.moved["copy"]) == (6, 0)


def test_samples_wait_for_places_for_all():
    scheduler = make_scheduler(max_sequences=4)
    arrivals = {0: [request(0, 3, 5, n=3), request(1, 3, 5, n=2), request(2, 3, 5)]}
    outputs = run(scheduler, arrivals)
    assert {key: len(tokens) for key, tokens in outputs.items()} == {
        (0, 0): 5, (0, 1): 5, (0, 2): 5, (1, 0): 5, (1, 1): 5, (2, 0): 5,
    }  # fmt: skip


def test_a_cancelled_request_frees_its_blocks_within_the_step():
    """Its prompt is in flight; the next step may use the blocks, as the stages execute it later."""
    scheduler, pipeline = make_scheduler(num_kv_blocks=16, costs=even_costs(2)), FakePipeline(4)
    scheduler.add(request(0, 60))
    while (batch := scheduler.schedule()) is not None:
        pipeline.submit(batch)
    assert scheduler.metrics().used_blocks > 10
    scheduler.add(request(1, 33, 1))
    assert scheduler.cancel(0)
    assert not scheduler.cancel(0)
    assert scheduler.metrics().used_blocks == 0
    outputs = []
    while len(pipeline):
        outputs += scheduler.complete(pipeline.finish_first())
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
    assert [(event.request_id, event.token_id) for event in outputs] == [(1, expected(request(1, 33, 1))[0])]
    check_nothing_left(scheduler)


def test_a_cancelled_leader_leaves_its_followers_to_go_on():
    scheduler = make_scheduler(max_in_flight=1)
    arrivals = {0: [request(0, 40, 2, shared=36), request(1, 40, 2, shared=36)]}
    outputs = run(scheduler, arrivals, cancels={1: [0]})
    assert outputs == {(1, 0): expected(request(1, 40, 2, shared=36))}
