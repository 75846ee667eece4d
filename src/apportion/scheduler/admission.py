"""From waiting to running: what a request must meet to be accepted, and a sequence to get blocks."""

from math import inf

from apportion.scheduler.limits import SchedulerLimits
from apportion.scheduler.preempt import Preemption
from apportion.scheduler.sequence import Sequence, State
from apportion.scheduler.tables import BlockTables
from apportion.scheduler.waiting import RankedSequences
from apportion.types.errors import UsageError
from apportion.types.request import FIRST_OWN_ID, Request, SamplingParams


def check_request(request: Request, limits: SchedulerLimits) -> None:
    """Raises UsageError where the request can never run."""
    num_prompt, capacity_tokens = len(request.prompt_ids), limits.capacity_tokens
    if num_prompt == 0:
        raise UsageError(f"{_named(request)} has no tokens; give at least one")
    if num_prompt >= capacity_tokens:
        raise UsageError(
            f"{_named(request)} has {num_prompt} tokens and the context is {capacity_tokens}, of which one is"
            f" needed for output; shorten it or plan with --context {num_prompt + request.sampling.max_tokens}"
        )
    if (fault := sampling_fault(request.sampling)) is not None:
        raise UsageError(f"{_named(request)} asks for {fault}")
    if not _is_whole(request.n) or request.n < 1:
        raise UsageError(f"{_named(request)} asks for {request.n!r} samples; a whole number from 1")
    if request.n > limits.max_sequences:
        raise UsageError(
            f"{_named(request)} asks for {request.n} samples and the plan is for {limits.max_sequences} sequences;"
            f" ask for 1 to {limits.max_sequences}, or plan with --concurrency {request.n}"
        )


def sampling_fault(sampling: SamplingParams) -> str | None:
    """What of it is none, and what it may be."""
    if not _is_whole(sampling.max_tokens) or not 1 <= sampling.max_tokens < 2**31:
        return f"{sampling.max_tokens!r} tokens; a whole number from 1 to 2^31 − 1"
    if not _is_number(sampling.temperature) or not 0 <= sampling.temperature < inf:
        return f"temperature {sampling.temperature!r}; a finite number from 0"
    if not _is_number(sampling.top_p) or not 0 < sampling.top_p <= 1:
        return f"top_p {sampling.top_p!r}; more than 0 and at most 1"
    if not _is_whole(sampling.seed) or not 0 <= sampling.seed < 2**64:
        return f"seed {sampling.seed!r}; a whole number from 0 to 2^64 − 1"
    return None


def _is_whole(value: object) -> bool:
    """Whether it is an int: what travels to the workers, which numpy's integers do not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(request: Request) -> str:
    return "the prompt" if request.id >= FIRST_OWN_ID else f"prompt {request.id}"


def fits(sequence: Sequence, limits: SchedulerLimits) -> bool:
    """Whether a sequence that has begun can go on."""
    return len(sequence.token_ids) < limits.capacity_tokens and sequence.num_samples <= limits.max_sequences


def check_tokens(request: Request, vocab_rows: int) -> None:
    """Raises UsageError where a prompt is empty or holds what is no token, or none that the model has an embedding
    for."""
    if not request.prompt_ids:
        raise UsageError(f"{_named(request)} has no tokens; give at least one")
    if set(map(type, request.prompt_ids)) != {int}:  # one pass, for the usual prompt
        odd = next((token for token in request.prompt_ids if not _is_whole(token)), None)
        if odd is not None:
            raise UsageError(f"{_named(request)} has {odd!r} for a token; tokens are whole numbers (int)")
    largest = max(request.prompt_ids)
    if not 0 <= min(request.prompt_ids) <= largest < vocab_rows:
        raise UsageError(
            f"{_named(request)} has token {largest if largest >= vocab_rows else min(request.prompt_ids)}, and the"
            f" model's vocabulary is 0 to {vocab_rows - 1}; use the tokenizer of this very model"
        )


class Admission:
    """Lets sequences in by rank, while there are places for all their samples and blocks for all their tokens."""

    def __init__(self, limits: SchedulerLimits, tables: BlockTables, preemption: Preemption) -> None:
        self.waiting = RankedSequences()
        self.running = RankedSequences()
        self.cached_tokens = 0
        self._limits = limits
        self._tables = tables
        self._preemption = preemption
        self._num_places = limits.max_sequences

    @property
    def num_places(self) -> int:
        """That nobody has."""
        return self._num_places

    def admit(self) -> None:
        """Nobody is let in before one of lower rank, so that large prompts are not passed by small ones for ever."""
        while self.waiting.sequences:
            sequence = self.waiting.sequences[0]
            if sequence.num_samples > self._num_places or not self._give_blocks(sequence):
                return
            self.waiting.remove(sequence)
            self._run(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """A sample starts to run in one of the places that its parent was admitted with."""
        parent.num_samples -= 1
        self._num_places += 1
        self._tables.fork(parent, child)
        self._run(child)

    def preempt(self, sequence: Sequence) -> None:
        self._preemption.preempt(sequence)
        self._stop(sequence)
        sequence.state = State.WAITING
        self.waiting.add(sequence)

    def end(self, sequence: Sequence) -> None:
        """The sequence leaves, wherever it is."""
        self._tables.release(sequence)
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = State.ENDED

    def adopt(self, sequence: Sequence) -> None:
        """Takes over what the prefix cache has of the tokens that come next."""
        self._count_adopted(sequence, self._tables.adopt(sequence))

    def _run(self, sequence: Sequence) -> None:
        self._num_places -= sequence.num_samples
        sequence.state = State.RUNNING
        self.running.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self._num_places += sequence.num_samples
        self.running.remove(sequence)

    def _give_blocks(self, sequence: Sequence) -> bool:
        """Whether the sequence can start: blocks with content are its own now, those it still has to fill are free.
        One that was preempted leaves the others a block each, or it would soon be preempted again."""
        tables, pool = self._tables, self._tables.pool
        spare_blocks = len(self.running) if sequence.was_preempted else 0
        if sequence.swap_slots:
            return self._preemption.resume(sequence, spare_blocks)
        if sequence.num_in_flight:  # its next token is being drawn: known before it is computed again
            return False
        adopted = tables.adopt(sequence)
        missing = pool.blocks_for(len(sequence.token_ids)) - len(sequence.block_ids)
        if missing + spare_blocks > pool.num_free:
            tables.release(sequence)
            sequence.next_position = 0
            return False
        self._count_adopted(sequence, adopted)
        return True

    def _count_adopted(self, sequence: Sequence, num_tokens: int) -> None:
        """The last `num_tokens` before its next position; those that it had computed itself are no gain."""
        start = sequence.next_position - num_tokens
        num_own = min(max(sequence.lost_tokens - start, 0), num_tokens)
        sequence.cached_tokens += num_tokens - num_own
        self.cached_tokens += num_tokens - num_own
