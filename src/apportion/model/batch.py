"""A scheduled batch as tensors: the tokens of all its sequences in one row, without padding.

Rows are in the order of `ScheduledBatch.chunks`. Shapes: T = tokens of the batch, N = tokens to draw.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from apportion.types.request import Chunk, ScheduledBatch


class FlatBatch(Protocol):
    """What every part of a stage reads of a batch; a backend's own adds what its attention reads."""

    @property
    def rows(self) -> "BatchRows": ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRows:
    token_ids_T: Tensor
    positions_T: Tensor
    sample_rows_N: Tensor
    """The rows after which a token is drawn, in chunk order."""

    @classmethod
    def of(cls, batch: ScheduledBatch, torch_device: torch.device) -> "BatchRows":
        chunks = batch.chunks
        drawn = [stop - 1 for chunk, (_, stop) in chunk_rows(batch) if chunk.sampling is not None]
        return cls(
            token_ids_T=ints([token for chunk in chunks for token in chunk.token_ids], torch_device),
            positions_T=ints(
                [position for chunk in chunks for position in range(chunk.start, chunk.stop)], torch_device
            ),
            sample_rows_N=ints(drawn, torch_device),
        )


def chunk_rows(batch: ScheduledBatch) -> list[tuple[Chunk, tuple[int, int]]]:
    """Each chunk with its rows `[start, stop)`; of one with drafts every token is a chunk of its own, so that it gets
    the bits that it gets where it was not guessed before."""
    stops = accumulate(len(chunk.token_ids) for chunk in batch.chunks)
    return [
        part
        for chunk, stop in zip(batch.chunks, stops, strict=True)
        for part in (
            _tokens(chunk, stop) if chunk.num_drafts else [(chunk, (stop - len(chunk.token_ids), stop))]
        )
    ]


def _tokens(chunk: Chunk, row_stop: int) -> list[tuple[Chunk, tuple[int, int]]]:
    first = row_stop - len(chunk.token_ids)
    return [
        (chunk._replace(start=chunk.start + i, token_ids=(token_id,)), (first + i, first + i + 1))
        for i, token_id in enumerate(chunk.token_ids)
    ]


def new_slots(batch: ScheduledBatch, block_tokens: int, torch_device: torch.device) -> Tensor:
    """Where each token's own key and value go: slots_T."""
    parts: list[np.ndarray] = []
    for chunk in batch.chunks:
        first = chunk.start // block_tokens
        blocks = np.array(chunk.block_ids[first : -(-chunk.stop // block_tokens)], np.int64)
        positions = np.arange(chunk.start, chunk.stop)
        parts.append(blocks[positions // block_tokens - first] * block_tokens + positions % block_tokens)
    return torch.from_numpy(np.concatenate(parts)).to(torch_device)


def ints(values: list[int], torch_device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=torch_device)
