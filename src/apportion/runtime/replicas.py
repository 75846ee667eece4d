"""Several engines side by side, each executing one replica, with a thread of the coordinator for each."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

from apportion.runtime.dispatch import Dispatcher
from apportion.runtime.engine import Engine
from apportion.runtime.launcher import all_cores, cores_of_replicas
from apportion.types.plan import Plan
from apportion.types.request import Request, TokenEvent
from apportion.types.step_costs import PreemptMode

_LOOK_S = 0.1


class Replicas:
    """A context manager that leaves no process behind. `generate()` yields what all replicas draw, as it comes."""

    def __init__(
        self,
        plans: Sequence[Plan],
        folder: Path,
        eos_token_ids: Iterable[int],
        *,
        preempt: PreemptMode = "auto",
        while_waiting: Callable[[], object] = lambda: None,
    ) -> None:
        """`while_waiting` is called some times a second where tokens are awaited."""
        self._while_waiting = while_waiting
        cores = cores_of_replicas(plans, all_cores())
        ends = tuple(eos_token_ids)
        self.engines = [
            Engine(plan, folder, ends, preempt=preempt, cores=own)
            for plan, own in zip(plans, cores, strict=True)
        ]
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> "Replicas":
        with contextlib.ExitStack() as exits:
            for engine in self.engines:
                exits.enter_context(engine)
            self._exit = exits.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.__exit__(*exception)  # pyright: ignore[reportArgumentType]

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, TokenEvent]]:
        """Every token of every request, and the replica that drew it. Raises what a replica raises."""
        dispatcher = Dispatcher([engine.plan.workload.concurrency for engine in self.engines], requests)
        events: SimpleQueue[tuple[int, TokenEvent] | Exception] = SimpleQueue()
        threads = [
            Thread(target=_serve, args=(number, engine, dispatcher, events), daemon=True)
            for number, engine in enumerate(self.engines)
        ]
        for thread in threads:
            thread.start()
        left = sum(request.n for request in requests)
        try:
            while left:
                try:
                    drawn = events.get(timeout=_LOOK_S)
                except Empty:
                    self._while_waiting()
                    continue
                if isinstance(drawn, Exception):
                    raise drawn
                left -= drawn[1].finish_reason is not None
                yield drawn
        finally:
            dispatcher.stop()
            if left:
                for engine in self.engines:
                    engine.give_up()
            for thread in threads:
                thread.join()


def _serve(
    number: int,
    engine: Engine,
    dispatcher: Dispatcher,
    events: "SimpleQueue[tuple[int, TokenEvent] | Exception]",
) -> None:
    """Steps one engine until nothing more will come."""
    try:
        while (given := dispatcher.take(number, wait=not engine.scheduler.num_unfinished)) is not None:
            for request in given:
                engine.submit(request)
            for event in engine.step():
                events.put((number, event))
                if event.finish_reason is not None:
                    dispatcher.finished(number)
    except Exception as error:
        events.put(error)
