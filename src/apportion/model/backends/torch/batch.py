"""A scheduled batch as torch's own attention reads it: KV slots to gather, of several sequences at once where they fit.

Shapes: T = tokens of the batch, C = positions of one sequence so far, B = sequences with one new token (of a group).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.batch import BatchRows, chunk_rows, ints, new_slots
from apportion.types.request import Chunk, ScheduledBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence in the batch: rows `[row_start, row_stop)` stand at positions from `start`."""

    row_start: int
    row_stop: int
    start: int
    slots: Tensor | slice
    """KV slots of positions `[0, start + rows)`: slots_C, or a slice where the blocks lie in order."""

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def length(self) -> int:
        """Positions so far, the new ones among them."""
        return self.start + self.num_rows

    def slots_between(self, first: int, stop: int) -> Tensor | slice:
        """KV slots of positions `[first, stop)`."""
        if isinstance(self.slots, slice):
            return slice(self.slots.start + first, self.slots.start + stop)
        return self.slots[first:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Sequences with one new token that attend in one call, their contexts filled up to the longest one's."""

    rows_B: Tensor
    slots_BC: Tensor
    """Filled up with slots of anyone."""
    lengths_B1: Tensor

    def visible_BC(self, window_tokens: int | None) -> Tensor:
        """Which of its slots each sequence's token sees."""
        positions_C = torch.arange(self.slots_BC.shape[1], device=self.slots_BC.device)
        visible_BC = positions_C < self.lengths_B1
        if window_tokens is not None:
            visible_BC &= positions_C >= self.lengths_B1 - window_tokens
        return visible_BC


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBatch:
    """See `FlatBatch`."""

    rows: BatchRows
    slots_T: Tensor
    """Where each token's own key and value go."""
    decode_groups: tuple[DecodeGroup, ...]
    alone_spans: tuple[SequenceSpan, ...]
    """The sequences that are in no group."""

    @classmethod
    def of(
        cls, batch: ScheduledBatch, block_tokens: int, torch_device: torch.device, gather_tokens: int
    ) -> "TorchBatch":
        """Sequences with one new token attend together as long as their filled up contexts are at most
        `gather_tokens` in all."""
        spans = [
            SequenceSpan(
                row_start=row_start,
                row_stop=row_stop,
                start=chunk.start,
                slots=_context_slots(chunk, block_tokens, torch_device),
            )
            for chunk, (row_start, row_stop) in chunk_rows(batch)
        ]
        groups = _groups([span for span in spans if span.num_rows == 1], gather_tokens)
        grouped = {span.row_start for group in groups for span in group}
        return cls(
            rows=BatchRows.of(batch, torch_device),
            slots_T=new_slots(batch, block_tokens, torch_device),
            decode_groups=tuple(_decode_group(group, torch_device) for group in groups),
            alone_spans=tuple(span for span in spans if span.row_start not in grouped),
        )


def _groups(spans: list[SequenceSpan], gather_tokens: int) -> list[list[SequenceSpan]]:
    """Those of two and more, the longest together."""
    groups: list[list[SequenceSpan]] = []
    for span in sorted(spans, key=lambda span: -span.length):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].length <= gather_tokens:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [group for group in groups if len(group) > 1]


def _decode_group(spans: list[SequenceSpan], torch_device: torch.device) -> DecodeGroup:
    most = max(span.length for span in spans)
    slots = [F.pad(_numbers(span.slots, torch_device), (0, most - span.length)) for span in spans]
    return DecodeGroup(
        rows_B=ints([span.row_start for span in spans], torch_device),
        slots_BC=torch.stack(slots),
        lengths_B1=ints([span.length for span in spans], torch_device)[:, None],
    )


def _numbers(slots: Tensor | slice, torch_device: torch.device) -> Tensor:
    return torch.arange(slots.start, slots.stop, device=torch_device) if isinstance(slots, slice) else slots


def _context_slots(chunk: Chunk, block_tokens: int, torch_device: torch.device) -> Tensor | slice:
    """Slots of positions `[0, chunk.stop)`."""
    num_blocks = -(-chunk.stop // block_tokens)
    blocks = chunk.block_ids[:num_blocks]
    assert len(blocks) == num_blocks, f"{len(blocks)} blocks for {chunk.stop} tokens"
    if blocks == tuple(range(blocks[0], blocks[0] + num_blocks)):
        return slice(blocks[0] * block_tokens, blocks[0] * block_tokens + chunk.stop)
    first_slots = ints(list(blocks), torch_device) * block_tokens
    offsets = torch.arange(block_tokens, device=torch_device)
    return (first_slots[:, None] + offsets).flatten()[: chunk.stop]
