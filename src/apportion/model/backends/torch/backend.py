"""torch's own operations, in any dtype, on any device that torch knows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apportion.model.backends.torch.batch import TorchBatch
from apportion.model.backends.torch.block_moves import TorchBlockMover
from apportion.model.backends.torch.pool import TorchPool
from apportion.model.backends.torch.products import PlainProduct, WidenedProduct
from apportion.model.decoder_stage import StageModules
from apportion.model.kv_pool import PoolTensors
from apportion.model.reduction import AllReduce
from apportion.model.weights.formats import WEIGHT_FORMATS, WeightFormat
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.random_weights import random_matrix
from apportion.model.weights.weight_backend import Product
from apportion.model.weights.weight_memory import Allocate
from apportion.types.request import ScheduledBatch

_WARM_SIZE = 512
"""Rows and columns of the matrix to warm up with."""


class TorchBackend:
    """See `Backend`."""

    def __init__(
        self, torch_device: str, dtype: torch.dtype, *, block_tokens: int, gather_tokens: int
    ) -> None:
        """Keys and values of at most `gather_tokens` positions are gathered at once, for sequences with one new token
        each."""
        self.torch_device = torch.device(torch_device)
        self.dtype = dtype
        self.block_tokens = block_tokens
        self._gather_tokens = gather_tokens

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)

    def product(self, source: MatrixSource, weight_format: WeightFormat, allocate: Allocate) -> Product:
        shape, dtype = (source.rows, source.columns), weight_format.dtype
        weight_NK = allocate(source.rows * source.columns * dtype.itemsize).view(dtype).view(shape)
        scales_N = allocate(4 * source.rows).view(torch.float32) if weight_format.scaled else None
        weight_format.read_into(source, 0, weight_NK, scales_N)
        if dtype == self.dtype:
            return PlainProduct(weight_NK)
        return WidenedProduct(weight_NK, scales_N)

    def prepare(self, batch: ScheduledBatch) -> TorchBatch:
        return TorchBatch.of(batch, self.block_tokens, self.torch_device, self._gather_tokens)

    def kv_pool(self, tensors: PoolTensors) -> TorchPool:
        return TorchPool(tensors)

    def programs(
        self, modules: StageModules, pool: TorchPool, hidden_size: int, all_reduce: AllReduce | None
    ) -> Sequence[None]:
        del pool, hidden_size, all_reduce
        return [None] * (modules.stream.num_buffers if modules.stream else 1)

    def through_host(self, all_reduce: AllReduce) -> AllReduce:
        if self.torch_device.type == "cpu":
            return all_reduce
        return lambda partial: all_reduce(partial.cpu()).to(self.torch_device)

    def block_mover(self, pool: PoolTensors, num_swap_blocks: int) -> TorchBlockMover:
        return TorchBlockMover(pool.by_block, num_swap_blocks)

    def warm_up(self, weight_format: str, kv_format: str) -> None:
        del kv_format  # attention needs nothing else than products do
        product = self.product(
            random_matrix(_WARM_SIZE, _WARM_SIZE), WEIGHT_FORMATS[weight_format], self.allocate
        )
        product(torch.ones(2, _WARM_SIZE, dtype=self.dtype, device=self.torch_device))
