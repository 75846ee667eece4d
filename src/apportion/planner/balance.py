"""Balance over stages, ε = max_j |t_j − mean(t)|, and the smallest ε that any layer allocation reaches.

The stages keep their devices, order and shares; only the cuts between their layers move, under memory. Exact, by
branch and bound: what the stages still to be cut can add to the sum, and to the extremes, bounds ε from below.
"""

from collections.abc import Sequence
from functools import cache
from math import inf

from apportion.cost.estimate import group_step_s, stage_members, workload_steps
from apportion.cost.memory import shard_memory
from apportion.cost.objective import microbatch_sequences
from apportion.cost.shard import Shard
from apportion.cost.statements import epsilon_s
from apportion.cost.traffic import group_link
from apportion.planner.axes import StageKind, make_shard
from apportion.planner.problem import Problem
from apportion.planner.search import StageKinds
from apportion.types.cluster import Device
from apportion.types.plan import Balance, Stage


def balance(problem: Problem, stages: Sequence[Stage], microbatches: int) -> Balance:
    """Of the stages' decode times of one microbatch."""
    times = StageTimes(problem, stages, microbatches)
    own_s = [times.seconds(index, stage.layer_start, stage.layer_stop) for index, stage in enumerate(stages)]
    epsilon = epsilon_s(own_s)
    return Balance(epsilon_s=epsilon, smallest_epsilon_s=smallest_epsilon(times, epsilon))


class StageTimes:
    """Decode time of stage `index` for any layers [start, stop); infinite where they do not fit its memory."""

    def __init__(self, problem: Problem, stages: Sequence[Stage], microbatches: int) -> None:
        self.problem = problem
        self.stages = stages
        self.num_layers = problem.model.num_layers
        sequences = microbatch_sequences(problem.workload.concurrency, microbatches)
        self.step = workload_steps(problem.workload, problem.capacity.chunk_tokens, sequences).decode
        self.kinds = StageKinds(problem.model)
        self._seconds: dict[tuple[int, int], float] = {}

    def seconds(self, index: int, start: int, stop: int) -> float:
        number = int(self.kinds.index[start, stop])
        if (index, number) not in self._seconds:
            self._seconds[index, number] = self._compute(index, self.kinds.kinds[number])
        return self._seconds[index, number]

    def _compute(self, index: int, kind: StageKind) -> float:
        problem, stage = self.problem, self.stages[index]
        members = [
            (device, _reshaped(shard, kind))
            for device, shard in stage_members(problem.model, problem.cluster, stage)
        ]
        if not all(self._fits(device, shard) for device, shard in members):
            return inf
        link = group_link(problem.cluster, stage.split.device_ids)
        return group_step_s(problem.model, members, link, self.step)

    def _fits(self, device: Device, shard: Shard) -> bool:
        needed = shard_memory(self.problem.model, shard, self.problem.capacity, reserved_bytes=0).engine_bytes
        return needed <= device.usable_bytes


def _reshaped(shard: Shard, kind: StageKind) -> Shard:
    return make_shard(
        kind,
        shard.weight_format,
        shard.rank,
        shard.size,
        shard.kv_heads,
        shard.ffn_columns,
        shard.vocab_rows,
    )


def smallest_epsilon(times: StageTimes, reached: float) -> float:
    """The least ε over all cuts; `reached` is that of one of them."""
    num_stages, num_layers = len(times.stages), times.num_layers

    def stops(index: int, start: int) -> range:
        if index == num_stages - 1:
            return range(num_layers, num_layers + 1)
        return range(start + 1, num_layers - (num_stages - index - 1) + 1)

    @cache
    def rest(index: int, start: int) -> tuple[float, float, float, float]:
        """Of the stages from `index` on: least and greatest sum, least maximum, greatest minimum."""
        if index == num_stages:
            return (0.0, 0.0, -inf, inf)
        ways = [
            (seconds + low, seconds + high, max(seconds, least_max), min(seconds, greatest_min))
            for stop in stops(index, start)
            if (seconds := times.seconds(index, start, stop)) < inf
            for low, high, least_max, greatest_min in [rest(index + 1, stop)]
            if low < inf
        ]
        if not ways:
            return (inf, -inf, inf, -inf)
        lows, highs, maxima, minima = zip(*ways, strict=True)
        return (min(lows), max(highs), min(maxima), max(minima))

    best = reached

    def descend(index: int, start: int, total: float, least: float, most: float) -> None:
        nonlocal best
        low, high, rest_most, rest_least = rest(index, start)
        highest_mean, lowest_mean = (total + high) / num_stages, (total + low) / num_stages
        bound = max(max(most, rest_most) - highest_mean, lowest_mean - min(least, rest_least))
        if low == inf or bound >= best:
            return
        if index == num_stages:
            best = bound
            return
        middle = (lowest_mean + highest_mean) / 2
        children = [(times.seconds(index, start, stop), stop) for stop in stops(index, start)]
        for seconds, stop in sorted(children, key=lambda child: abs(child[0] - middle)):
            if seconds < inf:
                descend(index + 1, stop, total + seconds, min(least, seconds), max(most, seconds))

    descend(0, 0, 0.0, inf, -inf)
    return best
