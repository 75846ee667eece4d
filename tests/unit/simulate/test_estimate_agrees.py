"""A plan's estimate and objective, in closed form, against a run of the real scheduler over the same stages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cost.estimate import plan_estimate, plan_objective_value
from apportion.engine.timing import Timing
from apportion.simulate.run import simulate
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

MODEL = read_model_spec(resolve_model("demo", weights=False))


@dataclass(frozen=True)
class Case:
    layers: Sequence[int]
    sequences: int
    microbatches: int
    chunk_tokens: int
    prompt_tokens: int = 128
    output_tokens: int = 64

    def plan(self) -> Plan:
        plan = hand_plan(
            MODEL,
            [[1]] * len(self.layers),
            self.layers,
            concurrency=self.sequences,
            microbatches=self.microbatches,
            chunk_tokens=self.chunk_tokens,
            max_context_tokens=self.prompt_tokens + self.output_tokens,
            devices=[cpu_device(f"d{i}") for i in range(len(self.layers))],
        )
        lengths = {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        return replace(plan, workload=replace(plan.workload, objective="throughput", **lengths))

    def times_s(self, num: int) -> tuple[Timing, list[float]]:
        """Of so many requests that come together, with no token in common; and of all their tokens."""
        timing, times_s = Timing(), []
        sampling = SamplingParams(max_tokens=self.output_tokens)
        prompts = [tuple(range(i * 1000, i * 1000 + self.prompt_tokens)) for i in range(num)]
        requests = [Request(id=i, prompt_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts)]
        for at_s, event in simulate(self.plan(), requests):
            timing.record(event, at_s)
            times_s.append(at_s)
        return timing, times_s


CASES = [
    Case([8], 1, 1, 32),
    Case([8], 4, 2, 32),
    Case([8], 32, 1, 32),
    Case([8], 32, 1, 256),
    Case([8], 16, 2, 64),
    Case([8], 32, 2, 64),
    Case([4, 4], 4, 2, 32),
    Case([4, 4], 32, 2, 32),
    Case([4, 4], 64, 3, 64, 128, 128),
    Case([4, 4], 32, 3, 128, 512),
    Case([3, 3, 2], 16, 3, 64),
    Case([3, 3, 2], 32, 4, 64, 256, 32),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_estimate_of_requests_that_come_together(case: Case):
    seen, expected = case.times_s(case.sequences)[0], plan_estimate(case.plan())
    assert seen.ttft_s == pytest.approx(expected.ttft_s, rel=0.09)
    assert seen.tokens_per_s == pytest.approx(expected.tokens_per_s, rel=0.09)
    if seen.decode_tokens_per_s:  # otherwise the first have ended before the last begin
        assert case.sequences / seen.decode_tokens_per_s == pytest.approx(expected.tpot_s, rel=0.03)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_objective_with_all_sequences_running(case: Case):
    """The tokens of requests 2R to 4R of 6R."""
    _, times_s = case.times_s(6 * case.sequences)
    num = case.sequences * case.output_tokens
    seconds = (times_s[4 * num - 1] - times_s[2 * num - 1]) / (2 * num)
    assert seconds == pytest.approx(plan_objective_value(case.plan()), rel=0.12)
