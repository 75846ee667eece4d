from dataclasses import replace
from itertools import pairwise

import pytest
from plans import hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cost.estimate import Steps, plan_timings
from apportion.cost.roofline import MixedStep, Step
from apportion.simulate.run import simulate
from apportion.types.errors import UsageError
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

MODEL = read_model_spec(resolve_model("demo", weights=False))


def request(request_id: int, prompt_tokens: int, output_tokens: int, n: int = 1) -> Request:
    prompt = tuple(range(request_id * prompt_tokens, (request_id + 1) * prompt_tokens))
    return Request(id=request_id, prompt_ids=prompt, sampling=SamplingParams(max_tokens=output_tokens), n=n)


def passage_s(plan: Plan, step: Step | MixedStep) -> list[float]:
    timings = plan_timings(plan.model, plan.cluster, plan.stages, Steps(prefill=(), decode=step))
    return [timing.decode_s for timing in timings.all]


def step(sequences: int, new_tokens: int, start_tokens: int, sampled_rows: int) -> Step:
    return Step(
        sequences=sequences, new_tokens=new_tokens, start_tokens=start_tokens, sampled_rows=sampled_rows
    )


def test_one_request_alone_takes_its_steps_one_after_another() -> None:
    plan = hand_plan(MODEL, [[1], [1]], [5, 3], chunk_tokens=12)
    times_s = [at_s for at_s, _ in simulate(plan, [request(0, 10, 4)])]
    assert times_s[0] == pytest.approx(sum(passage_s(plan, step(1, 10, 0, 1))))
    for place, (before, after) in enumerate(pairwise(times_s)):
        assert after - before == pytest.approx(sum(passage_s(plan, step(1, 1, 10 + place, 1))))


def test_chunks_follow_one_another_through_the_stages() -> None:
    """Three chunks of a prompt, nothing else: the makespan of a flow shop, worked out place by place."""
    plan = hand_plan(MODEL, [[1], [1]], [4, 4], chunk_tokens=8, max_context_tokens=32)
    chunks = [passage_s(plan, step(1, 8, start, int(start == 16))) for start in (0, 8, 16)]
    free_at_s = [0.0] * len(chunks[0])
    order = [0, 1, 3, 2, 4]  # entry, stage, hop, stage, exit
    for chunk in chunks:
        at_s = 0.0
        for place in order:
            at_s = free_at_s[place] = max(at_s, free_at_s[place]) + chunk[place]
    ((first_s, _),) = simulate(plan, [request(0, 24, 1)])
    assert first_s == pytest.approx(free_at_s[4])
    assert first_s < sum(map(sum, chunks))


def test_prompts_of_others_lengthen_the_time_between_tokens():
    plan = hand_plan(MODEL, [[1], [1]], [4, 4], concurrency=4, microbatches=2, chunk_tokens=12)

    def gaps_s(num: int) -> list[float]:
        """Of the first of so many requests."""
        events = simulate(plan, [request(i, 48, 8) for i in range(num)])
        times_s = [at_s for at_s, event in events if event.request_id == 0]
        return [after - before for before, after in pairwise(times_s)]

    steady_s = 2 * max(passage_s(plan, step(2, 1, 52, 2)))
    least_s = max(passage_s(plan, step(1, 12, 0, 0)))
    most_s = max(passage_s(plan, MixedStep(steps=(step(1, 12, 36, 1), step(1, 1, 52, 1)))))
    alone_s, gaps = gaps_s(1), gaps_s(4)
    assert max(alone_s) < 1.05 * steady_s
    # Between two of its tokens the slower stage takes three chunks: one in each batch on its way.
    assert all(3 * least_s <= gap <= 3 * most_s for gap in gaps[:3])
    assert all(gap == pytest.approx(steady_s, rel=0.03) for gap in gaps[-3:])


def test_samples_share_their_prompt() -> None:
    plan = hand_plan(MODEL, [[1]], [8], concurrency=4, chunk_tokens=12)
    events = list(simulate(plan, [request(0, 10, 3, n=4)]))
    assert len(events) == 4 * 3
    assert [event.sample for _, event in events[:4]] == [0, 1, 2, 3]
    assert len({at_s for at_s, _ in events[:4]}) == 1


def test_swapping_takes_time() -> None:
    plan = hand_plan(MODEL, [[1]], [8], concurrency=4, num_kv_blocks=18, chunk_tokens=12)
    plan = replace(plan, num_swap_blocks=32)
    requests = [request(i, 12, 16) for i in range(4)]
    roomy = hand_plan(MODEL, [[1]], [8], concurrency=4, chunk_tokens=12)
    ends_s = [max(at_s for at_s, _ in simulate(p, requests, "swap")) for p in (roomy, plan)]
    assert ends_s[0] < ends_s[1]


def test_what_cannot_run_is_refused() -> None:
    plan = hand_plan(MODEL, [[1]], [8], max_context_tokens=16)
    with pytest.raises(UsageError, match="the context is 16"):
        next(simulate(plan, [request(0, 20, 1)]))


def test_a_mixed_step_is_the_sum_of_its_sequences() -> None:
    mixed = MixedStep(steps=(step(3, 1, 9, 3), step(1, 4, 2, 0)))
    assert (mixed.tokens, mixed.sampled_rows) == (7, 3)
    assert mixed.attended(None) == 3 * 10 + (3 + 4 + 5 + 6)
    assert mixed.attended(4) == 3 * 4 + (3 + 4 + 4 + 4)
    assert mixed.context_read(None) == 3 * 10 + 6
    assert mixed.context_read(4) == 3 * 4 + 6
