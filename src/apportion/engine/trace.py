"""A run as a Chrome trace (opens in Perfetto or chrome://tracing): a row per device, grouped by stage, and one for the
coordinator. Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (complete events).
"""

from collections.abc import Iterable
from typing import Any

from apportion.engine.report import Span, Spans, WorkerReport
from apportion.types.plan import Plan

_STEP = "compute"
"""What a step does not spend otherwise; its row shows the whole step, with the exchanges and swaps inside it."""


class Trace:
    """Collects the spans of a run's reports, one after the other."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._events = list(_names(plan))
        self._begun_s: float | None = None

    def add(self, reports: dict[str, WorkerReport], coordinator: Iterable[tuple[str, float, float]]) -> None:
        rows = {device_id: Spans.unpack(report.spans) for device_id, report in reports.items()}
        coordinator = list(coordinator)
        begins = [span.begun_s for spans in rows.values() for span in spans]
        begins += [begun_s for _, begun_s, _ in coordinator]
        if self._begun_s is None:
            self._begun_s = min(begins, default=None)
        for name, begun_s, ended_s in coordinator:
            self._event(name, begun_s, ended_s, pid=0, tid=0)
        for index, stage in enumerate(self._plan.stages):
            for rank, device_id in enumerate(stage.split.device_ids):
                for span in rows[device_id]:
                    self._span(span, pid=index + 1, tid=rank)

    def document(self) -> dict[str, Any]:
        """Times in microseconds since the first event."""
        return {"traceEvents": self._events, "displayTimeUnit": "ms"}

    def _span(self, span: Span, *, pid: int, tid: int) -> None:
        if span.use == _STEP:
            args = {"step": span.step_id, "tokens": span.num_tokens}
            self._event(f"step {span.step_id}", span.begun_s, span.ended_s, pid=pid, tid=tid, args=args)
        else:
            self._event(span.use, span.begun_s, span.ended_s, pid=pid, tid=tid)

    def _event(
        self,
        name: str,
        begun_s: float,
        ended_s: float,
        *,
        pid: int,
        tid: int,
        args: dict[str, int] | None = None,
    ) -> None:
        assert self._begun_s is not None
        self._events.append(
            {
                "name": name,
                "ph": "X",
                "ts": (begun_s - self._begun_s) * 1e6,
                "dur": (ended_s - begun_s) * 1e6,
                "pid": pid,
                "tid": tid,
                "args": args or {},
            }
        )


def _names(plan: Plan) -> Iterable[dict[str, Any]]:
    yield _name("process_name", 0, 0, "coordinator")
    for index, stage in enumerate(plan.stages):
        yield _name("process_name", index + 1, 0, f"stage {index}")
        for rank, device_id in enumerate(stage.split.device_ids):
            yield _name("thread_name", index + 1, rank, device_id)


def _name(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
