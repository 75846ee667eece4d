"""Ways to serve a workload, many at once: prefill chunks × numbers of sequences × numbers of microbatches."""

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    chunks: tuple[int, ...]
    """Largest first."""
    sequences: tuple[int, int]
    """From the first to the second, both included."""
    microbatches: tuple[int, int]

    def split(self) -> Iterator["Ways"]:
        """Halves of the wider of both ranges, then the chunks one by one; nothing where there is but one way."""
        (least, most), (few, many) = self.sequences, self.microbatches
        if least < most and most * few >= many * least:
            middle = (least + most) // 2
            yield replace(self, sequences=(middle + 1, most))
            if few <= middle:
                yield replace(self, sequences=(least, middle), microbatches=(few, min(many, middle)))
        elif few < many:
            middle = (few + many) // 2
            yield replace(self, microbatches=(middle + 1, many))
            yield replace(self, microbatches=(few, middle))
        elif len(self.chunks) > 1:
            yield from (replace(self, chunks=(chunk,)) for chunk in self.chunks)


def all_ways(chunks: tuple[int, ...], sequences: tuple[int, int], num_devices: int) -> Ways:
    """With every number of microbatches for which there are sequences, and messages (`messages_in_flight`)."""
    return Ways(chunks=chunks, sequences=sequences, microbatches=(1, min(sequences[1], 2 * num_devices)))
