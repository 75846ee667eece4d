"""How long an engine waits for workers that say nothing, and which of them it names then.

The limit is a multiple of what the plan predicts for a step, and never short: a busy machine is no broken one. A worker
that the kernel has stopped is named at the first look. Else all are asked for a sign of life, which one that waits for
work gives at once; one that computes is given longer. Time counts between the engine's own looks: while the engine
itself is stopped, next to none passes.
"""

from collections.abc import Iterable, Mapping
from multiprocessing.process import BaseProcess

import psutil

from apportion.types.clock import SYSTEM_CLOCK, Clock
from apportion.types.errors import EngineError
from apportion.types.plan import Plan

LEAST_S = 20.0
"""Nobody is called silent before."""
_TIMES_PREDICTED = 20
_MOST_S = 3600.0
_LOAD_S, _LOAD_BYTES_PER_S = 300.0, 1e7
"""While loading: kernels may have to be compiled, and the slowest disk read."""
_ANSWER_S = 5.0
_BUSY_LIMITS = 10
"""Of these a worker that computes may take."""
_BUSY_SHARE = 0.05
"""Of a core's time."""
_MOST_BETWEEN_S = 1.0
"""Of two looks; more is this process's own absence."""
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def step_limit_s(plan: Plan) -> float:
    """Of waiting for any step's result."""
    estimate, workload = plan.estimate, plan.workload
    decode_s = sum(estimate.stage_s) + sum(estimate.link_s)
    prefill_s = estimate.ttft_s * min(1.0, plan.chunk_tokens / workload.prompt_tokens)
    return min(_MOST_S, max(LEAST_S, _TIMES_PREDICTED * max(decode_s, prefill_s)))


def load_limit_s(plan: Plan) -> float:
    return _LOAD_S + max(memory.weights_bytes for memory in plan.memory.values()) / _LOAD_BYTES_PER_S


class Silence:
    """Of one wait for a message from any of the workers in `missing`."""

    def __init__(
        self,
        processes: Mapping[str, BaseProcess],
        missing: Iterable[str],
        limit_s: float,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._processes = processes
        self._missing = set(missing)
        self._limit_s, self._clock = limit_s, clock
        self._passed_s = self._looked_s = self._asked_s = 0.0
        self._seen_s = self._clock.now_s()
        self._computed_s: dict[str, float] = {}
        """CPU time at the first look."""

    def answered(self, device_id: str) -> None:
        """To the question whether it is there."""
        self._missing.discard(device_id)

    def look(self) -> bool:
        """Whether the workers are to be asked for a sign of life now. Raises EngineError where one is past hope."""
        now_s = self._clock.now_s()
        self._passed_s += min(now_s - self._seen_s, _MOST_BETWEEN_S)
        self._seen_s = now_s
        if not self._computed_s:
            self._computed_s = {device_id: self._cpu_s(device_id) for device_id in self._missing}
        if self._passed_s - self._looked_s >= LEAST_S:
            self._looked_s = self._passed_s
            self._refuse([d for d in self._missing if self._status(d) in _STOPPED], "is stopped")
        if self._asked_s:
            self._judge()
        elif self._passed_s >= self._limit_s:
            self._asked_s = self._passed_s
            return True
        return False

    def _judge(self) -> None:
        if self._passed_s < self._asked_s + _ANSWER_S:
            return
        least_s = self._passed_s * _BUSY_SHARE
        idle = [d for d in self._missing if self._cpu_s(d) - self._computed_s[d] < least_s]
        self._refuse(idle, "does not answer")
        if self._passed_s >= _BUSY_LIMITS * self._limit_s:
            self._refuse(list(self._missing), "computes without end")
        if not self._missing:
            raise EngineError(
                f"a step was lost: all workers wait for one, {self._passed_s:.0f} s long; run again"
            )

    def _refuse(self, device_ids: list[str], how: str) -> None:
        if device_ids:
            names = ", ".join(sorted(device_ids))
            raise EngineError(
                f"the worker of device {names} {how}: nothing for {self._passed_s:.0f} s; run again, or plan"
                " without it"
            )

    def _status(self, device_id: str) -> str:
        try:
            return psutil.Process(self._processes[device_id].pid).status()
        except psutil.Error:
            return psutil.STATUS_DEAD

    def _cpu_s(self, device_id: str) -> float:
        try:
            times = psutil.Process(self._processes[device_id].pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system
