"""Block tables against a naive model: what each sequence must find in its blocks, whatever the order of operations.

No block is leaked, shared by sequences of different tokens, or written while shared.
"""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from apportion.scheduler.sequence import Sequence, State
from apportion.scheduler.tables import BlockTables
from apportion.types.request import Request, SamplingParams

Slot = tuple[int, ...] | None
"""The tokens that a position's KV depends on: its own and all before it."""


class Blocks(RuleBasedStateMachine):
    """Every operation is executed at once, as a stage would in its turn; the model is the sequences' token ids."""

    sequences: Bundle[Sequence] = Bundle("sequences")

    @initialize(num_blocks=st.integers(2, 16), block_tokens=st.integers(1, 4), num_slots=st.integers(0, 12))
    def build(self, num_blocks: int, block_tokens: int, num_slots: int) -> None:
        self.tables = BlockTables(num_blocks, block_tokens, num_slots)
        self.num_slots = num_slots
        self.device: list[list[Slot]] = [[None] * block_tokens for _ in range(num_blocks)]
        self.host: list[list[Slot]] = [[None] * block_tokens for _ in range(num_slots)]
        self.live: list[Sequence] = []
        self.next_id = 0

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def allocate(self, tokens: list[int]) -> Sequence:
        """Few different tokens, so that prompts share their beginnings."""
        request = Request(id=0, prompt_ids=tuple(tokens), sampling=SamplingParams(max_tokens=1))
        return self.start(Sequence(self.next_id, request, (0, self.next_id, self.next_id)))

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Sequence) -> Sequence:
        saved_before = self.tables.pool.num_saved
        child = parent.fork(self.next_id, sample=1)
        child.token_ids = list(parent.token_ids)
        child.state = parent.state
        self.tables.fork(parent, child)
        if parent.swap_slots:
            child.next_position = 0
        assert self.tables.pool.num_saved == saved_before + len(parent.block_ids)
        return self.start(child)

    def start(self, sequence: Sequence) -> Sequence:
        self.next_id += 1
        self.live.append(sequence)
        return sequence

    @rule(sequence=sequences, token=st.integers(0, 1))
    def draw(self, sequence: Sequence, token: int) -> None:
        sequence.token_ids.append(token)

    @rule(sequence=sequences, most=st.integers(1, 9))
    def append(self, sequence: Sequence, most: int) -> None:
        num_tokens = min(most, sequence.num_pending)
        if sequence.swap_slots or sequence.state is State.ENDED or not num_tokens:
            return
        before, free, pool = sequence.block_ids, self.tables.pool.num_free, self.tables.pool
        start, stop = sequence.next_position, sequence.next_position + num_tokens
        copies = self.tables.num_copied
        if not self.tables.grow(sequence, num_tokens):
            assert sequence.block_ids == before
            assert pool.blocks_for(stop) - len(before) + 1 > free
            return
        assert self.tables.num_copied - copies <= 1
        self.move()
        for position in range(start, stop):
            index, offset = divmod(position, pool.block_tokens)
            assert pool.references(sequence.block_ids[index]) == 1
            assert all(pool.find(key) != sequence.block_ids[index] for key in sequence.block_keys)
            self.device[sequence.block_ids[index]][offset] = tuple(sequence.token_ids[: position + 1])
        sequence.next_position = stop
        self.tables.publish(sequence)

    @rule(sequence=sequences)
    def adopt(self, sequence: Sequence) -> None:
        if not sequence.swap_slots and sequence.state is not State.ENDED:
            adopted = self.tables.adopt(sequence)
            assert adopted % self.tables.pool.block_tokens == 0
            assert adopted == 0 or sequence.num_pending >= 1

    @rule(sequence=sequences)
    def swap_out(self, sequence: Sequence) -> None:
        if sequence.block_ids and len(sequence.block_ids) <= len(self.tables.free_slots):
            self.tables.swap_out(sequence)
            self.move()

    @rule(sequence=sequences, spare=st.integers(0, 2))
    def swap_in(self, sequence: Sequence, spare: int) -> None:
        if not sequence.swap_slots:
            return
        slots = sequence.swap_slots
        moved = self.tables.swap_in(sequence, spare)
        assert (moved is None) == (sequence.swap_slots == slots)
        self.move()

    @rule(sequence=sequences)
    def drop(self, sequence: Sequence) -> None:
        """To be computed anew."""
        self.tables.release(sequence)
        sequence.next_position = 0

    @rule(sequence=sequences)
    def free(self, sequence: Sequence) -> None:
        self.drop(sequence)
        sequence.state = State.ENDED

    def move(self) -> None:
        for kind, src, dst in self.tables.take_moves():
            source = self.host if kind == "swap in" else self.device
            target = self.host if kind == "swap out" else self.device
            target[dst] = list(source[src])

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        if not hasattr(self, "tables"):
            return
        pool = self.tables.pool
        held = Counter(block_id for sequence in self.live for block_id in sequence.block_ids)
        assert all(pool.references(block_id) == held[block_id] for block_id in range(pool.num_blocks))
        assert pool.num_used == len(held)
        assert pool.num_saved == held.total() - len(held)
        slots = [slot for sequence in self.live for slot in sequence.swap_slots]
        assert sorted(slots + self.tables.free_slots) == list(range(self.num_slots))

    @invariant()
    def what_is_found_holds_the_tokens_of_its_key(self) -> None:
        """Idle blocks too, until they are evicted; a block is referenced, idle or free, and never two of these."""
        if not hasattr(self, "tables"):
            return
        pool = self.tables.pool
        held = {block_id for sequence in self.live for block_id in sequence.block_ids}
        idle, free = set(pool._idle), set(pool._free)
        assert len(pool._free) == len(free)
        assert sorted([*held, *idle, *free]) == list(range(pool.num_blocks))
        assert idle <= set(pool._key_of)
        assert not free & set(pool._key_of)
        assert len(pool._block_of) == len(pool._key_of)
        for block_id, key in pool._key_of.items():
            tokens = self.device[block_id][-1]
            assert tokens is not None
            request = Request(id=0, prompt_ids=tokens, sampling=SamplingParams(max_tokens=1))
            index = len(tokens) // pool.block_tokens - 1
            assert Sequence(0, request, (0, 0, 0)).block_key(index, pool.block_tokens) == key
            assert pool.find(key) == block_id

    @rule(kept=st.integers(0, 3))
    def evict(self, kept: int) -> None:
        """Someone takes blocks and gives them back unfilled: the cache forgets those of the longest idle ones, and only
        where no free ones are left."""
        pool = self.tables.pool
        num = max(0, pool.num_free - kept)
        free, idle, evicted = len(pool._free), list(pool._idle), pool.num_evicted
        pool.release(pool.take(num))
        gone = max(0, num - free)
        assert pool.num_evicted - evicted == gone
        assert list(pool._idle) == idle[gone:]

    @invariant()
    def every_sequence_finds_its_tokens(self) -> None:
        for sequence in getattr(self, "live", []):
            block_tokens = self.tables.pool.block_tokens
            blocks = sequence.swap_slots or sequence.block_ids
            memory = self.host if sequence.swap_slots else self.device
            found = [slot for block_id in blocks for slot in memory[block_id]][: sequence.next_position]
            wanted = [tuple(sequence.token_ids[: i + 1]) for i in range(sequence.next_position)]
            assert found == wanted
            waste = len(blocks) * block_tokens - sequence.next_position
            assert 0 <= waste < block_tokens


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
