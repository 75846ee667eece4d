"""Runs a stage of transformers' decoder layers, which `hf` has built.

It calls the layers itself instead of the model's forward: the masks, caches and scaffolding around them stay
unused.

Shapes: T = tokens of the batch, N = rows to sample, H = hidden size, V = the member's vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool
from apportion.model.streaming import LayerStream


@dataclass(frozen=True, slots=True, kw_only=True)
class StageModules:
    layers: list[nn.Module]
    stream: LayerStream | None
    """Brings the weights of some of the layers."""
    rotary: nn.Module
    rotary_kinds: list[str] | None
    """Each layer's type, where the types differ in their rotary frequencies."""
    embedding: nn.Module | None
    norm: nn.Module | None
    """The final norm."""
    head: Callable[[Tensor], Tensor] | None
    """hidden_NH -> logits_NV"""


class HfStage:
    """See `StageModel`."""

    def __init__(
        self,
        config: PreTrainedConfig,
        modules: StageModules,
        kv_pool: KVPool,
        *,
        parameters: int,
        weights_bytes: int,
        read_bytes: int,
    ) -> None:
        around = [modules.rotary] if modules.embedding is None else [modules.rotary, modules.embedding]
        self.parameters = parameters
        self.weights_bytes = weights_bytes
        self.buffer_bytes = sum(
            buffer.nbytes for module in (*around, *modules.layers) for buffer in module.buffers()
        )
        self.read_bytes = read_bytes
        self.kv_pool = kv_pool
        self._modules = modules
        self._embedding_multiplier = getattr(config, "embedding_multiplier", 1.0)
        self._logits_divisor = getattr(config, "logits_scaling", 1.0)
        self._logits_softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def streamed_bytes(self) -> int:
        return self._modules.stream.streamed_bytes if self._modules.stream else 0

    @torch.no_grad()
    def forward(self, inputs: Tensor, batch: FlatBatch) -> Tensor:
        hidden_1TH = (inputs if self._modules.embedding is None else self._embed(inputs))[None]
        for layer, cos_sin in zip(self._modules.layers, self._rotations(hidden_1TH, batch), strict=True):
            hidden_1TH = layer(
                hidden_1TH,
                attention_mask=None,
                position_embeddings=cos_sin,
                batch=batch,
                kv_pool=self.kv_pool,
            )
        return (
            hidden_1TH[0] if self._modules.norm is None else self._logits(hidden_1TH[0], batch.sample_rows_N)
        )

    def _embed(self, ids_T: Tensor) -> Tensor:
        assert self._modules.embedding is not None
        hidden_TH = self._modules.embedding(ids_T)
        return hidden_TH if self._embedding_multiplier == 1 else hidden_TH * self._embedding_multiplier

    def _rotations(self, hidden_1TH: Tensor, batch: FlatBatch) -> list[tuple[Tensor, Tensor]]:
        """cos and sin for each layer."""
        positions_1T = batch.positions_T[None]
        if self._modules.rotary_kinds is None:
            return [self._modules.rotary(hidden_1TH, positions_1T)] * len(self._modules.layers)
        rotations = {
            kind: self._modules.rotary(hidden_1TH, positions_1T, kind)
            for kind in set(self._modules.rotary_kinds)
        }
        return [rotations[kind] for kind in self._modules.rotary_kinds]

    def _logits(self, hidden_TH: Tensor, sample_rows_N: Tensor) -> Tensor:
        assert self._modules.norm is not None
        assert self._modules.head is not None
        hidden_NH = self._modules.norm(hidden_TH.index_select(0, sample_rows_N))
        logits_NV = self._modules.head(hidden_NH).float()
        if self._logits_divisor != 1:
            logits_NV /= self._logits_divisor
        if self._logits_softcap is not None:
            logits_NV.div_(self._logits_softcap).tanh_().mul_(self._logits_softcap)
        return logits_NV
