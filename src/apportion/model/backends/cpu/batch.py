"""A scheduled batch as the compiled kernels read it: each sequence's KV slots as runs of consecutive ones.

Shapes: T = tokens of the batch, B = sequences with one new token, R = runs.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from apportion.model.batch import BatchRows, chunk_rows, new_slots
from apportion.model.kernels.step_operand import DecodeRows
from apportion.types.request import Chunk, ScheduledBatch

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class LongerSpan:
    """A sequence with several new tokens: rows `[row_start, row_stop)` stand at positions from `start`."""

    row_start: int
    row_stop: int
    start: int
    runs_R2: np.ndarray
    """(first slot, number of slots) of each run of positions `[0, start + rows)` (int64)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBatch:
    """See `FlatBatch`."""

    rows: BatchRows
    decode: DecodeRows
    """The sequences with one new token, and each token of those with drafts."""
    longer_spans: tuple[LongerSpan, ...]
    """Those with several."""
    slots_T: Tensor | None
    """Where each token's own key and value go, if they have to be there before attention; None where all sequences have
    one new token, as `decode` says it."""

    @classmethod
    def of(cls, batch: ScheduledBatch, block_tokens: int) -> "CpuBatch":
        single: list[tuple[int, np.ndarray]] = []
        longer: list[LongerSpan] = []
        for chunk, (start, stop) in chunk_rows(batch):
            runs_R2 = context_runs(chunk, block_tokens)
            if stop - start == 1:
                single.append((start, runs_R2))
            else:
                span = LongerSpan(row_start=start, row_stop=stop, start=chunk.start, runs_R2=runs_R2)
                longer.append(span)
        drafts = any(chunk.num_drafts for chunk in batch.chunks)
        return cls(
            rows=BatchRows.of(batch, CPU),
            decode=_decode_rows(single),
            longer_spans=tuple(longer),
            slots_T=new_slots(batch, block_tokens, CPU) if longer or drafts else None,
        )


def _decode_rows(spans: list[tuple[int, np.ndarray]]) -> DecodeRows:
    runs = [runs_R2 for _, runs_R2 in spans]
    return DecodeRows(
        rows_B=np.array([row for row, _ in spans], np.int64),
        slots_B=np.array([own.item(-2) + own.item(-1) - 1 for own in runs], np.int64),
        runs_R2=np.concatenate([np.empty((0, 2), np.int64), *runs]),
        first_run_B=np.array([0, *accumulate(map(len, runs))], np.int64),
    )


def context_runs(chunk: Chunk, block_tokens: int) -> np.ndarray:
    """(first slot, number of slots) of each run of positions `[0, chunk.stop)`: runs_R2."""
    num_blocks = -(-chunk.stop // block_tokens)
    assert len(chunk.block_ids) >= num_blocks, f"{len(chunk.block_ids)} blocks for {chunk.stop} tokens"
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
