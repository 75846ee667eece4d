"""Whatever comes, in whatever order, under whatever shortage: every request gets exactly its own tokens."""

from dataclasses import replace

from fake_pipeline import FakePipeline, RightAtRandom, expected, make_scheduler, request, run
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.scheduler.sequence import sample_seed
from apportion.types.request import Request
from apportion.types.step_costs import StepCosts

MAX_SEQUENCES = 5
COSTS = StepCosts(
    decode_token_s=1e-3,
    context_token_s=1e-5,
    prefill_token_s=1e-3,
    swap_block_s=3e-3,
    block_bytes=1,
    prefill_depth=2,
)


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(step of arrival, request): prompts share beginnings, whole prompts repeat."""
    num = draw(st.integers(1, 7))
    arriving: list[tuple[int, Request]] = []
    for i in range(num):
        shared = draw(st.sampled_from([0, 3, 8, 17]))
        num_prompt = shared + draw(st.integers(1, 20))
        n = draw(st.sampled_from([1, 1, 2, MAX_SEQUENCES]))
        made = request(
            i % 3,
            num_prompt,
            draw(st.integers(1, 14)),
            n=n,
            priority=draw(st.integers(-1, 2)),
            shared=shared,
        )
        arriving.append(
            (
                draw(st.integers(0, 12)),
                Request(
                    id=i, prompt_ids=made.prompt_ids, sampling=made.sampling, n=n, priority=made.priority
                ),
            )
        )
    return arriving


@settings(max_examples=150, deadline=None)
@given(
    arriving=requests(),
    num_kv_blocks=st.integers(13, 40),
    num_swap_blocks=st.sampled_from([0, 9, 100]),
    mode=st.sampled_from(["auto", "swap", "recompute"]),
    microbatches=st.integers(1, 3),
    chunk_tokens=st.integers(3, 20),
    num_stages=st.integers(1, 3),
    cancels=st.dictionaries(st.integers(0, 6), st.integers(0, 25)),
    restarts=st.lists(st.integers(1, 30), max_size=2),
    drafts=st.one_of(
        st.none(), st.builds(RightAtRandom, st.integers(1, 6), st.floats(0, 1), st.integers(0, 9))
    ),
)
def test_every_request_gets_exactly_its_own_tokens(
    arriving: list[tuple[int, Request]],
    num_kv_blocks: int,
    num_swap_blocks: int,
    mode: str,
    microbatches: int,
    chunk_tokens: int,
    num_stages: int,
    cancels: dict[int, int],
    restarts: list[int],
    drafts: RightAtRandom | None,
):
    scheduler = make_scheduler(
        costs=COSTS,
        preempt=mode,
        drafts=drafts,
        num_kv_blocks=num_kv_blocks,
        num_swap_blocks=num_swap_blocks,
        max_sequences=MAX_SEQUENCES,
        microbatches=microbatches,
        max_in_flight=max(microbatches, num_stages + 1),
        chunk_tokens=chunk_tokens,
        max_context_tokens=52,
    )
    arrivals: dict[int, list[Request]] = {}
    for step, each in arriving:
        arrivals.setdefault(step, []).append(each)
    cancelled: dict[int, list[int]] = {}
    for request_id, step in cancels.items():
        cancelled.setdefault(step, []).append(request_id)
    pipeline = FakePipeline(scheduler.limits.block_tokens)
    smaller = replace(scheduler.limits, num_kv_blocks=13, num_swap_blocks=0, max_sequences=MAX_SEQUENCES)
    outputs = run(scheduler, arrivals, pipeline, cancelled, restarts=dict.fromkeys(restarts, smaller))
    for _, each in arriving:
        for sample in range(each.n):
            wanted = expected(each, sample_seed(each.sampling.seed, sample))
            got = outputs.get((each.id, sample), [])
            if each.id in cancels:
                assert got == wanted[: len(got)]
            else:
                assert got == wanted
    metrics = scheduler.metrics()
    counts = metrics.preemptions
    assert 0 <= metrics.accepted_tokens <= metrics.drafted_tokens
    assert (counts.num_swaps == 0) or (mode != "recompute" and num_swap_blocks > 0)
    assert counts.recomputed_tokens >= 0
    if restarts:
        return
    assert counts.swapped_out_blocks == pipeline.moved["swap out"]
    if not cancels:
        planned = sum(len(r.prompt_ids) + r.n * (r.sampling.max_tokens - 1) for _, r in arriving)
        wrong = metrics.drafted_tokens - metrics.accepted_tokens
        assert pipeline.computed_tokens == planned + counts.recomputed_tokens - metrics.cached_tokens + wrong
