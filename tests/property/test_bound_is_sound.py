"""No division is better than the bound, whichever of its methods gives it: all shares, orders and ranges are tried.

A certificate never claims more than its own plan's value, so the value given here is one that a worse plan would have.
"""

from math import inf

import pytest
from enumerated import every_microbatches
from hypothesis import HealthCheck, given, settings
from property.test_planner_brute_force import TOLERANCE, BruteForce, problems

from apportion.planner.bounds import bound
from apportion.planner.bounds.bound import certify
from apportion.planner.stages import options

CASES = {
    "shares numbered": {},
    "shares relaxed": {(options, "MAX_SHARES"): 0},
    "shares relaxed, as for many devices": {
        (options, "MAX_SHARES"): 0,
        (bound, "MANY_GROUPS"): 0,
        (bound, "GOOD_GAP"): 0.0,
    },
    "shares relaxed, paths alone": {(options, "MAX_SHARES"): 0, (bound, "MAX_WAYS"): 0},
}


def check(problem, changes):
    numbers = every_microbatches(problem.workload, len(problem.cluster.devices))
    best = min(BruteForce(problem, number).best() for number in numbers)
    if best == inf:
        return
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), value in changes.items():
            patch.setattr(module, name, value)
        certificate = certify([problem], 1.5 * best)
    assert certificate.lower_bound <= best * (1 + TOLERANCE), certificate


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_no_division_beats_the_bound(problem, changes):
    check(problem, changes)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_no_division_beats_the_bound_at_length(problem, changes):
    check(problem, changes)
