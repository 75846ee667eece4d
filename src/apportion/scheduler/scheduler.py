"""Continuous batching over a pipeline: which tokens of which sequences go into the next microbatch.

Up to `max_in_flight` batches are on their way, at most `microbatches` of them with decode tokens. A batch takes those
first, and leaves to a lighter batch what would make it the heavier (Graham's rule, by time, not by number), unless
that evens them out by less than half of what is left: waiting would be for nothing. Then it
takes prefill chunks by rank, up to `chunk_tokens` of them whatever decodes beside: the prompt that comes first is
through in ⌈its tokens / chunk_tokens⌉ batches that carry prefill. Chunks of one prompt follow each other through the
stages without waiting.

- Decode waits for prefill no longer than one chunk takes on the slowest stage: while any sequence decodes, at most
  `prefill_depth` batches in flight carry prefill, which is what keeps that stage busy (Little's law) and no more; and a
  batch that leaves ready sequences to the next carries none.
- A prompt whose next block is being computed by an earlier one waits a step for it, then shares it.
- When blocks run out, the running sequence of highest rank gives up its own. So the lowest always advances.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heapify, heapreplace

from apportion.scheduler.admission import Admission, check_request, fits
from apportion.scheduler.drafts import DraftSource
from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.preempt import Preemption
from apportion.scheduler.sequence import Sequence, State
from apportion.scheduler.tables import BlockTables
from apportion.scheduler.waiting import rank
from apportion.types.metrics import PreemptionCounts, SchedulerMetrics
from apportion.types.request import Chunk, Draw, Request, ScheduledBatch, StepResult, TokenEvent
from apportion.types.step_costs import PreemptMode, StepCosts

_chunk: Callable[[type[Chunk], tuple[object, ...]], Chunk] = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
"""Makes a named tuple of its fields without a call of Python's."""


_NO_LOGITS = (None,)


@dataclass(slots=True)
class _Flight:
    """A batch on its way: every sequence that takes part or begins, and which kinds of work it carries."""

    sequences: list[Sequence] = field(default_factory=list[Sequence])
    chunks: list[Chunk] = field(default_factory=list[Chunk])
    filling: list[Sequence] = field(default_factory=list[Sequence])
    """Those that may fill a block."""
    num_tokens: int = 0
    decode_s: float = 0.0
    """What its decode tokens weigh."""
    prefills: bool = False
    drafts: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """By sequence where its chunk stops, and how many drafts that ends in."""
    room_for_drafts: int = 0


