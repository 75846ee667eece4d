"""Making room: a sequence's blocks are swapped to the host, or dropped and computed anew later."""

from apportion.scheduler.sequence import Sequence
from apportion.scheduler.tables import BlockTables
from apportion.types.metrics import PreemptionCounts
from apportion.types.step_costs import PreemptMode, StepCosts


class Preemption:
    """Takes blocks from sequences and gives them back, the cheaper way, and counts what it cost."""

    def __init__(
        self, tables: BlockTables, costs: StepCosts, mode: PreemptMode, counts: PreemptionCounts
    ) -> None:
        self.counts = counts
        self._tables = tables
        self._costs = costs
        self._mode: PreemptMode = mode

    def preempt(self, sequence: Sequence) -> None:
        """Its steps in flight go on: the stages execute them before anything scheduled from now on."""
        sequence.was_preempted = True
        if self._swaps(sequence):
            self.counts.num_swaps += 1
            self.counts.swapped_out_blocks += self._count_swap(len(sequence.block_ids))
            self._tables.swap_out(sequence)
        else:
            self.counts.num_recomputes += 1
            self._tables.release(sequence)
            sequence.drop()

    def resume(self, sequence: Sequence, spare_blocks: int) -> bool:
        """Whether a swapped sequence is back on the devices."""
        num_moved = self._tables.swap_in(sequence, spare_blocks)
        if num_moved is None:
            return False
        self.counts.swapped_in_blocks += self._count_swap(num_moved)
        return True

    def count_recomputed(self, num_tokens: int) -> None:
        """Of a step."""
        self.counts.recomputed_tokens += num_tokens
        self.counts.recompute_s += num_tokens * self._costs.prefill_token_s

    def _swaps(self, sequence: Sequence) -> bool:
        num_blocks = len(sequence.block_ids)
        if self._mode == "recompute" or num_blocks > len(self._tables.free_slots):
            return False
        there_and_back_s = 2 * num_blocks * self._costs.swap_block_s
        return self._mode == "swap" or there_and_back_s < self._costs.recompute_s(sequence.next_position)

    def _count_swap(self, num_blocks: int) -> int:
        self.counts.swapped_bytes += num_blocks * self._costs.block_bytes
        self.counts.swap_s += num_blocks * self._costs.swap_block_s
        return num_blocks
