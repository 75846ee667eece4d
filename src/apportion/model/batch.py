"""A scheduled batch as tensors: the tokens of all its sequences in one row, without padding.

Shapes: T = tokens of the batch, C = positions of one sequence so far, N = tokens to draw, B = sequences with one new
token (of a group), R = their runs of consecutive KV slots.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.types.request import Chunk, ScheduledBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence in the batch: rows `[row_start, row_stop)` stand at positions from `start`."""

    row_start: int
    row_stop: int
    start: int
    slots: Tensor | slice
    """KV slots of positions `[0, start + rows)`: slots_C, or a slice where the blocks lie in order."""
    runs_R2: np.ndarray
    """The same as (first slot, number of slots) of each run of consecutive ones (int64)."""

    @property
    def num_rows(self) -> int:
        return self.row_stop - self.row_start

    @property
    def length(self) -> int:
        """Positions so far, the new ones among them."""
        return self.start + self.num_rows

    def slot_numbers(self, torch_device: str) -> Tensor:
        """slots_C"""
        if isinstance(self.slots, slice):
            return torch.arange(self.slots.start, self.slots.stop, device=torch_device)
        return self.slots

    def new_slots(self, torch_device: str) -> Tensor:
        """Of the new positions."""
        slots = self.slots_between(self.start, self.length)
        return (
            torch.arange(slots.start, slots.stop, device=torch_device) if isinstance(slots, slice) else slots
        )

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

    @classmethod
    def build(cls, spans: list[SequenceSpan], torch_device: str) -> "DecodeGroup":
        most = max(span.length for span in spans)
        slots = [F.pad(span.slot_numbers(torch_device), (0, most - span.length)) for span in spans]
        return cls(
            rows_B=_ints([span.row_start for span in spans], torch_device),
            slots_BC=torch.stack(slots),
            lengths_B1=_ints([span.length for span in spans], torch_device)[:, None],
        )

    def visible_BC(self, window_tokens: int | None) -> Tensor:
        """Which of its slots each sequence's token sees."""
        positions_C = torch.arange(self.slots_BC.shape[1], device=self.slots_BC.device)
        visible_BC = positions_C < self.lengths_B1
        if window_tokens is not None:
            visible_BC &= positions_C >= self.lengths_B1 - window_tokens
        return visible_BC


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """The sequences with one new token, for the compiled kernel (int64)."""

    rows_B: np.ndarray
    slots_B: np.ndarray
    """Where each new token's key and value go."""
    runs_R2: np.ndarray
    """(first slot, number of slots) of all positions of each sequence in turn."""
    first_run_B: np.ndarray
    """Sequence b has the runs `[first_run_B[b], first_run_B[b + 1])`; one longer than B."""

    @classmethod
    def build(cls, spans: list[SequenceSpan]) -> "DecodeRows":
        runs = [span.runs_R2 for span in spans]
        return cls(
            rows_B=np.array([span.row_start for span in spans], np.int64),
            slots_B=np.array([own.item(-2) + own.item(-1) - 1 for own in runs], np.int64),
            runs_R2=np.concatenate([np.empty((0, 2), np.int64), *runs]),
            first_run_B=np.array([0, *accumulate(map(len, runs))], np.int64),
        )


def _context_runs(chunk: Chunk, block_tokens: int) -> np.ndarray:
    """(first slot, number of slots) of each run of positions `[0, chunk.stop)`: runs_R2."""
    num_blocks = -(-chunk.stop // block_tokens)
    first = chunk.block_ids[0]
    if chunk.block_ids[:num_blocks] == tuple(range(first, first + num_blocks)):
        return np.array([(first * block_tokens, chunk.stop)], np.int64)
    blocks = np.array(chunk.block_ids[:num_blocks], np.int64)
    firsts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    runs_R2 = np.empty((len(firsts), 2), np.int64)
    runs_R2[:, 0] = blocks[firsts] * block_tokens
    runs_R2[:, 1] = np.diff(firsts, append=num_blocks) * block_tokens
    runs_R2[-1, 1] -= num_blocks * block_tokens - chunk.stop
    return runs_R2


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatBatch:
    """Rows are in the order of `ScheduledBatch.chunks`."""

    token_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    """Where each token's own key and value go."""
    longer_spans: tuple[SequenceSpan, ...]
    """Those of several rows."""
    decode: DecodeRows
    decode_groups: tuple[DecodeGroup, ...]
    """Where there is no compiled kernel."""
    alone_spans: tuple[SequenceSpan, ...]
    """Those in no group."""
    sample_rows_N: Tensor
    """The rows after which a token is drawn, in chunk order."""

    @classmethod
    def build(
        cls, batch: ScheduledBatch, *, block_tokens: int, torch_device: str, gather_tokens: int = 0
    ) -> "FlatBatch":
        """Sequences with one new token attend together as long as their filled up contexts are at most
        `gather_tokens` in all."""
        chunks = batch.chunks
        spans = _spans(chunks, block_tokens, torch_device)
        single = [span for span in spans if span.num_rows == 1]
        groups = _groups(single, gather_tokens)
        grouped = {span.row_start for group in groups for span in group}
        decode = DecodeRows.build(single)
        if torch_device == "cpu" and len(single) == len(spans):
            slots_T = torch.from_numpy(decode.slots_B)
        else:
            slots_T = torch.cat([span.new_slots(torch_device) for span in spans])
        return cls(
            token_ids_T=_ints([token for chunk in batch.chunks for token in chunk.token_ids], torch_device),
            positions_T=_ints(
                [p for chunk in batch.chunks for p in range(chunk.start, chunk.stop)], torch_device
            ),
            slots_T=slots_T,
            longer_spans=tuple(span for span in spans if span.num_rows > 1),
            decode=decode,
            decode_groups=tuple(DecodeGroup.build(group, torch_device) for group in groups),
            alone_spans=tuple(span for span in spans if span.row_start not in grouped),
            sample_rows_N=_ints(
                [
                    span.row_stop - 1
                    for span, chunk in zip(spans, chunks, strict=True)
                    if chunk.sampling is not None
                ],
                torch_device,
            ),
        )


def _spans(chunks: tuple[Chunk, ...], block_tokens: int, torch_device: str) -> list[SequenceSpan]:
    ends = list(accumulate(len(chunk.token_ids) for chunk in chunks))
    return [
        SequenceSpan(
            row_start=row_stop - len(chunk.token_ids),
            row_stop=row_stop,
            start=chunk.start,
            slots=_context_slots(chunk, block_tokens, torch_device),
            runs_R2=_context_runs(chunk, block_tokens),
        )
        for chunk, row_stop in zip(chunks, ends, strict=True)
    ]


def _groups(spans: list[SequenceSpan], gather_tokens: int) -> list[list[SequenceSpan]]:
    """Those of two and more, the longest together."""
    groups: list[list[SequenceSpan]] = []
    for span in sorted(spans, key=lambda span: -span.length):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].length <= gather_tokens:
            groups[-1].append(span)
        else:
            groups.append([span])
    return [group for group in groups if len(group) > 1]


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
