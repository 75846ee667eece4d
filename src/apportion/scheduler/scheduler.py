"""Continuous batching over a pipeline: which tokens of which sequences go into the next microbatch.

Up to `max_in_flight` batches are on their way. A batch takes decode tokens first, of at most its even share of
the running sequences among `microbatches`, then prefill chunks, up to `chunk_tokens` new tokens; chunks of one prompt
follow each other through the stages without waiting. When blocks run out, the latest admitted sequence that is not
in flight gives its own up and is recomputed later (its tokens are kept), so the earliest always advances and none
starves. Shape after nano-vllm's scheduler.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from apportion.scheduler.blocks import BlockAllocator
from apportion.scheduler.sequence import Sequence
from apportion.types.errors import UsageError
from apportion.types.plan import Plan
from apportion.types.request import Chunk, Request, ScheduledBatch, StepResult, TokenEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    num_kv_blocks: int
    block_tokens: int
    max_sequences: int
    max_context_tokens: int
    microbatches: int
    """Into so many batches the running sequences are divided for decoding."""
    max_in_flight: int
    chunk_tokens: int

    @staticmethod
    def of(plan: Plan) -> "SchedulerLimits":
        return SchedulerLimits(
            num_kv_blocks=plan.num_kv_blocks,
            block_tokens=plan.block_tokens,
            max_sequences=plan.workload.concurrency,
            max_context_tokens=plan.workload.max_context_tokens,
            microbatches=plan.microbatches,
            max_in_flight=max(plan.microbatches, len(plan.stages) + 1),
            chunk_tokens=plan.chunk_tokens,
        )


class Scheduler:
    def __init__(self, limits: SchedulerLimits, eos_token_ids: Iterable[int]) -> None:
        self.limits = limits
        self.blocks = BlockAllocator(limits.num_kv_blocks, limits.block_tokens)
        self.num_preemptions = 0
        self._eos_token_ids = frozenset(eos_token_ids)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._in_flight: dict[int, list[Sequence]] = {}
        self._next_step_id = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a request. Raises UsageError where its prompt can never run."""
        num_prompt = len(request.prompt_ids)
        capacity_tokens = min(
            self.limits.max_context_tokens, self.limits.num_kv_blocks * self.limits.block_tokens
        )
        if num_prompt == 0:
            raise UsageError(f"prompt {request.id} has no tokens; give at least one")
        if num_prompt >= capacity_tokens:
            raise UsageError(
                f"prompt {request.id} has {num_prompt} tokens and the context is {capacity_tokens}, of which one is"
                f" needed for output; shorten it or plan with --context {num_prompt + request.sampling.max_tokens}"
            )
        if request.sampling.max_tokens < 1:
            raise UsageError(f"prompt {request.id} asks for {request.sampling.max_tokens} tokens; at least 1")
        self._waiting.append(Sequence(request))

    def schedule(self) -> ScheduledBatch | None:
        """The next microbatch, or None while nothing can run (all in flight, or no work)."""
        if len(self._in_flight) >= self.limits.max_in_flight:
            return None
        self._admit()
        chunks = self._take_chunks()
        if not chunks:
            return None
        batch = ScheduledBatch(step_id=self._next_step_id, chunks=tuple(chunk for _, chunk in chunks))
        self._in_flight[batch.step_id] = [sequence for sequence, _ in chunks]
        self._next_step_id += 1
        return batch

    def complete(self, result: StepResult) -> list[TokenEvent]:
        """Takes a step's drawn tokens; returns them as events, ends what is finished and frees its blocks."""
        events: list[TokenEvent] = []
        for sequence in self._in_flight.pop(result.step_id):
            sequence.num_in_flight -= 1
            token_id = result.token_ids.get(sequence.request.id)
            if token_id is not None:
                events.append(self._append(sequence, token_id, result.logits.get(sequence.request.id)))
        return events

    def _append(self, sequence: Sequence, token_id: int, logits: bytes | None) -> TokenEvent:
        sequence.token_ids.append(token_id)
        reason = sequence.finish_reason(self._eos_token_ids, self.limits.max_context_tokens)
        if reason is not None:
            self._running.remove(sequence)
            self.blocks.release(sequence.block_ids)
        return TokenEvent(
            request_id=sequence.request.id, token_id=token_id, finish_reason=reason, logits=logits
        )

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.limits.max_sequences:
            first_chunk = min(self._waiting[0].num_pending, self.limits.chunk_tokens)
            if self.blocks.blocks_for(first_chunk) > self.blocks.num_free:
                return
            self._running.append(self._waiting.popleft())

    def _take_chunks(self) -> list[tuple[Sequence, Chunk]]:
        """Decode tokens of an even share of the running sequences, then prefill with what is left of the budget."""
        budget = self.limits.chunk_tokens
        num_decode = -(-len(self._running) // self.limits.microbatches)
        ready = [sequence for sequence in self._running if sequence.num_pending > 0]
        decode = [sequence for sequence in ready if sequence.num_pending == 1][:num_decode]
        prefill = [sequence for sequence in ready if sequence.num_pending > 1]
        chunks: list[tuple[Sequence, Chunk]] = []
        for sequence in decode + prefill:
            num_tokens = min(sequence.num_pending, budget)
            # An earlier sequence of this very batch may have preempted this one.
            if num_tokens == 0 or sequence not in self._running or not self._grow(sequence, num_tokens):
                continue
            chunks.append((sequence, self._chunk(sequence, num_tokens)))
            budget -= num_tokens
        return chunks

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start, stop = sequence.next_position, sequence.next_position + num_tokens
        sequence.next_position = stop
        sequence.num_in_flight += 1
        ends = stop == len(sequence.token_ids)
        return Chunk(
            sequence_id=sequence.request.id,
            start=start,
            token_ids=tuple(sequence.token_ids[start:stop]),
            block_ids=tuple(sequence.block_ids),
            sampling=sequence.request.sampling if ends else None,
        )

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the sequence's next tokens, taken from later sequences where none are free."""
        while not self.blocks.extend(sequence.block_ids, sequence.next_position + num_tokens):
            later = self._running[self._running.index(sequence) + 1 :]
            victim = next((s for s in reversed(later) if s.num_in_flight == 0 and s.block_ids), None)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_ids)
        sequence.next_position = 0
        self._running.remove(sequence)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1
