"""Block tables: what happens to a sequence's blocks, and the moves of content that the stages carry out for it.

Every stage executes steps in the order they were scheduled, and the moves of a step before its writes. So a block may
change hands as soon as the step that last uses it is scheduled, even while that step is in flight; and a
block that a scheduled step fills may be read by any later step.
"""

from apportion.scheduler.blocks import BlockPool
from apportion.scheduler.sequence import Sequence
from apportion.types.request import BlockMove


class BlockTables:
    """Blocks on the devices, slots in the host's swap space, and moves that no step has taken along yet."""

    def __init__(self, num_blocks: int, block_tokens: int, num_swap_slots: int = 0) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.free_slots = list(range(num_swap_slots - 1, -1, -1))
        self.num_copied = 0
        self._moves: list[BlockMove] = []

    def take_moves(self) -> tuple[BlockMove, ...]:
        """For the step that is being scheduled."""
        moves = tuple(self._moves)
        self._moves.clear()
        return moves

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Makes room to write the sequence's next tokens: blocks for them, and one of its own in place of a shared
        one they would be written to. False, and nothing changed, where too few are free."""
        if sequence.next_position + num_tokens <= sequence.room:
            return True
        pool, first = self.pool, sequence.next_position // self.pool.block_tokens
        shared = first < len(sequence.block_ids) and pool.references(sequence.block_ids[first]) > 1
        missing = pool.blocks_for(sequence.next_position + num_tokens) - len(sequence.block_ids)
        if missing + shared > pool.num_free:
            return False
        if shared:
            self._copy(sequence, first)
        if missing > 0:
            sequence.block_ids += pool.take(missing)
        sequence.room = len(sequence.block_ids) * pool.block_tokens
        return True

    def _copy(self, sequence: Sequence, index: int) -> None:
        old = sequence.block_ids[index]
        (new,) = self.pool.take(1)
        self.pool.release((old,))
        sequence.block_ids = (*sequence.block_ids[:index], new, *sequence.block_ids[index + 1 :])
        self._moves.append(BlockMove("copy", old, new))
        self.num_copied += 1

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """The child's table is the parent's; whichever writes to a block first gets a copy."""
        self.pool.share(parent.block_ids)
        child.block_ids = parent.block_ids
        parent.room = child.room = 0

    def release(self, sequence: Sequence) -> None:
        """Gives up all that the sequence holds; what was published can still be found."""
        self.pool.release(sequence.block_ids)
        self.free_slots.extend(reversed(sequence.swap_slots))
        sequence.block_ids = sequence.swap_slots = ()
        sequence.num_published = sequence.room = 0

    def adopt(self, sequence: Sequence) -> int:
        """Takes over blocks that hold the sequence's next tokens; returns how many tokens. At least one token is left
        to compute, as its logits are wanted, in a block of its own."""
        pool, before = self.pool, sequence.next_position
        if before != len(sequence.block_ids) * pool.block_tokens:
            return 0
        while len(sequence.token_ids) - sequence.next_position > pool.block_tokens:
            key = sequence.block_key(len(sequence.block_ids), pool.block_tokens)
            block_id = pool.find(key)
            if block_id is None:
                break
            pool.share((block_id,))
            sequence.block_ids += (block_id,)
            sequence.next_position += pool.block_tokens
            sequence.num_published += 1
        return sequence.next_position - before

    def publish(self, sequence: Sequence) -> None:
        """Lets later steps find the blocks that the scheduled ones fill."""
        num_full = sequence.num_computed // self.pool.block_tokens
        for index in range(sequence.num_published, num_full):
            key = sequence.block_key(index, self.pool.block_tokens)
            self.pool.publish(sequence.block_ids[index], key)
        sequence.num_published = num_full

    def take_back(self, sequence: Sequence, num_tokens: int) -> None:
        """The last tokens that were taken were wrong drafts: gives up the blocks that hold nothing else. A sequence
        that is swapped out keeps their slots until it is back."""
        sequence.next_position -= num_tokens
        num_needed = self.pool.blocks_for(sequence.next_position)
        if num_needed < len(sequence.block_ids):
            self.pool.release(sequence.block_ids[num_needed:])
            sequence.block_ids = sequence.block_ids[:num_needed]
            sequence.room = min(sequence.room, num_needed * self.pool.block_tokens)

    def swap_out(self, sequence: Sequence) -> None:
        """Moves the sequence's content to the host, shared blocks too, and gives up its blocks."""
        slots = tuple(self.free_slots.pop() for _ in sequence.block_ids)
        self._moves += [
            BlockMove("swap out", src, dst) for src, dst in zip(sequence.block_ids, slots, strict=True)
        ]
        self.release(sequence)
        sequence.swap_slots = slots

    def swap_in(self, sequence: Sequence, spare_blocks: int) -> int | None:
        """Brings the content back, but for blocks that are still found on the devices; returns how many are moved.
        None, and nothing changed, where fewer than `spare_blocks` would be left free."""
        pool, slots = self.pool, sequence.swap_slots
        num_full = sequence.num_computed // pool.block_tokens
        found = [pool.find(sequence.block_key(i, pool.block_tokens)) for i in range(num_full)]
        kept = tuple(block_id for block_id in found if block_id is not None)
        pool.share(kept)
        num_moved = len(slots) - len(kept)
        if num_moved + spare_blocks > pool.num_free:
            pool.release(kept)
            return None
        fresh = iter(pool.take(num_moved))
        table: list[int] = []
        for slot, block_id in zip(slots, found + [None] * (len(slots) - num_full), strict=True):
            table.append(next(fresh) if block_id is None else block_id)
            if block_id is None:
                self._moves.append(BlockMove("swap in", slot, table[-1]))
        self.free_slots.extend(reversed(slots))
        sequence.swap_slots, sequence.block_ids = (), tuple(table)
        self.publish(sequence)
        self.take_back(sequence, 0)
        return num_moved
