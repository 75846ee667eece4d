"""The paged KV cache's bookkeeping: who holds which block, and which blocks still hold something worth finding.

Invariant: every block is in one of three states. Referenced: in the tables of one or more sequences. Idle:
in no table, but its content can be found by its key; the least recently released is evicted first. Free: neither.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids `[0, num_blocks)`, each standing for `block_tokens` tokens on every stage."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_saved = 0
        """Blocks that tables would need more if none were shared: the sum of (references − 1)."""
        self.num_evicted = 0
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `take` can hand out: free ones and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Idle blocks: kept for whoever has the same tokens."""
        return len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def take(self, num: int) -> tuple[int, ...]:
        """`num` blocks of undefined content, at most `num_free`."""
        assert num <= self.num_free, f"{num} blocks wanted, {self.num_free} free"
        taken = tuple(self._free.pop() if self._free else self._evict() for _ in range(num))
        for block_id in taken:
            self._references[block_id] = 1
        return taken

    def share(self, block_ids: Iterable[int]) -> None:
        """One more reference to each."""
        for block_id in block_ids:
            if self._references[block_id]:
                self.num_saved += 1
            else:
                del self._idle[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: tuple[int, ...]) -> None:
        """One reference less to each. The last is evicted first: a block is found only behind those before it."""
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id]:
                self.num_saved -= 1
            elif block_id in self._key_of:
                self._idle[block_id] = None
            else:
                self._free.append(block_id)

    def publish(self, block_id: int, key: bytes) -> None:
        """From now on the block can be found by its content, and is not written again. The first of a key stays."""
        if key not in self._block_of and block_id not in self._key_of:
            self._block_of[key] = block_id
            self._key_of[block_id] = key

    def find(self, key: bytes) -> int | None:
        return self._block_of.get(key)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block_id)]
        self.num_evicted += 1
        return block_id
