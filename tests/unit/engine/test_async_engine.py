"""Many callers of one engine: the real scheduler over a pipeline without a model, whose steps end when a test says."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from fake_pipeline import FakePipeline, check_nothing_left, expected, make_scheduler, request

from apportion.engine.async_engine import AsyncEngine
from apportion.scheduler.sequence import sample_seed
from apportion.types.errors import EngineError, QueueFullError, UsageError
from apportion.types.request import Request, TokenEvent


class FakeEngine:
    """After `allowed` steps the next one does not end until it is woken; `fail` is raised by the next one."""

    def __init__(self, **limits: int) -> None:
        self.scheduler = make_scheduler(**({"num_kv_blocks": 200} | limits))
        self.pipeline = FakePipeline(self.scheduler.limits.block_tokens)
        self.allowed = 10**9
        self.fail: Exception | None = None
        self.steps = 0
        self._woken = threading.Event()

    @property
    def num_unfinished(self) -> int:
        return self.scheduler.num_unfinished

    def submit(self, request: Request) -> None:
        self.scheduler.add(request)

    def cancel(self, request_id: int) -> bool:
        return self.scheduler.cancel(request_id)

    def step(self) -> list[TokenEvent]:
        while (batch := self.scheduler.schedule()) is not None:
            self.pipeline.submit(batch)
        if self.steps >= self.allowed:
            self._woken.wait()
            self._woken.clear()
            return []
        if self.fail is not None:
            raise self.fail
        self.steps += 1
        return self.scheduler.complete(self.pipeline.finish_first()) if len(self.pipeline) else []

    def wake(self) -> None:
        self._woken.set()

    def release(self) -> None:
        self.allowed = 10**9
        self.wake()


async def collected(engine: AsyncEngine, one: Request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    async for event in engine.generate(one):
        tokens.setdefault(event.sample, []).append(event.token_id)
    return tokens


def wanted(one: Request) -> dict[int, list[int]]:
    return {sample: expected(one, sample_seed(one.sampling.seed, sample)) for sample in range(one.n)}


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


def test_many_streams_at_once_get_their_own_tokens_each():
    fake = FakeEngine()
    requests = [request(i, 3 + i % 7, 5 + i % 4, n=1 + i % 3) for i in range(40)]

    async def all_of_them() -> list[dict[int, list[int]]]:
        return await asyncio.gather(*(collected(engine, one) for one in requests))

    with AsyncEngine([fake], [8], max_open=16) as engine:
        assert asyncio.run(all_of_them()) == [wanted(one) for one in requests]
    check_nothing_left(fake.scheduler)


def test_loops_of_several_threads_share_an_engine():
    fake, found = FakeEngine(), dict[int, dict[int, list[int]]]()
    requests = [request(i, 4, 9) for i in range(6)]

    def run(one: Request) -> None:
        found[one.id] = asyncio.run(collected(engine, one))

    with AsyncEngine([fake], [8]) as engine:
        threads = [threading.Thread(target=run, args=(one,)) for one in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {one.id: wanted(one) for one in requests}


def test_a_caller_without_a_loop_gets_all_tokens():
    with AsyncEngine([FakeEngine()], [8]) as engine:
        found: dict[int, list[int]] = {}
        for event in engine.stream([request(i, 4, 6) for i in range(5)]):
            found.setdefault(event.request_id, []).append(event.token_id)
    assert found == {i: expected(request(i, 4, 6)) for i in range(5)}


def test_a_stream_that_is_left_frees_its_blocks_before_the_next_step():
    fake = FakeEngine()
    fake.allowed = 3

    async def leave() -> None:
        stream = engine.generate(request(0, 8, 50))
        assert (await anext(stream)).token_id == expected(request(0, 8, 50))[0]
        await stream.aclose()

    with AsyncEngine([fake], [8]) as engine:
        asyncio.run(leave())
        assert engine.call(0, lambda: fake.scheduler.metrics().used_blocks).result(20) == 0
        assert fake.steps <= fake.allowed


def test_a_task_that_is_cancelled_leaves_its_stream():
    fake = FakeEngine()
    fake.allowed = 3

    async def cancel() -> None:
        task = asyncio.create_task(collected(engine, request(0, 8, 50)))
        while fake.steps < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fake.release()

    with AsyncEngine([fake], [8], max_open=1) as engine:
        asyncio.run(cancel())
        assert asyncio.run(collected(engine, request(1, 3, 4))) == wanted(request(1, 3, 4))


def test_an_error_of_a_request_reaches_its_own_stream_alone():
    fake = FakeEngine()

    async def both() -> list[object]:
        tasks = (collected(engine, one) for one in (request(0, 4, 6), request(1, 500, 6)))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with AsyncEngine([fake], [8]) as engine:
        good, bad = asyncio.run(both())
    assert good == wanted(request(0, 4, 6))
    assert isinstance(bad, UsageError)


def test_an_engine_that_fails_ends_its_streams_and_refuses_more():
    fake = FakeEngine()
    fake.fail = EngineError("the worker of device d died")

    async def twice() -> list[object]:
        tasks = (collected(engine, request(i, 4, 6)) for i in range(2))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with AsyncEngine([fake], [8]) as engine:
        assert [str(error) for error in asyncio.run(twice())] == ["the worker of device d died"] * 2
        with pytest.raises(EngineError, match="the worker of device d died"):
            asyncio.run(collected(engine, request(9, 4, 6)))


def test_what_is_open_when_the_engine_stops_ends_with_an_error():
    fake = FakeEngine()
    fake.allowed = 0
    found: list[object] = []

    def run() -> None:
        try:
            asyncio.run(collected(engine, request(0, 4, 6)))
        except EngineError as error:
            found.append(str(error))

    with AsyncEngine([fake], [8]) as engine:
        thread = threading.Thread(target=run)
        thread.start()
        until(lambda: fake.num_unfinished == 1)
    thread.join()
    assert found == ["the engine was stopped"]


def test_with_too_many_open_a_request_waits_or_is_refused():
    fake = FakeEngine()
    fake.allowed = 0

    async def three() -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        first = asyncio.create_task(collected(engine, request(0, 4, 30)))
        while not fake.num_unfinished:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError, match="1 requests are open"):
            await anext(engine.generate(request(1, 4, 3), wait=False))
        waiting = asyncio.create_task(collected(engine, request(2, 4, 3)))
        given_up = asyncio.create_task(collected(engine, request(3, 4, 3)))
        await asyncio.sleep(0)
        given_up.cancel()
        fake.release()
        return await first, await waiting

    with AsyncEngine([fake], [8], max_open=1) as engine:
        assert asyncio.run(three()) == (wanted(request(0, 4, 30)), wanted(request(2, 4, 3)))


def test_a_new_request_does_not_wait_for_a_step_to_end():
    fake = FakeEngine()
    fake.allowed = 0
    with AsyncEngine([fake], [8]) as engine:
        thread = threading.Thread(target=lambda: asyncio.run(collected(engine, request(0, 4, 6))))
        thread.start()
        until(lambda: fake.scheduler.num_in_flight == 1)
        other = threading.Thread(target=lambda: asyncio.run(collected(engine, request(1, 4, 6))))
        other.start()
        until(lambda: fake.scheduler.num_in_flight == 2)  # though no step has ended
        fake.release()
        thread.join()
        other.join()


def test_of_two_engines_the_one_with_room_is_taken():
    fakes = [FakeEngine(), FakeEngine()]
    requests = [request(i, 4, 12) for i in range(12)]

    async def all_of_them() -> list[dict[int, list[int]]]:
        return await asyncio.gather(*(collected(engine, one) for one in requests))

    with AsyncEngine(fakes, [1, 3]) as engine:
        assert asyncio.run(all_of_them()) == [wanted(one) for one in requests]
    assert all(fake.steps for fake in fakes)


def test_ids_that_are_open_are_refused():
    fake = FakeEngine()
    fake.allowed = 0

    async def twice() -> None:
        task = asyncio.create_task(collected(engine, request(0, 4, 6)))
        while not fake.num_unfinished:
            await asyncio.sleep(0.001)
        with pytest.raises(UsageError, match="request 0 is open already"):
            await collected(engine, replace(request(1, 4, 6), id=0))
        fake.release()
        assert await task == wanted(request(0, 4, 6))

    with AsyncEngine([fake], [8]) as engine:
        asyncio.run(twice())


def test_requests_go_where_there_is_most_room_for_its_share():
    """Of six sequences that two engines were planned for, the first takes four; the others wait until one ends."""
    fakes, placed = [FakeEngine(), FakeEngine()], dict[int, int]()
    for fake in fakes:
        fake.allowed = 0
    with AsyncEngine(fakes, [4, 2], placed=placed.__setitem__) as engine:
        thread = threading.Thread(target=lambda: list(engine.stream([request(i, 4, 3) for i in range(9)])))
        thread.start()
        until(lambda: sum(fake.num_unfinished for fake in fakes) == 6)
        assert [placed[i] for i in range(6)] == [0, 0, 1, 0, 0, 1]
        assert len(placed) == 6
        fakes[1].release()
        until(lambda: len(placed) == 9)
        assert [placed[i] for i in (6, 7, 8)] == [1, 1, 1]
        fakes[0].release()
        thread.join()


def test_more_samples_than_there_is_room_for_go_to_an_idle_engine():
    fakes, placed = [FakeEngine(), FakeEngine()], dict[int, int]()
    with AsyncEngine(fakes, [2, 1], placed=placed.__setitem__) as engine:
        drawn = list(engine.stream([request(0, 4, 3, n=3), request(1, 4, 3, n=3), request(2, 4, 3)]))
    assert (placed[0], placed[1]) == (0, 1)
    assert len(drawn) == 3 * (3 + 3 + 1)
