"""What the runtime needs of a stage's model, whichever implementation is behind it."""

from typing import Protocol

from torch import Tensor

from apportion.model.batch import FlatBatch
from apportion.model.kv_pool import KVPool


class StageModel(Protocol):
    """One member's share of one stage: its weights, its KV pool and the way through them."""

    parameters: int
    """Parameters held; an embedding tied to a head in the same stage counts once."""
    read_bytes: int
    """Bytes of the wanted slices, in the checkpoint's own format."""
    weights_bytes: int
    kv_pool: KVPool

    @property
    def streamed_bytes(self) -> int:
        """Weights brought from host memory since the start, layers of `Stage.streamed_layers` anew in every step."""
        ...

    @property
    def held_bytes(self) -> int:
        """Weights, buffers of streamed layers and KV cache, as they were allocated."""
        ...

    def forward(self, inputs: Tensor, batch: FlatBatch) -> Tensor:
        """One microbatch through the stage.

        `inputs` is ids_T (int64) for a stage with the embedding, else hidden_TD. Returns hidden_TD, or, for a
        stage with the head, logits_NV (fp32) of the member's vocabulary rows for `batch.rows.sample_rows_N` alone.
        Every member calls `all_reduce` equally often and in the same order: once for the embedding, twice per
        layer, all of shape [T, hidden]; a norm over all heads (olmo2) adds two of shape [T, 1] per layer.
        """
        ...
