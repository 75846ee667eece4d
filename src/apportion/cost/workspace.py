"""What a step allocates at its peak, beside weights and KV cache: a bound, affine in a shard's heads, columns and rows.

A layer's attention, its FFN and the drawing of tokens follow one another, so the peak is the largest of the three. Of
rank 0 the bound is that maximum where it has everything, as on a stage of one device. With `f` of F columns, and
attention `a` and FFN `b` of the whole layer, it is a + f·(b − a)/F, which is at least a, and at least b·f/F. Of other
ranks, whose shares are small, it is the sum.
"""

from dataclasses import dataclass

from apportion.cost.shard import Shard
from apportion.types.cluster import Device
from apportion.types.layout import PREFILL_BLOCK_KEYS, PREFILL_ROWS, QUERY_TILE, WIDENED_ELEMENTS
from apportion.types.model import LayerSpec, ModelSpec

RUNTIME_BYTES = 7 * 2**19
"""Fixed allowance per worker: allocator slack, sockets, block tables, and the memory that a group shares (128 KiB for
each member, parallel/shared.py); while loading, what a part of a matrix takes that is read and packed."""
HIDDEN_ACTIVATIONS = 4
"""Buffers of one hidden state per token that are alive at once: residual, norm and its fp32 temporaries."""
PROJECTION_ACTIVATIONS = 4
"""Buffers of all query and key heads per token: projected, rotated and two temporaries."""
GATED_ACTIVATIONS = 3
"""Buffers of all FFN columns per token: gate and up side by side, and their product."""
SCORED_FAMILIES = frozenset({"gemma2", "gpt_oss"})
"""Families whose softmax (capped, or with sinks) is computed from a matrix of scores."""
SCORE_BYTES = 6
"""Of one score: fp32, and once more in a half format."""
FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """The largest there is. Sizes in bytes."""

    model: ModelSpec
    shard: Shard
    device: Device
    tokens: int
    context: int
    sequences: int

    @property
    def element_bytes(self) -> int:
        return self.shard.formats.activation_bytes

    @property
    def token_bytes(self) -> int:
        """Of one element of every token's activations, which count as at least fp32."""
        return self.tokens * max(FP32_BYTES, self.element_bytes)

    def everywhere(self) -> int:
        model = self.model
        hidden = self.token_bytes * (HIDDEN_ACTIVATIONS * model.hidden_size + 2 * model.head_dim)
        if self.device.kind == "cpu":
            return hidden + self._prefill_bytes() + RUNTIME_BYTES
        mask = min(self.tokens, QUERY_TILE) * self.context * (1 + self.element_bytes)
        widened = 2 * WIDENED_ELEMENTS * self.element_bytes if self.shard.formats.packed else 0
        return hidden + mask + widened + RUNTIME_BYTES

    def _prefill_bytes(self) -> int:
        """Of compiled attention: each thread's queries, outputs, and scores and copies of one block of keys."""
        model = self.model
        rows = self.tokens * model.q_heads_per_kv_head
        threads = min(self.device.num_threads, model.kv_heads * -(-rows // PREFILL_ROWS))
        elements = min(rows, PREFILL_ROWS) * (2 * model.head_dim + PREFILL_BLOCK_KEYS)
        return FP32_BYTES * threads * (elements + PREFILL_BLOCK_KEYS * 2 * model.head_dim)

    def attention(self, kv_heads: int) -> int:
        """Where it is not compiled, on tiles of at most QUERY_TILE queries of one sequence: its keys and values side by
        side, and the scores only where a family's softmax is not the fused one."""
        model, tile = self.model, min(self.tokens, QUERY_TILE)
        q_heads = kv_heads * model.q_heads_per_kv_head
        projected = self.token_bytes * PROJECTION_ACTIVATIONS * (q_heads + kv_heads) * model.head_dim
        if self.device.kind == "cpu":
            return projected
        gathered_kv = self.context * model.kv_elements(kv_heads) * self.shard.formats.kv_bytes
        scores = q_heads * tile * self.context * SCORE_BYTES if model.family in SCORED_FAMILIES else 0
        return projected + gathered_kv + scores

    def ffn(self, columns: int) -> int:
        per_column = max(
            (_activations_per_column(self.model, layer) for layer, _ in self.shard.layers), default=0
        )
        return self.token_bytes * per_column * columns

    def drawing(self, vocab_rows: int) -> int:
        """Rank 0 of the head's stage gathers the whole vocabulary; of the others each has its rows."""
        if not self.shard.has_head:
            return 0
        rows = self.model.vocab_rows if self.shard.rank == 0 else vocab_rows
        return 2 * self.sequences * rows * FP32_BYTES


def workspace_bytes(
    model: ModelSpec, shard: Shard, device: Device, *, step_tokens: int, context_tokens: int, sequences: int
) -> int:
    """Of steps of up to `step_tokens` for up to `sequences` of up to `context_tokens`."""
    step = _Step(
        model=model,
        shard=shard,
        device=device,
        tokens=step_tokens,
        context=context_tokens,
        sequences=sequences,
    )
    drawing = step.drawing(shard.vocab_rows)
    if shard.rank > 0:
        return step.everywhere() + step.attention(shard.kv_heads) + step.ffn(shard.ffn_columns) + drawing
    rest = max(step.attention(model.kv_heads), drawing)
    above = max(0, step.ffn(model.ffn_columns) - rest)
    return step.everywhere() + rest + shard.ffn_columns * -(-above // model.ffn_columns)


def _activations_per_column(model: ModelSpec, layer: LayerSpec) -> int:
    """A gated FFN has three matrices, a plain one two. Of experts, those that a token uses."""
    if layer.num_experts:
        used = -(
            -layer.per_ffn_column.count * layer.experts_per_token // (layer.num_experts * model.hidden_size)
        )
        return max(used, GATED_ACTIVATIONS)
    return max(-(-layer.per_ffn_column.count // model.hidden_size), GATED_ACTIVATIONS)
