"""The KV cache of one member of a stage: one preallocated pair of tensors per layer, cut into blocks.

A head's keys lie side by side: a sequence whose blocks follow each other is one run of memory per head, which a core
reads 2-3 times as fast as rows a token apart.

Shapes: B = blocks, S = slots of the pool, T = new tokens, C = positions of one sequence, K = local KV heads,
D = head dim.
"""

import numpy as np
import torch
from torch import Tensor


class KVPool:
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
        torch_device: str,
    ) -> None:
        shape = (kv_heads, num_blocks * block_tokens, head_dim)
        self.layer_start = layer_start
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.keys_KSD = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]
        self.values_KSD = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]

    @property
    def tensors_B(self) -> list[Tensor]:
        """Views of all tensors with the block as first dimension."""
        return [
            tensor_KSD.unflatten(1, (self.num_blocks, self.block_tokens)).transpose(0, 1)
            for tensor_KSD in (*self.keys_KSD, *self.values_KSD)
        ]

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys_KSD, *self.values_KSD))

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernel can read it."""
        return self.keys_KSD[0].device.type == "cpu" and self.keys_KSD[0].dtype == torch.float32

    def arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The keys and values of all slots, on a CPU: keys_KSD and values_KSD."""
        index = layer - self.layer_start
        return self.keys_KSD[index].numpy(), self.values_KSD[index].numpy()

    def write(self, layer: int, slots_T: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> None:
        index = layer - self.layer_start
        self.keys_KSD[index].index_copy_(1, slots_T, key_TKD.transpose(0, 1))
        self.values_KSD[index].index_copy_(1, slots_T, value_TKD.transpose(0, 1))

    def read(self, layer: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """key_KCD and value_KCD at `slots`: views where the slots are a slice, else copies."""
        index = layer - self.layer_start
        if isinstance(slots, slice):
            return self.keys_KSD[index][:, slots], self.values_KSD[index][:, slots]
        return self.keys_KSD[index].index_select(1, slots), self.values_KSD[index].index_select(1, slots)
