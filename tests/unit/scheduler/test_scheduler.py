"""The scheduler driven by a fake executor whose next token depends on the tokens before it, and on nothing else."""

import pytest
from fake_pipeline import FakePipeline, expected, limits, make_scheduler, request, run

from apportion.scheduler.sequence import sample_seed
from apportion.types.errors import UsageError
from apportion.types.request import Request, SamplingParams, StepResult
from apportion.types.step_costs import PreemptMode, StepCosts, even_costs

EOS = 999
ARRIVALS = {0: [request(0, 3), request(1, 30)], 2: [request(2, 17)], 5: [request(3, 1), request(4, 40)]}
REQUESTS = [r for arriving in ARRIVALS.values() for r in arriving]
EXPECTED = {(r.id, 0): expected(r) for r in REQUESTS}
COSTS = StepCosts(
    decode_token_s=1e-3,
    context_token_s=1e-5,
    prefill_token_s=1e-3,
    swap_block_s=1e-3,
    block_bytes=100,
    prefill_depth=3,
)


def test_each_request_gets_its_own_tokens():
    scheduler = make_scheduler()
    assert run(scheduler, ARRIVALS) == EXPECTED
    counts = scheduler.metrics().preemptions
    assert counts.num_swaps == counts.num_recomputes == 0


@pytest.mark.parametrize("num_kv_blocks", [16, 20])
@pytest.mark.parametrize(("mode", "swaps", "recomputes"), [("swap", 1, 0), ("recompute", 0, 1)])
def test_preempted_requests_are_answered_identically(
    num_kv_blocks: int, mode: PreemptMode, swaps: int, recomputes: int
):
    scheduler = make_scheduler(costs=COSTS, preempt=mode, num_kv_blocks=num_kv_blocks, num_swap_blocks=64)
    pipeline = FakePipeline(4)
    assert run(scheduler, ARRIVALS, pipeline) == EXPECTED
    counts = scheduler.metrics().preemptions
    assert (counts.num_swaps >= swaps, counts.num_recomputes >= recomputes) == (True, True)
    assert bool(counts.num_swaps) == bool(swaps)
    assert bool(counts.num_recomputes) == bool(recomputes)
    assert counts.swapped_out_blocks == pipeline.moved["swap out"]
    assert counts.swapped_in_blocks == pipeline.moved["swap in"]
    assert counts.swapped_bytes == 100 * (pipeline.moved["swap out"] + pipeline.moved["swap in"])
    planned = sum(len(r.prompt_ids) + r.sampling.max_tokens - 1 for r in REQUESTS)
    assert pipeline.computed_tokens == planned + counts.recomputed_tokens


@pytest.mark.parametrize(("swap_block_s", "swaps"), [(1e-6, True), (1.0, False)])
def test_the_cheaper_way_to_make_room_is_taken(swap_block_s: float, swaps: bool):
    costs = StepCosts(
        decode_token_s=1e-3,
        context_token_s=0,
        prefill_token_s=1e-3,
        swap_block_s=swap_block_s,
        block_bytes=1,
        prefill_depth=3,
    )
    scheduler = make_scheduler(costs=costs, num_kv_blocks=16, num_swap_blocks=64)
    assert run(scheduler, ARRIVALS) == EXPECTED
    counts = scheduler.metrics().preemptions
    assert (counts.num_swaps > 0, counts.num_recomputes > 0) == (swaps, not swaps)


def test_a_full_swap_space_means_recomputing():
    scheduler = make_scheduler(costs=COSTS, preempt="swap", num_kv_blocks=16, num_swap_blocks=2)
    assert run(scheduler, ARRIVALS) == EXPECTED
    assert scheduler.metrics().preemptions.num_recomputes > 0


def test_chunks_of_one_prompt_fill_the_pipeline():
    scheduler = make_scheduler()
    scheduler.add(request(0, 40))
    spans = [(b.chunks[0].start, b.chunks[0].stop) for b in iter(scheduler.schedule, None)]
    assert spans == [(0, 16), (16, 32), (32, 40)]


def test_decode_is_spread_over_the_microbatches():
    scheduler = make_scheduler(microbatches=2, max_in_flight=2)
    for i in range(6):
        scheduler.add(request(i, 1))
    sizes = [len(batch.chunks) for batch in iter(scheduler.schedule, None)]
    assert sizes == [3, 3]


def test_stop_token_ends_a_sequence_unless_ignored():
    for ignore_eos, reason in ((False, "stop"), (True, None)):
        scheduler = make_scheduler([EOS])
        sampling = SamplingParams(max_tokens=4, ignore_eos=ignore_eos)
        scheduler.add(Request(id=0, prompt_ids=(1,), sampling=sampling))
        batch = scheduler.schedule()
        assert batch is not None
        result = StepResult(step_id=batch.step_id, token_ids={batch.chunks[0].sequence_id: (EOS,)}, logits={})
        assert [event.finish_reason for event in scheduler.complete(result)] == [reason]


@pytest.mark.parametrize("changes", [{"max_context_tokens": 10}, {"num_kv_blocks": 5, "block_tokens": 2}])
def test_output_ends_at_the_context(changes: dict[str, int]):
    scheduler = make_scheduler(**changes)
    assert len(run(scheduler, {0: [request(0, 6, max_tokens=50)]})[0, 0]) == 4


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "n", "message"),
    [
        (64, 1, 1, "64 tokens and the context is 64"),
        (0, 1, 1, "no tokens"),
        (3, 0, 1, "asks for 0 tokens"),
        (3, 1, 9, "asks for 9 samples and the plan is for 8"),
        (3, 1, 0, "asks for 0 samples"),
    ],
)
def test_impossible_requests_are_refused(num_prompt: int, max_tokens: int, n: int, message: str):
    assert limits().max_context_tokens == 64
    with pytest.raises(UsageError, match=message):
        make_scheduler().add(request(0, num_prompt, max_tokens, n=n))


def test_a_restart_ends_what_the_smaller_devices_can_never_run():
    scheduler = make_scheduler(num_kv_blocks=64, max_context_tokens=64)
    long, short = request(0, 30, max_tokens=20), request(1, 4, max_tokens=6)
    scheduler.add(long)
    scheduler.add(short)
    pipeline = FakePipeline(4)
    pipeline.submit(scheduler.schedule())
    scheduler.complete(pipeline.finish_first())
    assert scheduler.restart(limits(num_kv_blocks=7), even_costs(1)) == [0]
    outputs = run(scheduler, {0: []}, FakePipeline(4))
    assert outputs == {(1, 0): expected(short)}


def test_a_restart_repeats_no_token_and_loses_none():
    scheduler, pipeline = make_scheduler(), FakePipeline(4)
    each = request(3, 10, max_tokens=8, n=2)
    outputs = run(scheduler, {0: [each]}, pipeline, restarts={2: scheduler.limits, 5: scheduler.limits})
    assert outputs == {(3, i): expected(each, sample_seed(0, i)) for i in range(2)}
    assert pipeline.computed_tokens > 10 + 2 * 7
