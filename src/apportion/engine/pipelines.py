"""The pipelines of a plan, one or several replicas, started and served as one."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from apportion.engine.async_engine import MAX_OPEN, AsyncEngine
from apportion.engine.engine import Engine
from apportion.engine.launcher import all_cores, cores_of_replicas
from apportion.types.plan import Plan
from apportion.types.step_costs import PreemptMode


@contextlib.contextmanager
def served(
    plans: Sequence[Plan],
    folder: Path,
    eos_token_ids: Iterable[int],
    *,
    random_weights: bool = False,
    trace: bool = False,
    preempt: PreemptMode = "auto",
    max_open: int = MAX_OPEN,
    while_waiting: Callable[[], object] = lambda: None,
    placed: Callable[[int, int], object] = lambda *_: None,
) -> Iterator[AsyncEngine[Engine]]:
    """An engine for each plan, with cores of its own where there are enough for all; their workers have ended when the
    context has. `while_waiting` is called some times a second where this thread waits for workers or tokens; `placed`
    with a request's id and the number of the engine that it was given to."""
    ends = tuple(eos_token_ids)
    cores = cores_of_replicas(plans, all_cores()) if len(plans) > 1 else [None]
    engines = [
        Engine(
            plan,
            folder,
            ends,
            random_weights=random_weights,
            trace=trace,
            preempt=preempt,
            cores=own,
            while_waiting=while_waiting,
        )
        for plan, own in zip(plans, cores, strict=True)
    ]
    with contextlib.ExitStack() as exits:
        for engine in engines:
            exits.enter_context(engine)
        places = [plan.workload.concurrency for plan in plans]
        serving = AsyncEngine(engines, places, max_open=max_open, while_waiting=while_waiting, placed=placed)
        yield exits.enter_context(serving)
