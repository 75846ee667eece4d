"""Layers of a stage as one table of compiled operations, on a CPU in fp32.

A decode step of a stage is one call, with a group's reductions in it. What is not compiled stands between the
operations: attention of several new tokens, experts, the arrival of streamed layers.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.model.backends.cpu.batch import CpuBatch
from apportion.model.backends.cpu.pool import CpuPool
from apportion.model.kernels.op_code import FP32_BYTES
from apportion.model.kernels.op_table import OpTable
from apportion.model.kernels.step_operand import StepOperand
from apportion.model.lean.layers import Attention
from apportion.model.reduction import CompiledAllReduce


class Step:
    """What is at hand between the operations."""

    def __init__(self, batch: CpuBatch, kv_pool: CpuPool, memory: Tensor, shape_TH: tuple[int, int]) -> None:
        """`memory` begins with the hidden state, its norm and a partial result."""
        self.batch, self.kv_pool = batch, kv_pool
        parts_3TH = memory[: 3 * shape_TH[0] * shape_TH[1]].view(3, *shape_TH)
        self.hidden_TH, self.normed_TH, self.partial_TH = parts_3TH.unbind()


Between = Callable[[Step], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """Of a layer: the operations `[first, stop)`, and what follows them."""

    first: int
    stop: int
    scratch_floats: int
    """Of each token."""
    attend: int | None = None
    """The operation that is `attention` of single new tokens."""
    attention: Attention | None = None
    then: Between | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanProgram:
    """ids_T, where it begins with the embedding, or hidden_TH -> hidden_TH"""

    table: OpTable
    operand: StepOperand
    halves: Sequence[Half]
    step_floats: int
    """Of each token, which a step keeps from half to half."""
    kv_pool: CpuPool
    all_reduce: CompiledAllReduce | None
    hidden_size: int
    normed: bool
    """Whether the final norm is part of it."""

    def __call__(self, inputs: Tensor, batch: CpuBatch) -> Tensor:
        inputs = inputs.contiguous()
        self.operand.point_to(inputs, batch.rows.positions_T, batch.decode)
        step = (self._run_together if batch.slots_T is None else self._run_apart)(len(inputs), batch)
        if self.all_reduce is not None:
            self.all_reduce.check()
        return step.normed_TH if self.normed else step.hidden_TH

    def _run_together(self, num_tokens: int, batch: CpuBatch) -> Step:
        stop = len(self.table)
        half_floats = max(half.scratch_floats for half in self.halves)
        memory = torch.empty(num_tokens * (self.step_floats + half_floats))
        address = memory.data_ptr()
        self.table.point(0, stop, num_tokens, address, address + num_tokens * self.step_floats * FP32_BYTES)
        step = Step(batch, self.kv_pool, memory, (num_tokens, self.hidden_size))
        first = 0
        for half in self.halves:
            if half.then is not None:
                self.table.run(first, half.stop)
                half.then(step)
                first = half.stop
        self.table.run(first, stop)
        return step

    def _run_apart(self, num_tokens: int, batch: CpuBatch) -> Step:
        """The halves use one piece of memory after another: a new one's pages, made and cleared anew, would take as
        long as a third of the products. It is given back where something else than the table needs memory."""
        memory = torch.empty(num_tokens * self.step_floats)
        step = Step(batch, self.kv_pool, memory, (num_tokens, self.hidden_size))
        most_floats = max(half.scratch_floats for half in self.halves)
        scratch: Tensor | None = None
        for half in self.halves:
            if scratch is None:
                scratch = torch.empty(num_tokens * most_floats)
            self.table.point(half.first, half.stop, num_tokens, memory.data_ptr(), scratch.data_ptr())
            if half.attend is None or half.attention is None:
                self.table.run(half.first, half.stop)
            else:
                self.table.run(half.first, half.attend)
                _attend(half.attention, step, scratch[: num_tokens * half.scratch_floats])
                self.table.run(half.attend + 1, half.stop)
            if half.then is not None:
                scratch = None
                half.then(step)
        return step


def _attend(attention: Attention, step: Step, scratch: Tensor) -> None:
    """As the operation does: from where `split` writes to where the projections were, without memory of its own."""
    num_tokens, kv_heads = len(step.batch.rows.positions_T), attention.kv_heads
    out, heads = scratch.view(2, -1)
    query, key_value = heads.view(-1, attention.head_dim).tensor_split([-2 * kv_heads * num_tokens])
    query_TND = query.view(num_tokens, -1, attention.head_dim)
    key_TKD, value_TKD = key_value.view(2, num_tokens, kv_heads, attention.head_dim)
    out_TND = out[: query_TND.numel()].view(query_TND.shape)
    attention.attend(query_TND, key_TKD, value_TKD, step.batch, step.kv_pool, out_TND)