class Scheduler:
    def __init__(
        self,
        limits: SchedulerLimits,
        eos_token_ids: Iterable[int],
        costs: StepCosts,
        preempt: PreemptMode = "auto",
        drafts: DraftSource | None = None,
    ) -> None:
        self._preempt: PreemptMode = preempt
        self._drafts = drafts
        self._drafted_tokens = self._accepted_tokens = 0
        self._begin(limits, costs, PreemptionCounts())
        self._eos_token_ids = frozenset(eos_token_ids)
        self._samples: dict[int, list[Sequence]] = {}
        """Of each unfinished request, those that have begun and not ended."""
        self._ended: list[int] = []
        self._in_flight: dict[int, _Flight] = {}
        self._next_step_id = 0
        self._next_sequence_id = 0
        self._peak_used_blocks = 0
        self._peak_saved_blocks = 0

    def _begin(self, limits: SchedulerLimits, costs: StepCosts, counts: PreemptionCounts) -> None:
        """With empty blocks and nobody in line."""
        self.limits = limits
        self.tables = BlockTables(limits.num_kv_blocks, limits.block_tokens, limits.num_swap_blocks)
        self._costs = costs
        self._preemption = Preemption(self.tables, costs, self._preempt, counts)
        self._admission = Admission(limits, self.tables, self._preemption)
        self._running = self._admission.running

    @property
    def num_unfinished(self) -> int:
        """Requests."""
        return len(self._samples)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a request. Raises UsageError where it can never run."""
        check_request(request, self.limits)
        sequence_id = self._new_id()
        sequence = Sequence(sequence_id, request, rank(request.priority, self._next_step_id, sequence_id))
        self._samples[request.id] = [sequence]
        self._admission.waiting.add(sequence)

    def cancel(self, request_id: int) -> bool:
        """Ends a request at once, False where it is not running. Its blocks are free for the next step: the
        stages execute that after whatever of the request is in flight, and the tokens drawn there are dropped."""
        samples = self._samples.pop(request_id, [])
        for sequence in samples:
            self._admission.end(sequence)
            self._ended.append(sequence.id)
        return bool(samples)

    def restart(self, limits: SchedulerLimits, costs: StepCosts) -> list[int]:
        """Puts every sequence back in line as its prompt and the tokens that it has drawn, for stages that hold nothing
        of what was before; results of earlier steps must not be completed any more. What a sequence draws stays what it
        would have drawn. Returns the requests that can never run within these limits: they have ended.
        """
        sequences = [sequence for samples in self._samples.values() for sequence in samples]
        self._begin(limits, costs, self._preemption.counts)
        self._in_flight.clear()
        self._ended.clear()
        for sequence in sequences:
            sequence.lose()
            self._admission.waiting.add(sequence)
        stranded = dict.fromkeys(s.request.id for s in sequences if not fits(s, limits))
        for request_id in stranded:
            self.cancel(request_id)
        return list(stranded)

    def schedule(self) -> ScheduledBatch | None:
        """The next microbatch, or None while nothing can run (all in flight, or no work)."""
        if len(self._in_flight) >= self.limits.max_in_flight:
            return None
        self._admission.admit()
        flight = self._fill()
        if not flight.chunks:
            return None
        assert flight.num_tokens <= self.limits.step_tokens
        for sequence in flight.filling:
            self.tables.publish(sequence)
        batch = ScheduledBatch(
            step_id=self._next_step_id,
            chunks=tuple(flight.chunks),
            moves=self.tables.take_moves(),
            ended=tuple(self._ended),
        )
        self._ended.clear()
        self._in_flight[batch.step_id] = flight
        self._next_step_id += 1
        self._peak_used_blocks = max(self._peak_used_blocks, self.tables.pool.num_used)
        self._peak_saved_blocks = max(self._peak_saved_blocks, self.tables.pool.num_saved)
        return batch

    def complete(self, result: StepResult) -> list[TokenEvent]:
        """Takes a step's drawn tokens; returns them as events, ends what is finished and frees its blocks."""
        events: list[TokenEvent] = []
        drawn, logits = result.token_ids, result.logits
        flight = self._in_flight.pop(result.step_id)
        for sequence in flight.sequences:
            sequence.num_in_flight -= 1
            token_ids = drawn.get(sequence.id)
            if token_ids is None or sequence.state is State.ENDED:
                continue
            if sequence.id in flight.drafts:
                events += self._accept(
                    sequence, token_ids, logits.get(sequence.id), *flight.drafts[sequence.id]
                )
                continue
            (own_logits,) = logits.get(sequence.id, _NO_LOGITS)
            events.append(self._append(sequence, token_ids[0], own_logits))
        return events

    def metrics(self) -> SchedulerMetrics:
        pool, running = self.tables.pool, self._running.sequences
        return SchedulerMetrics(
            num_waiting=len(self._admission.waiting),
            num_running=len(running),
            used_blocks=pool.num_used,
            cached_blocks=pool.num_cached,
            free_blocks=pool.num_free - pool.num_cached,
            saved_blocks=pool.num_saved,
            wasted_tokens=sum(len(s.block_ids) * pool.block_tokens - s.next_position for s in running),
            peak_used_blocks=self._peak_used_blocks,
            peak_saved_blocks=self._peak_saved_blocks,
            copied_blocks=self.tables.num_copied,
            evicted_blocks=pool.num_evicted,
            cached_tokens=self._admission.cached_tokens,
            preemptions=self._preemption.counts,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def _new_id(self) -> int:
        self._next_sequence_id += 1
        return self._next_sequence_id - 1

    def _accept(
        self,
        sequence: Sequence,
        token_ids: Iterable[int],
        logits: Iterable[bytes] | None,
        stop: int,
        num_drafts: int,
    ) -> Iterable[TokenEvent]:
        """Of a chunk that ended in drafts at `stop`: the tokens that were right and the next, up to one that ends the
        sequence. One that was dropped meanwhile holds nothing that would have to be taken back."""
        token_ids = list(token_ids)
        self._accepted_tokens += len(token_ids) - 1
        num_wrong = num_drafts + 1 - len(token_ids)
        if sequence.next_position == stop:
            self.tables.take_back(sequence, num_wrong)
        else:
            sequence.lost_tokens = max(sequence.lost_tokens, stop - num_wrong)
        for token_id, own_logits in zip(token_ids, logits or [None] * len(token_ids), strict=True):
            yield self._append(sequence, token_id, own_logits)
            if sequence.state is State.ENDED:
                return
        if sequence.state is State.RUNNING:
            self.tables.publish(sequence)

    def _append(self, sequence: Sequence, token_id: int, logits: bytes | None) -> TokenEvent:
        sequence.token_ids.append(token_id)
        sequence.ready_since = self._next_step_id
        reason = sequence.finish_reason(self._eos_token_ids, self.limits.capacity_tokens)
        request_id = sequence.request.id
        if reason is not None:
            self._end(sequence)
        return TokenEvent(request_id, token_id, reason, logits, sequence.sample, sequence.cached_tokens)

    def _end(self, sequence: Sequence) -> None:
        self._admission.end(sequence)
        self._ended.append(sequence.id)
        samples = self._samples[sequence.request.id]
        samples.remove(sequence)
        if not samples:
            del self._samples[sequence.request.id]

    def _fill(self) -> _Flight:
        flight = _Flight()
        leaves_ready = self._take_decode(flight)
        if not leaves_ready and self._may_prefill():
            self._take_prefill(flight)
        return flight

    def _take_decode(self, flight: _Flight) -> bool:
        """Ready sequences, longest waiting first, as long as this batch is the lightest; True where some are left for
        another that can be formed at once."""
        others_s = [other.decode_s for other in self._in_flight.values() if other.decode_s]
        num_unformed = self.limits.microbatches - len(others_s) - 1
        if num_unformed < 0:
            return False
        others_s += [0.0] * num_unformed
        heapify(others_s)
        flight.room_for_drafts = self._admission.num_places if self._drafts is not None else 0
        ready = [s for s in self._running.sequences if s.next_position == len(s.token_ids) - 1]
        if not others_s:
            self._take_all(flight, ready)
            return False
        ready.sort(key=_decode_order)
        leaves_ready = False
        for sequence in ready:
            cost_s = self._costs.decode_s(len(sequence.token_ids))
            if flight.decode_s > others_s[0] + cost_s / 2:
                leaves_ready = num_unformed > 0
                heapreplace(others_s, others_s[0] + cost_s)
                continue
            drafts = self._propose(flight, sequence) if flight.room_for_drafts else ()
            if self._take(flight, sequence, 1, drafts):
                flight.decode_s += cost_s
        return leaves_ready

    def _take_all(self, flight: _Flight, ready: list[Sequence]) -> None:
        """Puts the next token of each into the only batch that decodes, in order of rank. Of hundreds nearly all have
        room in their last block, so for these nothing is called: `_take` in a loop would take three times as long."""
        costs, step_id, block_tokens = self._costs, self._next_step_id, self.limits.block_tokens
        take, add_chunk, running = flight.sequences.append, flight.chunks.append, State.RUNNING
        context_tokens = num_taken = 0
        drafting = flight.room_for_drafts > 0
        for sequence in ready:
            start = sequence.next_position
            if start >= sequence.room or sequence.num_samples > 1 or start < sequence.lost_tokens or drafting:
                drafts = self._propose(flight, sequence) if drafting else ()
                if not self._take(flight, sequence, 1, drafts):
                    continue
            elif sequence.state is running:
                sequence.next_position = start + 1
                sequence.num_in_flight += 1
                sequence.taken_step = step_id
                take(sequence)
                if not (start + 1) % block_tokens:
                    flight.filling.append(sequence)
                token_ids = (sequence.token_ids[start],)
                add_chunk(
                    _chunk(
                        Chunk, (sequence.id, start, token_ids, sequence.block_ids, sequence.sampling, (), 0)
                    )
                )
                flight.num_tokens += 1
            else:
                continue
            num_taken += 1
            context_tokens += start + 1
        flight.decode_s += num_taken * costs.decode_token_s + context_tokens * costs.context_token_s

    def _propose(self, flight: _Flight, sequence: Sequence) -> tuple[int, ...]:
        """Guesses of what follows, as far as the batch has room for them: their rows take the places that no sequence
        has, their KV blocks that are free, and none that somebody would have to give up."""
        most = min(
            flight.room_for_drafts,
            sequence.sampling.max_tokens - sequence.num_output - 1,
            self.limits.capacity_tokens - len(sequence.token_ids) - 1,
        )
        if (
            most <= 0
            or self._drafts is None
            or sequence.num_samples > 1
            or sequence.state is not State.RUNNING
        ):
            return ()
        drafts = tuple(self._drafts.propose(sequence.token_ids, most))[:most]
        return drafts if drafts and self.tables.grow(sequence, 1 + len(drafts)) else ()

    def _may_prefill(self) -> bool:
        if not any(len(s.token_ids) - s.next_position <= 1 for s in self._running.sequences):
            return True
        return sum(other.prefills for other in self._in_flight.values()) < self._costs.prefill_depth

    def _take_prefill(self, flight: _Flight) -> None:
        """Chunks of prompts, and of what is computed anew, by rank."""
        coming: set[bytes] = set()
        left_tokens = self.limits.chunk_tokens
        for sequence in [s for s in self._running.sequences if len(s.token_ids) - s.next_position > 1]:
            if sequence.state is not State.RUNNING:
                continue
            self._admission.adopt(sequence)
            if self._follows(sequence, coming):
                continue
            num_tokens = min(sequence.num_pending, left_tokens)
            if num_tokens > 0 and self._take(flight, sequence, num_tokens):
                flight.prefills = True
                left_tokens -= num_tokens

    def _follows(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """Whether the sequence's next block is among those that earlier ones are at, and can be shared soon; else
        the block that it is at joins them."""
        block_tokens = self.limits.block_tokens
        index, offset = divmod(sequence.next_position, block_tokens)
        num_known = len(sequence.token_ids) - index * block_tokens
        if num_known < block_tokens:
            return False
        key = sequence.block_key(index, block_tokens)
        if offset == 0 and num_known > block_tokens and key in coming:
            return True
        coming.add(key)
        return False

    def _take(
        self, flight: _Flight, sequence: Sequence, num_tokens: int, drafts: tuple[int, ...] = ()
    ) -> bool:
        """Puts the sequence's next tokens into the batch, and drafts behind them, which have blocks; False where there
        are no blocks for them, or it was preempted for another of this very batch."""
        if sequence.state is not State.RUNNING or not self._make_room(sequence, num_tokens):
            return False
        flight.sequences.append(sequence)
        flight.filling.append(sequence)
        flight.num_tokens += num_tokens
        sequence.taken_step = self._next_step_id
        start, stop = sequence.next_position, sequence.next_position + num_tokens
        if start < sequence.lost_tokens:
            self._preemption.count_recomputed(min(stop, sequence.lost_tokens) - start)
        sequence.next_position = stop
        sequence.num_in_flight += 1
        ends = stop == len(sequence.token_ids)
        chunk = Chunk(
            sequence.id,
            start,
            tuple(sequence.token_ids[start:stop]),
            sequence.block_ids,
            sequence.sampling if ends else None,
            self._fork(flight, sequence) if ends and sequence.num_samples > 1 else (),
        )
        flight.chunks.append(self._with_drafts(flight, sequence, chunk, drafts) if drafts else chunk)
        return True

    def _with_drafts(
        self, flight: _Flight, sequence: Sequence, chunk: Chunk, drafts: tuple[int, ...]
    ) -> Chunk:
        num = len(drafts)
        sequence.next_position += num
        flight.num_tokens += num
        flight.room_for_drafts -= num
        flight.drafts[sequence.id] = (sequence.next_position, num)
        self._drafted_tokens += num
        return chunk._replace(token_ids=chunk.token_ids + drafts, num_drafts=num)

    def _fork(self, flight: _Flight, parent: Sequence) -> tuple[Draw, ...]:
        """The other samples of a request begin where its prompt ends, each with its own draw."""
        children = [parent.fork(self._new_id(), sample) for sample in range(1, parent.num_samples)]
        for child in children:
            self._admission.fork(parent, child)
        self._samples[parent.request.id] += children
        flight.sequences += children
        flight.filling += children
        return tuple(Draw(child.id, child.sampling) for child in children)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for the sequence's next tokens, taken from those of higher rank where none are free."""
        while not self.tables.grow(sequence, num_tokens):
            victim = self._victim(sequence)
            if victim is None:
                return False
            self._admission.preempt(victim)
        return True

    def _victim(self, sequence: Sequence) -> Sequence | None:
        for candidate in reversed(self._running.sequences):
            if candidate is sequence:
                return None
            if candidate.block_ids and candidate.taken_step != self._next_step_id:
                return candidate
        return None


def _decode_order(sequence: Sequence) -> tuple[int, int]:
    """Longest waiting first, then longest: what comes last evens out the batches best."""
    return sequence.ready_since, -len(sequence.token_ids)
