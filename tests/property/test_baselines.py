"""The planner against the usual rules, on random models, clusters and workloads; each problem is one seed."""

import pytest
from random_problems import random_problem

from apportion.planner.baselines.compare import baselines, baselines_with_chunk
from apportion.planner.build import find_division
from apportion.planner.problem import chunk_candidates, make_problem

TOLERANCE = 1 + 1e-9
BATCH = 25
CHUNK_SEEDS = (79, 209, 3143, 3964, 4351, 4595, 4728)
"""Where the largest prefill chunk that fits is not the best."""


def check_seed(seed: int) -> None:
    problem = random_problem(seed)
    found = find_division(*problem.parts)
    if found is None:
        smallest = chunk_candidates(problem.workload.max_context_tokens)[-1]
        asked = make_problem(*problem.parts, smallest)
        assert not any(one.division for one in baselines_with_chunk(asked)), seed
        return
    for one in baselines(found.problem):
        if one.division is not None:
            assert found.value <= one.division.value * TOLERANCE, (seed, one)


@pytest.mark.parametrize("first", range(0, 100, BATCH))
def test_no_rule_beats_the_plan(first):
    for seed in range(first, first + BATCH):
        check_seed(seed)


def test_even_shares_in_a_pipeline_do_not_beat_the_plan():
    """Shares best for the group alone would lose to even ones here, by 1.3 %."""
    check_seed(7531)


@pytest.mark.nightly
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("first", range(0, 2000, 200))
def test_no_rule_beats_the_plan_at_length(first):
    for seed in range(first, first + 200):
        check_seed(seed)


@pytest.mark.parametrize("seed", CHUNK_SEEDS)
def test_no_rule_beats_the_plan_with_another_chunk(seed):
    check_seed(seed)
