"""Layers of a stage as one table of compiled operations, on a CPU in fp32.

A decode step of a stage is one call, with a group's reductions in it. What is not compiled stands between the
operations: attention of several new tokens, experts, the arrival of streamed layers.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.model.batch import FlatBatch
from apportion.model.kernels.op_code import FP32_BYTES
from apportion.model.kernels.op_table import OpTable
from apportion.model.kernels.step_operand import StepOperand
from apportion.model.kv_pool import KVPool
from apportion.model.lean.layers import Attention
from apportion.model.reduction import CompiledAllReduce


class Step:
    """What is at hand between the operations."""

    def __init__(self, batch: FlatBatch, kv_pool: KVPool, memory: Tensor, shape_TH: torch.Size) -> None:
        """`memory` begins with the hidden state, its norm and a partial result."""
        self.batch, self.kv_pool = batch, kv_pool
        parts_3TH = memory[: 3 * shape_TH.numel()].view(3, *shape_TH)
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
    """hidden_TH -> hidden_TH"""

    table: OpTable
    operand: StepOperand
    halves: Sequence[Half]
    step_floats: int
    """Of each token, which a step keeps from half to half."""
    kv_pool: KVPool
    all_reduce: CompiledAllReduce | None

    def __call__(self, hidden_TH: Tensor, batch: FlatBatch) -> Tensor:
        hidden_TH = hidden_TH.contiguous()
        self.operand.point_to(hidden_TH, batch)
        apart = batch.longer_spans or not self.kv_pool.compiled
        hidden_TH = (self._run_apart if apart else self._run_together)(hidden_TH, batch)
        if self.all_reduce is not None:
            self.all_reduce.check()
        return hidden_TH

    def _run_together(self, hidden_TH: Tensor, batch: FlatBatch) -> Tensor:
        num_tokens, stop = len(hidden_TH), len(self.table)
        half_floats = max(half.scratch_floats for half in self.halves)
        memory = torch.empty(num_tokens * (self.step_floats + half_floats))
        address = memory.data_ptr()
        self.table.point(0, stop, num_tokens, address, address + num_tokens * self.step_floats * FP32_BYTES)
        step = Step(batch, self.kv_pool, memory, hidden_TH.shape)
        first = 0
        for half in self.halves:
            if half.then is not None:
                self.table.run(first, half.stop)
                half.then(step)
                first = half.stop
        self.table.run(first, stop)
        return step.hidden_TH

    def _run_apart(self, hidden_TH: Tensor, batch: FlatBatch) -> Tensor:
        """A half's memory is given back before the next one's is taken: attention needs more beside it."""
        num_tokens = len(hidden_TH)
        memory = torch.empty(num_tokens * self.step_floats)
        step = Step(batch, self.kv_pool, memory, hidden_TH.shape)
        for half in self.halves:
            scratch = torch.empty(num_tokens * half.scratch_floats)
            self.table.point(half.first, half.stop, num_tokens, memory.data_ptr(), scratch.data_ptr())
            if half.attend is None or half.attention is None:
                self.table.run(half.first, half.stop)
            else:
                self.table.run(half.first, half.attend)
                _attend(half.attention, step, scratch)
                self.table.run(half.attend + 1, half.stop)
            del scratch
            if half.then is not None:
                half.then(step)
        return step.hidden_TH


def _attend(attention: Attention, step: Step, scratch: Tensor) -> None:
    """As the operation does: from where `split` writes to where the projections were."""
    num_tokens, kv_heads = len(step.batch.positions_T), attention.kv_heads
    out, heads = scratch.view(2, -1)
    query, key_value = heads.view(-1, attention.head_dim).tensor_split([-2 * kv_heads * num_tokens])
    query_TND = query.view(num_tokens, -1, attention.head_dim)
    key_TKD, value_TKD = key_value.view(2, num_tokens, kv_heads, attention.head_dim)
    out_TND = attention.attend(query_TND, key_TKD, value_TKD, step.batch, step.kv_pool)
    out[: out_TND.numel()] = out_TND.flatten()
