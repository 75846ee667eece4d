"""Runs a stage: embedding, layers, head, each where the stage has it. `lean/build` or `hf` has built them.

Shapes: T = tokens of the batch, N = rows to sample, H = hidden size, D = head dim, V = the member's vocabulary rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.rope import Rotary
from apportion.model.weights.streaming import LayerStream


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModules:
    layers: Sequence[Callable[..., Tensor]]
    """Called like transformers'."""
    stream: LayerStream | None = None
    """Brings the weights of some of the layers."""
    rotaries: Sequence[Rotary]
    """Each layer's."""
    embedding: Callable[[Tensor], Tensor] | None
    """ids_T -> hidden_TH"""
    embedding_multiplier: float = 1.0
    norm: Callable[[Tensor], Tensor] | None
    """The final norm."""
    head: Callable[[Tensor], Tensor] | None
    """hidden_NH -> logits_NV"""
    logits_divisor: float = 1.0
    logits_softcap: float | None = None


StageProgram = Callable[[Tensor, Any], Tensor]
"""Runs in place of embedding, layers and final norm: ids_T or hidden_TH, and a batch of the backend's, -> hidden_TH"""


class DecoderStage:
    """See `StageModel`."""

    def __init__(
        self,
        modules: StageModules,
        kv_pool: KVPool,
        programs: Sequence[StageProgram | None],
        *,
        parameters: int,
        weights_bytes: int,
        read_bytes: int,
    ) -> None:
        """With one of `programs` in place of embedding, layers and final norm: by the buffer in which the first layer
        that is streamed arrives."""
        self.parameters = parameters
        self.weights_bytes = weights_bytes
        self.read_bytes = read_bytes
        self.kv_pool = kv_pool
        self._modules, self._programs = modules, programs

    @property
    def streamed_bytes(self) -> int:
        return self._modules.stream.streamed_bytes if self._modules.stream else 0

    @property
    def held_bytes(self) -> int:
        stream = self._modules.stream
        return self.weights_bytes + self.kv_pool.tensors.num_bytes + (stream.buffer_bytes if stream else 0)

    @torch.no_grad()
    def forward(self, inputs: Tensor, batch: FlatBatch) -> Tensor:
        program = self._programs[self._modules.stream.next_buffer if self._modules.stream else 0]
        hidden_TH = (program or self._through_layers)(inputs, batch)
        self.kv_pool.tensors.check_range()
        if self._modules.norm is None:
            return hidden_TH
        hidden_NH = hidden_TH.index_select(0, batch.rows.sample_rows_N)
        del hidden_TH  # the memory of the others
        return self._logits(hidden_NH if program else self._modules.norm(hidden_NH))

    def _through_layers(self, inputs: Tensor, batch: FlatBatch) -> Tensor:
        """Not through the final norm."""
        hidden_TH = inputs if self._modules.embedding is None else self._embed(inputs)
        rotaries, hidden_1TH = self._modules.rotaries, hidden_TH[None]
        rotations = {rotary: rotary(batch.rows.positions_T, hidden_TH.dtype) for rotary in set(rotaries)}
        for layer, rotary in zip(self._modules.layers, rotaries, strict=True):
            hidden_1TH = layer(
                hidden_1TH,
                attention_mask=None,
                position_embeddings=rotations[rotary],
                batch=batch,
                kv_pool=self.kv_pool,
            )
        return hidden_1TH[0]

    def _embed(self, ids_T: Tensor) -> Tensor:
        assert self._modules.embedding is not None
        hidden_TH, multiplier = self._modules.embedding(ids_T), self._modules.embedding_multiplier
        return hidden_TH if multiplier == 1 else hidden_TH * multiplier

    def _logits(self, normed_NH: Tensor) -> Tensor:
        modules = self._modules
        assert modules.head is not None
        logits_NV = modules.head(normed_NH).float()
        if modules.logits_divisor != 1:
            logits_NV /= modules.logits_divisor
        if modules.logits_softcap is not None:
            logits_NV.div_(modules.logits_softcap).tanh_().mul_(modules.logits_softcap)
        return logits_NV
