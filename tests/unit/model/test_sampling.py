import pytest
import torch

from apportion.model import sampling
from apportion.types.request import Draw, SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])


def sample(logits_V: torch.Tensor, params: SamplingParams, position: int) -> int:
    return sampling.sample(logits_V[None], [(0, Draw(7, params), position)])[0]


def params(**changes: float) -> SamplingParams:
    return SamplingParams(max_tokens=1, **changes)


def test_zero_temperature_takes_the_largest():
    assert sample(LOGITS, params(), 0) == 1


def test_draws_of_a_batch_are_those_of_each_alone():
    logits_NV = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    wanted = [params(), params(temperature=0.9, seed=3), params(), params(temperature=0.5), params()]
    rows = [0, 1, 1, 3, 4]
    draws = [(row, Draw(10 + i, one), 6 + i) for i, (row, one) in enumerate(zip(rows, wanted, strict=True))]
    alone = [
        sample(logits_NV[row], one, 6 + i) for i, (row, one) in enumerate(zip(rows, wanted, strict=True))
    ]
    assert sampling.sample(logits_NV, draws) == alone


def test_draw_depends_on_seed_and_position_alone():
    draws = [sample(LOGITS, params(temperature=1.0, seed=5), p) for p in range(200)]
    assert draws == [sample(LOGITS, params(temperature=1.0, seed=5), p) for p in range(200)]
    for other in (6, 7, 5 + 2**31, 5 + 2**40):
        assert draws != [sample(LOGITS, params(temperature=1.0, seed=other), p) for p in range(200)]
    assert len(set(draws)) > 2


def test_draws_follow_the_distribution():
    draws = torch.tensor([sample(LOGITS, params(temperature=0.7), p) for p in range(4000)])
    seen = torch.bincount(draws, minlength=4) / len(draws)
    torch.testing.assert_close(seen, torch.softmax(LOGITS / 0.7, -1), atol=0.03, rtol=0)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.5, {1}), (0.8, {1, 2}), (0.95, {0, 1, 2})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]):
    draws = {sample(LOGITS, params(temperature=1.0, top_p=top_p), p) for p in range(500)}
    assert draws == allowed
