"""The paged KV cache of a member's layers, cut into blocks: what a backend's pool offers, and the tensors behind it.

A head's keys lie side by side: a sequence whose blocks follow each other is one run of memory per head, which a core
reads 2-3 times as fast as rows a token apart. They may be narrower than what attention computes in: they are rounded to
nearest as they are written, and a number too large for their format is never kept silently.

Shapes: B = blocks, S = slots of the pool, T = new tokens, C = positions of one sequence, K = local KV heads, N = query
heads, D = head dim.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from apportion.types.errors import ModelError


class KVPool(Protocol):
    @property
    def tensors(self) -> "PoolTensors": ...

    def attend(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        *,
        layer: int,
        batch: Any,
        scale: float,
        window_tokens: int | None,
        softcap: float | None,
        sinks_N: Tensor | None,
        out_TND: Tensor | None = None,
    ) -> Tensor:
        """Writes the new keys and values, then attends each token to its sequence; returns out_TND, contiguous, in new
        memory where none is given.

        `batch` is one that the same backend prepared; `window_tokens` counts the token itself; `softcap` bounds the
        scores by tanh; a sink is a score per head that takes part in the softmax and has no value.
        """
        ...


class PoolTensors:
    """Layers `[layer_start, layer_start + num_layers)`; slot = block · block_tokens + offset in the block."""

    def __init__(
        self,
        *,
        layer_start: int,
        num_layers: int,
        num_blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        torch_device: torch.device,
    ) -> None:
        shape = (kv_heads, num_blocks * block_tokens, head_dim)
        self.layer_start = layer_start
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.dtype = dtype
        self.keys_KSD = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]
        self.values_KSD = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]
        self.beyond_1 = np.zeros(1, np.int64)
        """1 once a number was too large for the format."""

    @property
    def by_block(self) -> list[Tensor]:
        """Views of all tensors with the block as first dimension."""
        return [
            tensor_KSD.unflatten(1, (self.num_blocks, self.block_tokens)).transpose(0, 1)
            for tensor_KSD in (*self.keys_KSD, *self.values_KSD)
        ]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys_KSD, *self.values_KSD))

    def check_range(self) -> None:
        """Raises ModelError where a number that was written since the last call is none of the format."""
        if self.beyond_1[0]:
            self.beyond_1[0] = 0
            highest = torch.finfo(torch.float16).max
            raise ModelError(
                f"keys or values are beyond the range of fp16 ({highest:g}); use --kv-format bf16 or fp32"
            )

    def write(self, layer: int, slots_T: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> None:
        index = layer - self.layer_start
        for stored_KSD, new_TKD in ((self.keys_KSD[index], key_TKD), (self.values_KSD[index], value_TKD)):
            new_KTD = new_TKD.transpose(0, 1).to(self.dtype)
            stored_KSD.index_copy_(1, slots_T, new_KTD)
            if self.dtype == torch.float16 != new_TKD.dtype and not new_KTD.isfinite().all():
                self.beyond_1[0] = 1

    def read(self, layer: int, slots: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """key_KCD and value_KCD at `slots`: views where these are a slice and the pool has the dtype, else copies."""
        index = layer - self.layer_start
        if isinstance(slots, slice):
            return self.keys_KSD[index][:, slots].to(dtype), self.values_KSD[index][:, slots].to(dtype)
        key_KCD, value_KCD = (
            stored_KSD.index_select(1, slots) for stored_KSD in (self.keys_KSD[index], self.values_KSD[index])
        )
        return key_KCD.to(dtype), value_KCD.to(dtype)
