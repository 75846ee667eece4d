"""Who goes first.

A request's urgency is its priority, in units of AGING_STEPS steps, plus the step at which it came. It never changes,
and so no request waits behind one that came more than `AGING_STEPS · (difference of their priorities)` steps after
it: whatever arrives, it is overtaken for so long and no longer.
"""

from bisect import insort

from apportion.scheduler.sequence import Rank, Sequence

AGING_STEPS = 500


def rank(priority: int, step: int, sequence_id: int) -> Rank:
    """Lower is earlier; equals in the order of their ids."""
    return (priority * AGING_STEPS + step, sequence_id, sequence_id)


class RankedSequences:
    """Sequences in order of rank."""

    def __init__(self) -> None:
        self.sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self.sequences

    def add(self, sequence: Sequence) -> None:
        insort(self.sequences, sequence, key=_rank_of)

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)


def _rank_of(sequence: Sequence) -> Rank:
    return sequence.rank
