import pytest
import torch

from apportion.model.sampling import sample
from apportion.types.request import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def params(**changes: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **changes)


def test_zero_temperature_takes_the_largest():
    assert sample(LOGITS, params(), 0) == 1


def test_draw_depends_on_seed_and_position_alone():
    draws = [sample(LOGITS, params(temperature=1.0, seed=5), p) for p in range(200)]
    assert draws == [sample(LOGITS, params(temperature=1.0, seed=5), p) for p in range(200)]
    assert draws != [sample(LOGITS, params(temperature=1.0, seed=6), p) for p in range(200)]
    assert len(set(draws)) > 2


def test_draws_follow_the_distribution():
    draws = torch.tensor([sample(LOGITS, params(temperature=0.7), p) for p in range(4000)])
    seen = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(seen, torch.softmax(LOGITS / 0.7, -1), atol=0.03, rtol=0)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, {1}), (0.8, {1, 2}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]):
    draws = {sample(LOGITS, params(temperature=1.0, top_p=top_p), p) for p in range(500)}
    assert draws == allowed
