"""A scheduled batch as tensors: the tokens of all its sequences in one row, without padding.

Shapes: T = tokens of the batch, C = positions of one sequence so far, N = tokens to draw.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.types.request import Chunk, ScheduledBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence in the batch: rows `[row_start, row_stop)` stand at positions from `start`."""

    row_start: int
    row_stop: int
    start: int
    slots: Tensor | slice
    """KV slots of positions `[0, start + rows)`: slots_C, or a slice where the blocks lie in order."""

    def slots_between(self, first: int, stop: int) -> Tensor | slice:
        """KV slots of positions `[first, stop)`."""
        if isinstance(self.slots, slice):
            return slice(self.slots.start + first, self.slots.start + stop)
        return self.slots[first:stop]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """Rows are in the order of `ScheduledBatch.chunks`."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """Where each token's own key and value go."""
    spans: tuple[SequenceSpan, ...]
    sample_rows_N: Tensor
    """The rows after which a token is drawn, in chunk order."""

    @classmethod
    def build(cls, batch: ScheduledBatch, *, block_tokens: int, torch_device: str) -> "FlatBatch":
        chunks = batch.chunks
        row_stop = 0
        spans: list[SequenceSpan] = []
        new_slots: list[Tensor] = []
        for chunk in chunks:
            row_start, row_stop = row_stop, row_stop + len(chunk.token_ids)
            slots = _context_slots(chunk, block_tokens, torch_device)
            span = SequenceSpan(row_start=row_start, row_stop=row_stop, start=chunk.start, slots=slots)
            new = span.slots_between(chunk.start, chunk.stop)
            new_slots.append(
                torch.arange(new.start, new.stop, device=torch_device) if isinstance(new, slice) else new
            )
            spans.append(span)
        return cls(
            token_ids_T=_ints([token for chunk in batch.chunks for token in chunk.token_ids], torch_device),
            positions_T=_ints(
                [p for chunk in batch.chunks for p in range(chunk.start, chunk.stop)], torch_device
            ),
            slots_T=torch.cat(new_slots),
            spans=tuple(spans),
            sample_rows_N=_ints(
                [
                    span.row_stop - 1
                    for span, chunk in zip(spans, chunks, strict=True)
                    if chunk.sampling is not None
                ],
                torch_device,
            ),
        )


def _context_slots(chunk: Chunk, block_tokens: int, torch_device: str) -> Tensor | slice:
    """Slots of positions `[0, chunk.stop)`."""
    num_blocks = -(-chunk.stop // block_tokens)
    blocks = chunk.block_ids[:num_blocks]
    assert len(blocks) == num_blocks, f"{len(blocks)} blocks for {chunk.stop} tokens"
    if blocks == tuple(range(blocks[0], blocks[0] + num_blocks)):
        return slice(blocks[0] * block_tokens, blocks[0] * block_tokens + chunk.stop)
    first_slots = _ints(list(blocks), torch_device) * block_tokens
    offsets = torch.arange(block_tokens, device=torch_device)
    return (first_slots[:, None] + offsets).flatten()[: chunk.stop]


def _ints(values: list[int], torch_device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=torch_device)
