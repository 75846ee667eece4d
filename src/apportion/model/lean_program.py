"""Layers of a stage as one table of compiled operations, on a CPU in fp32.

A decode step of a stage of one device is one call; of a member of a group one call between two reductions. What is not
compiled stands between the operations: attention of several new tokens, experts, layers of transformers' own.

Shapes: T = tokens of the batch, H = hidden size, D = head dim; the member's: N = query heads, K = KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apportion.model.attend_op import DecodeOperand
from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.lean import Attention
from apportion.model.lean_kernels import point_rotation
from apportion.model.op_table import OpTable

Rotation = tuple[Tensor, Tensor]
"""cos_1TD and sin_1TD"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is at hand between the operations."""

    batch: FlatBatch
    kv_pool: KVPool
    rotations: Sequence[Rotation]
    """Of each layer."""
    hidden_TH: Tensor
    normed_TH: Tensor
    partial_TH: Tensor


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
    halves: Sequence[Half]
    splits: Sequence[tuple[int, int]]
    """The operations that rotate, and the layer of each."""
    decode: DecodeOperand
    kv_pool: KVPool

    def __call__(self, hidden_TH: Tensor, rotations: Sequence[Rotation], batch: FlatBatch) -> Tensor:
        memory_3TH = torch.empty(3, *hidden_TH.shape)
        memory_3TH[0] = hidden_TH
        hidden_TH, normed_TH, partial_TH = memory_3TH.unbind()
        step = Step(
            batch=batch,
            kv_pool=self.kv_pool,
            rotations=rotations,
            hidden_TH=hidden_TH,
            normed_TH=normed_TH,
            partial_TH=partial_TH,
        )
        for at, layer in self.splits:
            point_rotation(self.table.words_OW[at], *rotations[layer])
        if batch.longer_spans or not self.kv_pool.compiled:
            self._run_apart(step)
        else:
            self._run_together(step)
        return hidden_TH

    def _run_together(self, step: Step) -> None:
        self.decode.point_to(step.batch.decode)
        num_tokens, stop = len(step.hidden_TH), len(self.table)
        scratch = torch.empty(num_tokens * max(half.scratch_floats for half in self.halves))
        self.table.point(0, stop, num_tokens, step.hidden_TH, scratch)
        first = 0
        for half in self.halves:
            if half.then is not None:
                self.table.run(first, half.stop)
                half.then(step)
                first = half.stop
        self.table.run(first, stop)

    def _run_apart(self, step: Step) -> None:
        """A half's memory is given back before the next one's is taken: attention needs more beside it."""
        for half in self.halves:
            scratch = torch.empty(len(step.hidden_TH) * half.scratch_floats)
            self.table.point(half.first, half.stop, len(step.hidden_TH), step.hidden_TH, scratch)
            if half.attend is None or half.attention is None:
                self.table.run(half.first, half.stop)
            else:
                self.table.run(half.first, half.attend)
                _attend(half.attention, step, scratch)
                self.table.run(half.attend + 1, half.stop)
            del scratch
            if half.then is not None:
                half.then(step)


def _attend(attention: Attention, step: Step, scratch: Tensor) -> None:
    """As the operation does: from where `split` writes to where the projections were."""
    num_tokens, kv_heads = len(step.hidden_TH), attention.kv_heads
    out, heads = scratch.view(2, -1)
    query, key_value = heads.view(-1, attention.head_dim).tensor_split([-2 * kv_heads * num_tokens])
    query_TND = query.view(num_tokens, -1, attention.head_dim)
    key_TKD, value_TKD = key_value.view(2, num_tokens, kv_heads, attention.head_dim)
    out_TND = attention.attend(query_TND, key_TKD, value_TKD, step.batch, step.kv_pool)
    out[: out_TND.numel()] = out_TND.flatten()
