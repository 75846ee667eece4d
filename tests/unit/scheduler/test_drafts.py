"""Several new tokens of a sequence in one step, of which a part is right."""

from collections.abc import Sequence

import pytest
from fake_pipeline import FakePipeline, RightAtRandom, expected, make_scheduler, request, run

from apportion.scheduler.scheduler import Scheduler


class Prefix:
    """Guesses that are right for the first `right` tokens of each proposal of `num`."""

    def __init__(self, num: int, right: int) -> None:
        self.asked: list[int] = []
        self._guess = RightAtRandom(num, 1.0)
        self._num, self._right = num, right

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        self.asked.append(most)
        one = request(0, 5, 20)
        output = expected(one)[len(token_ids) - 5 :]
        return [
            token if i < self._right else (token + 1) % 500 for i, token in enumerate(output[: self._num])
        ]


def steps_to_end(scheduler: Scheduler, one_id: int = 0) -> int:
    """Steps that its 20 tokens take, of which the first is drawn after the prompt."""
    pipeline = FakePipeline(scheduler.limits.block_tokens)
    scheduler.add(request(one_id, 5, 20))
    tokens: list[int] = []
    steps = 0
    while scheduler.num_unfinished:
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
        tokens += [event.token_id for event in scheduler.complete(pipeline.finish_first())]
        steps += 1
    assert tokens == expected(request(one_id, 5, 20))
    return steps


@pytest.mark.parametrize(
    ("num", "right", "steps"),
    [
        (3, 3, 1 + 5),  # 19 tokens after the first, 4 a step: ⌈19/4⌉
        (3, 1, 1 + 10),  # 2 a step: ⌈19/2⌉
        (3, 0, 1 + 19),
        (7, 7, 1 + 3),  # 8 a step: ⌈19/8⌉
        (50, 50, 1 + 3),  # no more than the places of the seven others
    ],
)
def test_what_is_right_saves_steps(num: int, right: int, steps: int):
    scheduler = make_scheduler(drafts=Prefix(num, right), microbatches=1, max_in_flight=1)
    assert steps_to_end(scheduler) == steps


def test_drafts_take_no_place_of_a_sequence_and_stop_with_the_last_token():
    """Of eight places one is taken: seven drafts; of 20 tokens the last needs none behind it."""
    drafts = Prefix(7, 7)
    scheduler = make_scheduler(drafts=drafts, microbatches=1, max_in_flight=1)
    steps_to_end(scheduler)
    assert drafts.asked == [
        7,
        7,
        2,
    ]  # 1 + 8 + 8 drawn: of the three that follow the last is drawn after the second
    full = Prefix(7, 7)
    scheduler = make_scheduler(drafts=full, max_sequences=2, microbatches=1)
    run(scheduler, {0: [request(i, 5, 20) for i in range(2)]})
    assert max(full.asked, default=0) <= 1  # once one has ended


def test_wrong_drafts_hold_no_blocks_and_are_not_found_by_others():
    """Blocks of four: after the prompt's five tokens and one more, seven wrong drafts would take two blocks more."""
    scheduler = make_scheduler(drafts=Prefix(7, 0), microbatches=1, max_in_flight=1)
    pipeline = FakePipeline(scheduler.limits.block_tokens)
    scheduler.add(request(0, 5, 20))
    used: list[tuple[int, int]] = []
    published: set[int] = set()
    while scheduler.num_unfinished:
        batch = scheduler.schedule()
        assert batch is not None
        before = scheduler.metrics().used_blocks
        pipeline.submit(batch)
        scheduler.complete(pipeline.finish_first())
        metrics = scheduler.metrics()
        used.append((before, metrics.used_blocks))
        published.add(metrics.cached_blocks + metrics.used_blocks)
    assert used[:3] == [(2, 2), (4, 2), (4, 2)]  # ⌈(5 + 8)/4⌉ = 4, of which ⌈6/4⌉ = 2 stay
    # in the end 24 tokens have been computed (the last is never): six whole blocks of right tokens can be found
    assert scheduler.metrics().cached_blocks == 6


def test_others_are_not_preempted_for_drafts():
    scheduler = make_scheduler(
        drafts=Prefix(7, 7), num_kv_blocks=12, max_sequences=8, max_context_tokens=40, microbatches=1
    )
    run(scheduler, {0: [request(0, 5, 20), request(1, 5, 18)]})
    preemptions = scheduler.metrics().preemptions
    assert preemptions.num_recomputes + preemptions.num_swaps == 0
    assert scheduler.metrics().accepted_tokens > 0


def test_a_token_that_ends_a_sequence_ends_it_among_accepted_ones():
    one = request(0, 5, 20)
    end = expected(one)[6]
    assert end not in expected(one)[:6]
    scheduler = make_scheduler([end], drafts=Prefix(7, 7), microbatches=1, max_in_flight=1)
    assert run(scheduler, {0: [one]}) == {(0, 0): expected(one)[:7]}
