"""No block is ever leaked, shared or handed out twice, whatever the order of operations."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from apportion.scheduler.blocks import BlockAllocator


class Blocks(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 20), block_tokens=st.integers(1, 5))
    def build(self, num_blocks: int, block_tokens: int) -> None:
        self.allocator = BlockAllocator(num_blocks, block_tokens)
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    @rule(key=st.integers(0, 5), more=st.integers(0, 12))
    def extend(self, key: int, more: int) -> None:
        table = self.tables.setdefault(key, [])
        before, free = list(table), self.allocator.num_free
        length = self.lengths.get(key, 0) + more
        needed = self.allocator.blocks_for(length) - len(table)
        if self.allocator.extend(table, length):
            assert table[: len(before)] == before
            self.lengths[key] = length
        else:
            assert needed > free
            assert table == before

    @rule(key=st.integers(0, 5))
    def release(self, key: int) -> None:
        self.allocator.release(self.tables.get(key, []))
        self.lengths[key] = 0

    @invariant()
    def every_block_has_one_owner(self) -> None:
        if not hasattr(self, "allocator"):
            return
        owned = [block for table in self.tables.values() for block in table]
        assert len(set(owned)) == len(owned)
        assert len(owned) + self.allocator.num_free == self.allocator.num_blocks
        for key, table in self.tables.items():
            waste = len(table) * self.allocator.block_tokens - self.lengths.get(key, 0)
            assert 0 <= waste < self.allocator.block_tokens


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
