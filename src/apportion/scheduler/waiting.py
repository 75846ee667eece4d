"""Who goes first.

A request's urgency is its priority, in units of AGING_STEPS steps, plus the step at which it came. It never changes,
and so no request waits behind one that came more than `AGING_STEPS · (difference of their priorities)` steps after
it: whatever arrives, it is overtaken for so long and no longer.
"""

from bisect import bisect_left, insort

from apportion.scheduler.sequence import Rank, Sequence

AGING_STEPS = 500


def rank(priority: int, step: int, sequence_id: int) -> Rank:
    """Lower is earlier; equals in the order of their ids."""
    return (priority * AGING_STEPS + step, sequence_id, sequence_id)


class RankedSequences:
    """Sequences in order of rank; whether one is among them, its state says."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self.sequences, sequence, key=_rank_of)

    def remove(self, sequence: Sequence) -> None:
        """Ranks are unique."""
        index = bisect_left(self.sequences, sequence.rank, key=_rank_of)
        assert self.sequences[index] is sequence
        del self.sequences[index]


def _rank_of(sequence: Sequence) -> Rank:
    return sequence.rank
