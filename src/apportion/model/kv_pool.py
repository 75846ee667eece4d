"""The KV cache of one member of a stage: one preallocated pair of tensors per layer, cut into blocks.

Shapes: T = new tokens, C = positions of one sequence, K = local KV heads, D = head dim.
"""

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
        shape = (num_blocks * block_tokens, kv_heads, head_dim)
        self.layer_start = layer_start
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.keys = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=torch_device) for _ in range(num_layers)]

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def write(self, layer: int, slots_T: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> None:
        index = layer - self.layer_start
        self.keys[index].index_copy_(0, slots_T, key_TKD)
        self.values[index].index_copy_(0, slots_T, value_TKD)

    def read(self, layer: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """key_CKD and value_CKD at `slots`: views where the slots are a slice, else copies."""
        index = layer - self.layer_start
        if isinstance(slots, slice):
            return self.keys[index][slots], self.values[index][slots]
        return self.keys[index].index_select(0, slots), self.values[index].index_select(0, slots)
