"""A pipeline without a model: what a scheduler's steps would leave in the KV cache, and when they would be over.

A slot remembers the whole history that its key and value depend on, so that a block shared with, or overwritten by,
the wrong sequence is noticed. Batches travel packed, as to real stages.
"""

import hashlib
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from apportion.scheduler.drafts import DraftSource
from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.scheduler import Scheduler
from apportion.transport.batches import BatchPacker, BatchUnpacker
from apportion.types.request import Request, SamplingParams, ScheduledBatch, StepResult, TokenEvent
from apportion.types.step_costs import PreemptMode, StepCosts, even_costs

History = tuple[int, ...]
Duration = Callable[[ScheduledBatch], float]
VOCAB = 500


def limits(**changes: int) -> SchedulerLimits:
    values = {
        "num_kv_blocks": 64,
        "block_tokens": 4,
        "max_sequences": 8,
        "max_context_tokens": 64,
        "microbatches": 3,
        "max_in_flight": 3,
        "chunk_tokens": 16,
    }
    return SchedulerLimits(**(values | changes))


def make_scheduler(
    eos_token_ids: Sequence[int] = (),
    *,
    costs: StepCosts | None = None,
    preempt: PreemptMode = "auto",
    drafts: DraftSource | None = None,
    **changes: int,
) -> Scheduler:
    scheduler_limits = limits(**changes)
    return Scheduler(
        scheduler_limits, eos_token_ids, costs or even_costs(scheduler_limits.max_in_flight), preempt, drafts
    )


def request(
    request_id: int, num_prompt: int, max_tokens: int = 8, *, n: int = 1, priority: int = 0, shared: int = 0
) -> Request:
    """The first `shared` tokens of the prompt are those of every such request."""
    own = tuple((request_id * 31 + i * 7) % VOCAB for i in range(num_prompt - shared))
    prompt = tuple((i * i) % VOCAB for i in range(shared)) + own
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(id=request_id, prompt_ids=prompt, sampling=sampling, n=n, priority=priority)


def draw_token(history: History, sampling: SamplingParams) -> int:
    return int.from_bytes(hashlib.sha256(str((history, sampling.seed)).encode()).digest()[:2], "big") % VOCAB


def expected(request: Request, seed: int | None = None) -> list[int]:
    sampling = request.sampling if seed is None else replace(request.sampling, seed=seed)
    token_ids = list(request.prompt_ids)
    for _ in range(sampling.max_tokens):
        token_ids.append(draw_token(tuple(token_ids), sampling))
    return token_ids[len(request.prompt_ids) :]


def _verified(history: History, num_drafts: int, sampling: SamplingParams) -> tuple[int, ...]:
    """The tokens after each draft that was right and after the one before them."""
    first = len(history) - num_drafts
    for stop in range(first, len(history)):
        if history[stop] != draw_token(history[:stop], sampling):
            return (*history[first:stop], draw_token(history[:stop], sampling))
    return (*history[first:], draw_token(history, sampling))


class RightAtRandom:
    """Guesses up to `most` tokens of sequences that draw with a seed of 0, each right with that probability."""

    def __init__(self, most: int, right: float, seed: int = 0) -> None:
        self._most, self._right, self._random = most, right, random.Random(seed)

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        guessed: list[int] = []
        for _ in range(self._random.randint(0, self._most)):
            token_id = draw_token((*token_ids, *guessed), SamplingParams())
            wrong = self._random.random() > self._right
            guessed.append((token_id + 1) % VOCAB if wrong else token_id)
        return guessed[: most + 1]  # one too many now and then


