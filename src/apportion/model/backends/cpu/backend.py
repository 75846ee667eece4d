"""Compiled kernels, in fp32: a step of lean layers is one call."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.backends.cpu.batch import CPU, CpuBatch
from apportion.model.backends.cpu.block_moves import CpuBlockMover
from apportion.model.backends.cpu.compile import lean_program
from apportion.model.backends.cpu.pool import CpuPool
from apportion.model.backends.cpu.products import PackedProduct, array_type
from apportion.model.backends.cpu.program import LeanProgram
from apportion.model.decoder_stage import StageModules
from apportion.model.kernels.attend_op import attend_op
from apportion.model.kernels.look_up_op import look_up_op
from apportion.model.kv_pool import PoolTensors
from apportion.model.lean.ops import Norm
from apportion.model.reduction import AllReduce, compiled
from apportion.model.rope import Rope
from apportion.model.sharded_modules import VocabParallelEmbedding
from apportion.model.weights.checkpoint import FORMAT_DTYPES
from apportion.model.weights.formats import WEIGHT_FORMATS, WeightFormat
from apportion.model.weights.matrix_source import MatrixSource
from apportion.model.weights.random_weights import random_matrix
from apportion.model.weights.weight_memory import Allocate
from apportion.types.request import Chunk, ScheduledBatch

_WARM_SIZE = 512
"""Rows and columns of the matrix to warm up with."""


class CpuBackend:
    """See `Backend`."""

    torch_device = CPU
    dtype = torch.float32

    def __init__(self, *, block_tokens: int) -> None:
        self.block_tokens = block_tokens

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.from_numpy(np.empty(num_bytes, np.uint8))  # asks for huge pages, which torch does not

    def product(self, source: MatrixSource, weight_format: WeightFormat, allocate: Allocate) -> PackedProduct:
        return PackedProduct(source, weight_format, allocate)

    def prepare(self, batch: ScheduledBatch) -> CpuBatch:
        return CpuBatch.of(batch, self.block_tokens)

    def kv_pool(self, tensors: PoolTensors) -> CpuPool:
        return CpuPool(tensors)

    def programs(
        self, modules: StageModules, pool: CpuPool, hidden_size: int, all_reduce: AllReduce | None
    ) -> list[LeanProgram | None]:
        num_buffers = modules.stream.num_buffers if modules.stream else 1
        ropes = [rotary for rotary in modules.rotaries if isinstance(rotary, Rope)]
        if not ropes:
            return [None] * num_buffers
        embedding, norm = modules.embedding, modules.norm
        assert isinstance(embedding, VocabParallelEmbedding | None)
        assert isinstance(norm, Norm | None)
        reduction = None if all_reduce is None else compiled(all_reduce)
        return [
            lean_program(
                modules.layers,
                ropes,
                pool,
                hidden_size,
                embedding=embedding,
                norm=norm,
                all_reduce=reduction,
                first_buffer=buffer,
            )
            for buffer in range(num_buffers)
        ]

    def through_host(self, all_reduce: AllReduce) -> AllReduce:
        return all_reduce

    def block_mover(self, pool: PoolTensors, num_swap_blocks: int) -> CpuBlockMover:
        return CpuBlockMover(pool.by_block, num_swap_blocks)

    def warm_up(self, weight_format: str, kv_format: str) -> None:
        matrix_format = WEIGHT_FORMATS[weight_format]
        source = random_matrix(_WARM_SIZE, _WARM_SIZE)
        self.product(source, matrix_format, self.allocate)(torch.ones(2, _WARM_SIZE))
        look_up_op(array_type(matrix_format))
        small = torch.ones(_WARM_SIZE // 2, _WARM_SIZE)
        F.linear(small, small)  # of routers and tied heads: the library keeps its buffers
        self._warm_up_attention(FORMAT_DTYPES[kv_format])

    def _warm_up_attention(self, kv_dtype: torch.dtype) -> None:
        """One sequence with one new token, one with two."""
        tensors = PoolTensors(
            layer_start=0,
            num_layers=1,
            num_blocks=2,
            block_tokens=self.block_tokens,
            kv_heads=1,
            head_dim=1,
            dtype=kv_dtype,
            torch_device=CPU,
        )
        pool = CpuPool(tensors)
        attend_op(pool.elements)
        chunks = tuple(
            Chunk(sequence_id=i, start=0, token_ids=(0,) * (i + 1), block_ids=(i,), sampling=None)
            for i in range(2)
        )
        pool.attend(
            *torch.zeros(3, 3, 1, 1),
            layer=0,
            batch=self.prepare(ScheduledBatch(step_id=0, chunks=chunks)),
            scale=1.0,
            window_tokens=None,
            softcap=None,
            sinks_N=None,
        )
