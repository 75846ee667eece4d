"""Balance over stages, ε = max_j |t_j − mean(t)|, and the smallest ε that any layer allocation reaches.

The stages keep their devices, order and shares; only the cuts between their layers move, under memory. Exact, by
branch and bound: what the stages still to be cut can add to the sum, and to the extremes, bounds ε from below.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple

from apportion.cost.estimate import microbatch_steps
from apportion.cost.group_step import Members, group_step_s, members_at_work, stage_members
from apportion.cost.memory import shard_memory
from apportion.cost.shard import Shard
from apportion.cost.statements import epsilon_s
from apportion.cost.traffic import group_link
from apportion.planner.problem import Problem
from apportion.planner.stages.axes import StageKind, make_shard
from apportion.planner.stages.kinds import kinds_of
from apportion.planner.stages.streamed import fewest_streamed, may_stream
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
        steps = microbatch_steps(problem.workload, problem.capacity.chunk_tokens, microbatches)
        self.step, self.overlapping = steps.decode, steps.overlapping
        self.kinds = kinds_of(problem.model)
        self._seconds: dict[tuple[int, int], float] = {}

    def seconds(self, index: int, start: int, stop: int) -> float:
        number = int(self.kinds.index[start, stop])
        if (index, number) not in self._seconds:
            self._seconds[index, number] = self._compute(index, self.kinds.kinds[number])
        return self._seconds[index, number]

    def _compute(self, index: int, kind: StageKind) -> float:
        problem, stage = self.problem, self.stages[index]
        in_format = problem.in_format(stage.weight_format)
        devices = [problem.cluster.device(device_id) for device_id in stage.split.device_ids]
        members = [
            (device, _reshaped(shard, kind))
            for device, shard in stage_members(problem.model, problem.cluster, stage)
        ]
        if may_stream(in_format, devices):
            streamed = fewest_streamed(in_format, members)
            if streamed is None:
                return inf
            return self._step_s([(device, replace(shard, streamed=streamed)) for device, shard in members])
        if not all(self._fits(device, shard) for device, shard in members):
            return inf
        return self._step_s(members)

    def _step_s(self, members: Members) -> float:
        link = group_link(self.problem.cluster, [device.id for device, _ in members])
        members = members_at_work(self.problem.cluster, members, overlapping=self.overlapping)
        return group_step_s(self.problem.model, members, link, self.step)

    def _fits(self, device: Device, shard: Shard) -> bool:
        needed = shard_memory(self.problem.model, shard, self.problem.capacity, device).engine_bytes
        return needed <= device.usable_bytes


def _reshaped(shard: Shard, kind: StageKind) -> Shard:
    return make_shard(
        kind,
        shard.formats,
        shard.rank,
        shard.size,
        shard.kv_heads,
        shard.ffn_columns,
        shard.vocab_rows,
    )


def smallest_epsilon(times: StageTimes, reached: float) -> float:
    """The least ε over all cuts; `reached` is that of one of them."""
    return _Cuts(times, reached).search()


class Rest(NamedTuple):
    """Of the stages still to be cut: least and greatest sum, least maximum, greatest minimum."""

    low: float
    high: float
    least_max: float
    greatest_min: float


NO_WAY = Rest(inf, -inf, inf, -inf)


class _Cuts:
    def __init__(self, times: StageTimes, reached: float) -> None:
        self.times = times
        self.num_stages = len(times.stages)
        self.best = reached
        self._rest: dict[tuple[int, int], Rest] = {}

    def search(self) -> float:
        self._descend(0, 0, 0.0, inf, -inf)
        return self.best

    def _ways(self, index: int, start: int) -> list[tuple[float, int]]:
        """(seconds, stop) of stage `index` from layer `start`, leaving a layer for each later stage."""
        last = self.times.num_layers - (self.num_stages - index - 1)
        first = last if index == self.num_stages - 1 else start + 1
        ways = [(self.times.seconds(index, start, stop), stop) for stop in range(first, last + 1)]
        return [way for way in ways if way[0] < inf]

    def rest(self, index: int, start: int) -> Rest:
        if index == self.num_stages:
            return Rest(0.0, 0.0, -inf, inf)
        if (index, start) not in self._rest:
            ways = [
                Rest(
                    seconds + rest.low,
                    seconds + rest.high,
                    max(seconds, rest.least_max),
                    min(seconds, rest.greatest_min),
                )
                for seconds, stop in self._ways(index, start)
                if (rest := self.rest(index + 1, stop)) != NO_WAY
            ]
            self._rest[index, start] = (
                Rest(
                    min(way.low for way in ways),
                    max(way.high for way in ways),
                    min(way.least_max for way in ways),
                    max(way.greatest_min for way in ways),
                )
                if ways
                else NO_WAY
            )
        return self._rest[index, start]

    def _descend(self, index: int, start: int, total: float, least: float, most: float) -> None:
        rest = self.rest(index, start)
        highest_mean = (total + rest.high) / self.num_stages
        lowest_mean = (total + rest.low) / self.num_stages
        most_of_all, least_of_all = max(most, rest.least_max), min(least, rest.greatest_min)
        bound = max(most_of_all - highest_mean, lowest_mean - least_of_all)
        if rest == NO_WAY or bound >= self.best:
            return
        if index == self.num_stages:
            self.best = bound
            return
        middle = (lowest_mean + highest_mean) / 2
        for seconds, stop in sorted(self._ways(index, start), key=lambda way: abs(way[0] - middle)):
            self._descend(index + 1, stop, total + seconds, min(least, seconds), max(most, seconds))
