"""One sample of a request while it runs: the scheduler's mutable state, with the blocks that hold its KV."""

from array import array
from dataclasses import replace
from enum import Enum, auto
from hashlib import blake2b

from apportion.types.request import FinishReason, Request, SamplingParams

_KEY_BYTES = 16

Rank = tuple[int, int, int]
"""Who goes first: lower is earlier. See `scheduler.waiting`."""


class State(Enum):
    WAITING = auto()
    """For a place and for blocks, for the first time or since it was preempted."""
    RUNNING = auto()
    """In the steps that are formed; its blocks are on the devices."""
    ENDED = auto()
    """Finished or cancelled; what is in flight of it is dropped."""


def sample_seed(seed: int, sample: int) -> int:
    """The seed of a request's `sample`-th continuation; the first keeps the request's own."""
    if sample == 0:
        return seed
    return int.from_bytes(blake2b(f"{seed} {sample}".encode(), digest_size=4).digest(), "little")


class Sequence:
    """`token_ids` = prompt + output so far, of which `[0, next_position)` are computed or in flight; drafts in flight
    are counted, though they are not among them.

    Their KV is in `block_ids`, or in `swap_slots` while swapped out; the blocks are exactly as many as
    `next_position` needs. The first `num_published` of them can be found by others.
    """

    __slots__ = (
        "block_ids",
        "block_keys",
        "cached_tokens",
        "id",
        "lost_tokens",
        "next_position",
        "num_in_flight",
        "num_published",
        "num_samples",
        "rank",
        "ready_since",
        "request",
        "room",
        "sample",
        "sampling",
        "state",
        "swap_slots",
        "taken_step",
        "token_ids",
        "was_preempted",
    )

    def __init__(self, sequence_id: int, request: Request, rank: Rank, sample: int = 0) -> None:
        self.id = sequence_id
        self.request = request
        self.sample = sample
        self.num_samples = request.n if sample == 0 else 1
        """It and those still to be forked from it."""
        self.sampling: SamplingParams = (
            request.sampling
            if sample == 0
            else replace(request.sampling, seed=sample_seed(request.sampling.seed, sample))
        )
        self.rank = rank
        self.token_ids = list(request.prompt_ids)
        self.next_position = 0
        self.num_in_flight = 0
        self.ready_since = 0
        """The step that was to come next when its newest token arrived."""
        self.state = State.WAITING
        self.taken_step = -1
        """The last step that it has a part in."""
        self.room = 0
        """Positions below it lie in blocks that nobody else writes to or reads: they need no look at the tables."""
        self.was_preempted = False
        self.lost_tokens = 0
        """So many were computed before it was dropped."""
        self.cached_tokens = 0
        self.block_ids: tuple[int, ...] = ()
        self.swap_slots: tuple[int, ...] = ()
        self.num_published = 0
        self.block_keys: list[bytes] = []

    @property
    def num_pending(self) -> int:
        """Known tokens that no batch has taken yet; 0 while the next token is being drawn."""
        return len(self.token_ids) - self.next_position

    @property
    def num_computed(self) -> int:
        """Known tokens whose KV is computed, or on its way: without drafts that may be wrong."""
        return min(self.next_position, len(self.token_ids))

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)

    def block_key(self, index: int, block_tokens: int) -> bytes:
        """Names block `index` by its tokens and all before them (a chain of hashes); all its tokens are known."""
        keys = self.block_keys
        while len(keys) <= index:
            start = len(keys) * block_tokens
            tokens = array("q", self.token_ids[start : start + block_tokens])
            parent = keys[-1] if keys else b""
            keys.append(blake2b(parent + tokens.tobytes(), digest_size=_KEY_BYTES).digest())
        return keys[index]

    def drop(self) -> None:
        """What was computed is to be computed anew; its blocks are the caller's affair."""
        self.lost_tokens = max(self.lost_tokens, self.num_computed)
        self.next_position = 0

    def lose(self) -> None:
        """All that devices held of it is gone, with the steps that were in flight: back to waiting."""
        self.drop()
        self.state = State.WAITING
        self.taken_step = -1
        self.num_in_flight = self.num_published = self.room = 0
        self.block_ids = self.swap_slots = ()

    def fork(self, sequence_id: int, sample: int) -> "Sequence":
        """Another sample of the same prompt, before either has drawn; its blocks are the caller's affair."""
        child = Sequence(sequence_id, self.request, (*self.rank[:2], sequence_id), sample)
        child.next_position = self.next_position
        child.num_in_flight = 1
        child.num_published = self.num_published
        child.block_keys = list(self.block_keys)
        child.cached_tokens = self.cached_tokens
        return child

    def finish_reason(self, eos_token_ids: frozenset[int], capacity_tokens: int) -> FinishReason | None:
        """Why the sequence ends after its last token, None where it goes on."""
        if self.token_ids[-1] in eos_token_ids and not self.sampling.ignore_eos:
            return "stop"
        if self.num_output >= self.sampling.max_tokens or len(self.token_ids) >= capacity_tokens:
            return "length"
        return None
