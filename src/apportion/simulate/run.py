"""Discrete events: the runtime's own scheduler, driven as the engine drives it, over stages of modelled times."""

from collections.abc import Iterable, Iterator

from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.scheduler import Scheduler
from apportion.simulate.pipeline import ModelledPipeline
from apportion.types.plan import Plan
from apportion.types.request import Request, TokenEvent
from apportion.types.step_costs import PreemptMode


def simulate(
    plan: Plan, requests: Iterable[Request], preempt: PreemptMode = "auto"
) -> Iterator[tuple[float, TokenEvent]]:
    """Every token of requests that arrive together, and the second at which it is drawn. Each sample draws its
    `max_tokens`; which tokens they are means nothing. Raises UsageError where a request can never run."""
    scheduler = Scheduler(SchedulerLimits.of(plan), (), plan.step_costs, preempt)
    pipeline = ModelledPipeline(plan)
    for request in requests:
        scheduler.add(request)
    while scheduler.num_unfinished:
        while (batch := scheduler.schedule()) is not None:
            pipeline.submit(batch)
        result = pipeline.finish_first()
        for event in scheduler.complete(result):
            yield pipeline.now_s, event
