"""Stages and links that take their modelled time over the scheduler's batches, and draw tokens that mean nothing."""

from collections import Counter, deque
from collections.abc import Sequence
from itertools import zip_longest

from apportion.cost.estimate import Steps, plan_timings
from apportion.cost.roofline import MixedStep, Step
from apportion.types.plan import Plan
from apportion.types.request import ScheduledBatch, StepResult

DRAWN_TOKEN_ID = 0


class ModelledPipeline:
    """Each stage or link takes batches in order, one at a time, as a worker does."""

    def __init__(self, plan: Plan) -> None:
        self.now_s = 0.0
        """When the last batch that was taken out had passed the whole pipeline."""
        self._plan = plan
        self._free_at_s = [0.0] * (2 * len(plan.stages) + 1)
        self._queue: deque[tuple[float, ScheduledBatch]] = deque()

    def submit(self, batch: ScheduledBatch) -> None:
        swap_s = self._plan.step_costs.swap_block_s * sum(move.kind != "copy" for move in batch.moves)
        at_s = self.now_s
        for place, duration_s in enumerate(self._passage_s(batch)):
            is_stage = place % 2
            at_s = max(at_s, self._free_at_s[place]) + duration_s + (swap_s if is_stage else 0.0)
            self._free_at_s[place] = at_s
        self._queue.append((at_s, batch))

    def finish_first(self) -> StepResult:
        self.now_s, batch = self._queue.popleft()
        drawing = [chunk for chunk in batch.chunks if chunk.sampling is not None]
        drawn = [chunk.sequence_id for chunk in drawing]
        drawn += [fork.sequence_id for chunk in drawing for fork in chunk.forks]
        return StepResult(step_id=batch.step_id, token_ids=dict.fromkeys(drawn, (DRAWN_TOKEN_ID,)), logits={})

    def _passage_s(self, batch: ScheduledBatch) -> Sequence[float]:
        """Entry, first stage, hop, second stage, …, last stage, exit."""
        plan = self._plan
        steps = Steps(prefill=(), decode=step_of(batch), overlapping=bool(self._queue))
        timings = plan_timings(plan.model, plan.cluster, plan.stages, steps)
        links = (timings.entry, *timings.hops, timings.exit)
        places = [
            timing for pair in zip_longest(links, timings.stages) for timing in pair if timing is not None
        ]
        return [timing.decode_s for timing in places]


def step_of(batch: ScheduledBatch) -> MixedStep:
    """What a batch asks of a stage; chunks alike in all that costs are counted together."""
    shapes = Counter((chunk.start, len(chunk.token_ids), chunk.num_draws) for chunk in batch.chunks)
    return MixedStep(
        steps=tuple(
            Step(sequences=num, new_tokens=tokens, start_tokens=start, sampled_rows=num * draws)
            for (start, tokens, draws), num in shapes.items()
        )
    )
