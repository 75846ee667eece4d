"""The KV pool as compiled attention reads and writes it.

Shapes: T = new tokens, K = local KV heads, N = query heads, G = query heads per KV head, S = slots, D = head dim.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.model.backends.cpu.attention import CompiledAttention
from apportion.model.backends.cpu.batch import CpuBatch
from apportion.model.kernels.kv_elements import ELEMENT_TYPES
from apportion.model.kv_pool import PoolTensors


class CpuPool:
    """See `KVPool`."""

    def __init__(self, tensors: PoolTensors) -> None:
        self.tensors = tensors

    @property
    def elements(self) -> "np.dtype[Any]":
        """The element type of `arrays`."""
        return self.arrays(self.tensors.layer_start)[0].dtype

    def arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values of all slots as compiled code sees them: keys_KSD and values_KSD."""
        index, element = layer - self.tensors.layer_start, ELEMENT_TYPES[self.tensors.dtype]
        keys_KSD, values_KSD = self.tensors.keys_KSD[index], self.tensors.values_KSD[index]
        return keys_KSD.view(element).numpy(), values_KSD.view(element).numpy()

    def attend(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        *,
        layer: int,
        batch: CpuBatch,
        scale: float,
        window_tokens: int | None,
        softcap: float | None,
        sinks_N: Tensor | None,
        out_TND: Tensor | None = None,
    ) -> Tensor:
        num_tokens, kv_heads, head_dim = key_TKD.shape
        query_TKGD = query_TND.reshape(num_tokens, kv_heads, -1, head_dim)
        if out_TND is None:
            out_TND = torch.empty(query_TND.shape)
        attention = CompiledAttention(
            query_TKGD,
            out_TND.view(query_TKGD.shape),
            self.arrays(layer),
            self.tensors.beyond_1,
            scale,
            window_tokens,
            softcap,
            sinks_N,
        )
        if batch.slots_T is not None:
            self.tensors.write(layer, batch.slots_T, key_TKD, value_TKD)
        attention.decode(key_TKD, value_TKD, batch.decode)
        for span in batch.longer_spans:
            attention.prefill(span)
        return out_TND
