"""Measured and predicted speed as three figures; the prediction is the scheduler's own run over modelled stages."""

from collections.abc import Iterable
from dataclasses import dataclass

from apportion.engine.timing import Timing
from apportion.simulate.run import simulate
from apportion.types.plan import Plan
from apportion.types.request import Request
from apportion.types.step_costs import PreemptMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    ttft_s: float
    tpot_s: float
    tokens_per_s: float

    @staticmethod
    def of(timing: Timing) -> "Speed":
        return Speed(ttft_s=timing.ttft_s, tpot_s=timing.tpot_s, tokens_per_s=timing.tokens_per_s)


def predicted_speed(plan: Plan, requests: Iterable[Request], preempt: PreemptMode = "auto") -> Speed:
    """Of requests that arrive together, each of whose samples draws its `max_tokens`."""
    timing = Timing()
    for at_s, event in simulate(plan, requests, preempt):
        timing.record(event, at_s)
    return Speed.of(timing)
