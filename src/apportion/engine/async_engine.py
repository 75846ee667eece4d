"""Engines that serve many callers: each is stepped by a thread of its own, which alone touches its scheduler and links.

Callers of any event loop or thread hand in requests, take tokens, cancel and wait, and never poll. A stream that is
left, however, is cancelled: its blocks are free for the next step. An error reaches the streams it belongs to: that of
a request its own, that of an engine all that it was serving. Of several engines (a plan's replicas) a request goes to
the one with the least to do for the sequences it was planned for, while that has room.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Condition, Lock, Thread
from typing import Any, Generic, Protocol, Self, TypeVar

from apportion.types.errors import ApportionError, EngineError, QueueFullError, UsageError
from apportion.types.plan import Plan
from apportion.types.request import Request, TokenEvent

Result = TypeVar("Result")
Drawn = TokenEvent | Exception
"""What a stream is given; after an exception nothing more comes."""

MAX_OPEN = 1024
"""Requests that are waiting or running at once, where nothing else is said."""
_LOOK_S = 0.1


class SteppedEngine(Protocol):
    """One pipeline. Everything but `wake` belongs to the thread that steps it."""

    @property
    def num_unfinished(self) -> int:
        """Requests."""
        ...

    def submit(self, request: Request) -> None:
        """Raises UsageError where it can never run."""
        ...

    def cancel(self, request_id: int) -> bool: ...

    def step(self) -> Sequence[TokenEvent]:
        """Starts what can run and waits for one step to end, or to be woken."""
        ...

    def restart(self, plan: Plan) -> list[int]:
        """Goes on with another plan; returns the requests that can never run under it, which have ended."""
        ...

    def wake(self) -> None:
        """Ends a wait in `step`, or the next one, from any thread."""
        ...


Engine = TypeVar("Engine", bound=SteppedEngine)


class _Lane:
    """One engine, its thread, and what the thread is asked to do between two steps."""

    def __init__(self, engine: SteppedEngine, number: int, num_places: int) -> None:
        self.engine = engine
        self.number = number
        self.num_places = num_places
        self.num_taken = 0
        """Sequences that it was given and that have not ended."""
        self.error: Exception | None = None
        self._asked: deque[Callable[[], None]] = deque()
        self._changed = Condition()
        self._closed = False

    def ask(self, do: Callable[[], None]) -> None:
        with self._changed:
            self._asked.append(do)
            self._changed.notify()
        self.engine.wake()

    def take(self, *, wait: bool) -> list[Callable[[], None]] | None:
        """What was asked for since; `wait` for something. None once closed."""
        with self._changed:
            while wait and not self._asked and not self._closed:
                self._changed.wait()
            taken = list(self._asked)
            self._asked.clear()
            return None if self._closed else taken

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.engine.wake()


class _Stream:
    """A request that is open: where its tokens go, and how many samples have not ended."""

    def __init__(self, request: Request, put: Callable[[list[Drawn]], None]) -> None:
        self.request = request
        self.put = put
        self.num_left = request.n
        self.lane: _Lane | None = None
        """None while it waits for one with room."""


class AsyncEngine(Generic[Engine]):
    """A context manager over engines that have started; they are not stopped in the end.

    `num_places` are the sequences that each engine was planned for. At most `max_open` requests are open at once:
    further ones wait for one to end, or are refused. Request ids must differ among those that are open. `while_waiting`
    is called some times a second where `stream` waits; `placed` with a request's id and its engine's number.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        num_places: Sequence[int],
        *,
        max_open: int = MAX_OPEN,
        while_waiting: Callable[[], object] = lambda: None,
        placed: Callable[[int, int], object] = lambda *_: None,
    ) -> None:
        self.engines = engines
        self._while_waiting, self._placed = while_waiting, placed
        self._lanes = [
            _Lane(engine, number, num)
            for number, (engine, num) in enumerate(zip(engines, num_places, strict=True))
        ]
        self._threads = [Thread(target=self._serve, args=(lane,), daemon=True) for lane in self._lanes]
        self._lock = Lock()
        self._open: dict[int, _Stream] = {}
        self._unplaced: deque[_Stream] = deque()
        """In the order they came; none where there is one engine."""
        self._num_free, self._entering = max_open, deque[Future[None]]()
        self._closed = False

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """What is still open ends with an EngineError."""
        self._closed = True
        for lane in self._lanes:
            lane.close()
        for thread in self._threads:
            thread.join()
        for lane in self._lanes:
            self._fail(lane, EngineError("the engine was stopped"))

    async def generate(self, request: Request, *, wait: bool = True) -> AsyncGenerator[TokenEvent, None]:
        """Every token of all samples of a request; it is cancelled where the iteration is left.

        With too many open it waits for a place, or raises QueueFullError where `wait` is False. Raises UsageError for a
        request that can never run, and what its engine raises.
        """
        entered = self._enter(wait=wait)
        try:
            await asyncio.wrap_future(entered)
        except asyncio.CancelledError:
            self._give_up(entered)
            raise
        drawn: asyncio.Queue[Drawn] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(items: list[Drawn]) -> None:
            try:
                loop.call_soon_threadsafe(_put_all, drawn, items)
            except RuntimeError:  # the loop has ended without leaving its streams
                self.cancel(request.id)

        self._start(request, put)
        num_left = request.n
        try:
            while num_left:
                event = _raised(await drawn.get())
                num_left -= event.finish_reason is not None
                yield event
        finally:
            if num_left:
                self.cancel(request.id)

    def stream(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Every token of all requests as it is drawn, for a caller without an event loop. No request waits for a
        token to be taken. Raises what any of them raises; the others are cancelled then."""
        drawn: SimpleQueue[Drawn] = SimpleQueue()
        handed_in: list[Request] = []

        def put(items: list[Drawn]) -> None:
            for item in items:
                drawn.put(item)

        try:
            for request in requests:
                self._enter(wait=True).result()
                self._start(request, put)
                handed_in.append(request)
            num_left = sum(request.n for request in handed_in)
            while num_left:
                try:
                    event = _raised(drawn.get(timeout=_LOOK_S))
                except Empty:
                    self._while_waiting()
                    continue
                num_left -= event.finish_reason is not None
                yield event
        finally:
            for request in handed_in:
                self.cancel(request.id)

    def cancel(self, request_id: int) -> bool:
        """Ends a request from any thread; its stream is given nothing more. False where it is not open."""
        with self._lock:
            stream = self._open.get(request_id)
            if stream is None:
                return False
            self._forget(stream)
        if stream.lane is not None:
            engine = stream.lane.engine
            stream.lane.ask(lambda: _ignore(engine.cancel(request_id)))
        return True

    def restart(self, number: int, plan: Plan) -> "Future[None]":
        """Engine `number` goes on with another plan, and streams with it; those that can never run under it end with an
        EngineError."""
        lane = self._lanes[number]
        return self.call(number, lambda: self._restart(lane, plan))

    def call(self, number: int, do: Callable[[], Result]) -> "Future[Result]":
        """The result of a function that runs on the thread of engine `number`, between two steps."""
        future: Future[Result] = Future()
        self._lanes[number].ask(lambda: _complete(future, do))
        return future

    def _enter(self, *, wait: bool) -> "Future[None]":
        """One of the places for open requests, now or later."""
        entered: Future[None] = Future()
        with self._lock:
            if self._num_free > 0:
                self._num_free -= 1
                entered.set_result(None)
            elif wait:
                self._entering.append(entered)
            else:
                raise QueueFullError(
                    f"{len(self._open)} requests are open, which is the most; try again when one has ended"
                )
        return entered

    def _give_up(self, entered: "Future[None]") -> None:
        """A place that was waited for and is not wanted any more."""
        if not entered.cancel() and entered.exception() is None:
            with self._lock:
                self._leave()

    def _leave(self) -> None:
        """A place is free: the first that waits has it."""
        while self._entering:
            if self._entering[0].set_running_or_notify_cancel():
                self._entering.popleft().set_result(None)
                return
            self._entering.popleft()
        self._num_free += 1

    def _start(self, request: Request, put: Callable[[list[Drawn]], None]) -> None:
        """A request that has a place."""
        stream = _Stream(request, put)
        with self._lock:
            error = self._refusal(request)
            if error is not None:
                self._leave()
                raise error
            self._open[request.id] = stream
            self._unplaced.append(stream)
            self._hand_out()

    def _refusal(self, request: Request) -> ApportionError | None:
        if request.id in self._open:
            return UsageError(f"request {request.id} is open already; give every request an id of its own")
        failed = [lane.error for lane in self._lanes if lane.error is not None]
        if self._closed or len(failed) == len(self._lanes):
            return EngineError(str(failed[0]) if failed else "the engine was stopped")
        return None

    def _hand_out(self) -> None:
        """In order; a request of more samples than any engine has places for goes to one that has nothing to do."""
        while self._unplaced:
            stream = self._unplaced[0]
            lane = self._lane_for(stream.request.n)
            if lane is None:
                return
            self._unplaced.popleft()
            stream.lane = lane
            lane.num_taken += stream.request.n
            self._placed(stream.request.id, lane.number)
            lane.ask(lambda lane=lane, stream=stream: self._submit(lane, stream))

    def _lane_for(self, num: int) -> _Lane | None:
        living = [lane for lane in self._lanes if lane.error is None]
        if len(self._lanes) == 1:  # its own scheduler decides who waits
            return living[0] if living else None
        roomy = [lane for lane in living if lane.num_taken + num <= lane.num_places or lane.num_taken == 0]
        return min(roomy, key=lambda lane: (lane.num_taken + num) / lane.num_places, default=None)

    def _submit(self, lane: _Lane, stream: _Stream) -> None:
        """Runs on the lane's thread, as everything below."""
        with self._lock:
            if self._open.get(stream.request.id) is not stream:  # cancelled meanwhile
                return
        try:
            lane.engine.submit(stream.request)
        except UsageError as error:
            self._end(stream, error)

    def _restart(self, lane: _Lane, plan: Plan) -> None:
        stranded = lane.engine.restart(plan)
        error = EngineError(
            f"the new plan's context is {plan.workload.max_context_tokens} tokens, with room for"
            f" {plan.num_kv_blocks * plan.block_tokens} of {plan.workload.concurrency} sequences: this request has more"
        )
        with self._lock:
            lane.num_places = plan.workload.concurrency
            lost = [self._open[one] for one in stranded if one in self._open]
        for stream in lost:
            self._end(stream, error)

    def _serve(self, lane: _Lane) -> None:
        engine = lane.engine
        try:
            while (asked := lane.take(wait=not engine.num_unfinished)) is not None:
                for do in asked:
                    do()
                if engine.num_unfinished:
                    self._deliver(engine.step())
        except Exception as error:
            self._fail(lane, error)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        """Each stream gets all its tokens of a step at once."""
        by_request: dict[int, list[Drawn]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        for request_id, drawn in by_request.items():
            with self._lock:
                stream = self._open.get(request_id)
                if stream is None:
                    continue
                ended = sum(
                    isinstance(event, TokenEvent) and event.finish_reason is not None for event in drawn
                )
                stream.num_left -= ended
                assert stream.lane is not None
                stream.lane.num_taken -= ended
                if not stream.num_left:
                    self._forget(stream)
                elif ended:
                    self._hand_out()
            stream.put(drawn)

    def _end(self, stream: _Stream, error: Exception) -> None:
        with self._lock:
            if self._open.get(stream.request.id) is not stream:
                return
            self._forget(stream)
        stream.put([error])

    def _forget(self, stream: _Stream) -> None:
        """Closes a stream, and lets in who waits for its places."""
        del self._open[stream.request.id]
        if stream.lane is None:
            self._unplaced.remove(stream)
        else:
            stream.lane.num_taken -= stream.num_left
        self._leave()
        self._hand_out()

    def _fail(self, lane: _Lane, error: Exception) -> None:
        """Ends what the lane was serving, and where no other is left what waits for one."""
        with self._lock:
            lane.error = lane.error or error
            last = all(one.error is not None for one in self._lanes)
            lost = [s for s in self._open.values() if s.lane is lane or (last and s.lane is None)]
        for stream in lost:
            self._end(stream, error)


def _put_all(queue: "asyncio.Queue[Drawn]", items: Sequence[Drawn]) -> None:
    for item in items:
        queue.put_nowait(item)


def _raised(drawn: Drawn) -> TokenEvent:
    if isinstance(drawn, Exception):
        raise drawn
    return drawn


def _complete(future: "Future[Any]", do: Callable[[], Any]) -> None:
    try:
        future.set_result(do())
    except Exception as error:
        future.set_exception(error)


def _ignore(_: object) -> None:
    pass