class FakePipeline:
    """`stages[j](batch)` is how long stage j takes over a batch; each stage takes batches in order, one at a time."""

    def __init__(self, block_tokens: int, stages: Sequence[Duration] = (lambda _: 1.0,)) -> None:
        self.now_s = 0.0
        self.moved = {"copy": 0, "swap out": 0, "swap in": 0}
        self.computed_tokens = 0
        self._block_tokens = block_tokens
        self._stages = stages
        self._free_at_s = [0.0] * len(stages)
        self._queue: deque[tuple[float, ScheduledBatch]] = deque()
        self._blocks: dict[int, dict[int, History]] = {}
        self._swapped: dict[int, dict[int, History]] = {}
        self._packer, self._unpacker = BatchPacker(), BatchUnpacker()

    def __len__(self) -> int:
        return len(self._queue)

    def forget(self) -> None:
        """As new: batches on their way and all blocks are lost."""
        self._queue.clear()
        self._blocks.clear()
        self._swapped.clear()
        self._packer, self._unpacker = BatchPacker(), BatchUnpacker()

    def submit(self, batch: ScheduledBatch) -> None:
        received = self._unpacker.unpack(self._packer.pack(batch))
        assert received == batch
        at_s = self.now_s
        for stage, duration in enumerate(self._stages):
            at_s = max(at_s, self._free_at_s[stage]) + duration(batch)
            self._free_at_s[stage] = at_s
        self._queue.append((at_s, received))

    def finish_first(self) -> StepResult:
        self.now_s, batch = self._queue.popleft()
        self._move(batch)
        drawn: dict[int, tuple[int, ...]] = {}
        for chunk in batch.chunks:
            history = self._write(chunk.start, chunk.token_ids, chunk.block_ids)
            if chunk.sampling is not None:
                drawn[chunk.sequence_id] = _verified(history, chunk.num_drafts, chunk.sampling)
                for sequence_id, sampling in chunk.forks:
                    drawn[sequence_id] = (draw_token(history, sampling),)
        return StepResult(step_id=batch.step_id, token_ids=drawn, logits={})

    def _move(self, batch: ScheduledBatch) -> None:
        for kind, src, dst in batch.moves:
            source = self._swapped if kind == "swap in" else self._blocks
            target = self._swapped if kind == "swap out" else self._blocks
            target[dst] = dict(source[src])
            self.moved[kind] += 1

    def _write(self, start: int, token_ids: tuple[int, ...], block_ids: tuple[int, ...]) -> History:
        """Every position attends to all before it, so all must be of this very history."""
        history = self._read(block_ids, start)
        for token_id in token_ids:
            index, offset = divmod(len(history), self._block_tokens)
            history = (*history, token_id)
            self._blocks.setdefault(block_ids[index], {})[offset] = history
        self.computed_tokens += len(token_ids)
        return history

    def _read(self, block_ids: tuple[int, ...], stop: int) -> History:
        seen = [self._blocks[block_ids[i // self._block_tokens]][i % self._block_tokens] for i in range(stop)]
        history = seen[-1] if seen else ()
        assert seen == [history[: i + 1] for i in range(stop)], "a block holds another sequence's tokens"
        return history


def run(
    scheduler: Scheduler,
    arrivals: dict[int, list[Request]],
    pipeline: FakePipeline | None = None,
    cancels: dict[int, list[int]] | None = None,
    record: Callable[[TokenEvent], None] = lambda _: None,
    restarts: dict[int, SchedulerLimits] | None = None,
) -> dict[tuple[int, int], list[int]]:
    """Outputs by (request, sample); `arrivals`, `cancels` and `restarts` say what happens before which step ends. A
    restart finds a pipeline that has forgotten all."""
    pipeline = FakePipeline(scheduler.limits.block_tokens) if pipeline is None else pipeline
    outputs: dict[tuple[int, int], list[int]] = {}
    step = 0
    while scheduler.num_unfinished or step <= max(arrivals):
        for arriving in arrivals.get(step, []):
            scheduler.add(arriving)
        for request_id in (cancels or {}).get(step, []):
            scheduler.cancel(request_id)
        if step in (restarts or {}):
            assert restarts is not None
            assert scheduler.restart(restarts[step], even_costs(2)) == []
            pipeline.forget()
        while (batch := scheduler.schedule()) is not None:
            assert batch.num_tokens <= scheduler.limits.step_tokens
            pipeline.submit(batch)
        assert len(pipeline) <= scheduler.limits.max_in_flight
        if len(pipeline):
            for event in scheduler.complete(pipeline.finish_first()):
                outputs.setdefault((event.request_id, event.sample), []).append(event.token_id)
                record(event)
        step += 1
        assert step < 5000, "no progress"
    check_nothing_left(scheduler)
    return outputs


def check_nothing_left(scheduler: Scheduler) -> None:
    metrics = scheduler.metrics()
    assert (metrics.num_running, metrics.num_waiting, metrics.used_blocks) == (0, 0, 0)
    assert metrics.cached_blocks + metrics.free_blocks == scheduler.limits.num_kv_blocks
    assert len(scheduler.tables.free_slots) == scheduler.limits.num_swap_blocks
