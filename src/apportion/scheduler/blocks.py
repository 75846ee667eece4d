"""The paged KV cache's bookkeeping: which blocks are free, which belong to a sequence.

Invariant: every block is either free or owned by exactly one sequence.
"""


class BlockAllocator:
    """Hands out block ids `[0, num_blocks)`, each standing for `block_tokens` tokens on every stage."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def extend(self, block_ids: list[int], num_tokens: int) -> bool:
        """Grows a table in place until it holds `num_tokens`; False, and nothing taken, where too few are free."""
        missing = self.blocks_for(num_tokens) - len(block_ids)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block_ids.append(self._free.pop())
        return True

    def release(self, block_ids: list[int]) -> None:
        """Takes back every block of a table and empties it."""
        self._free.extend(reversed(block_ids))
        block_ids.clear()
