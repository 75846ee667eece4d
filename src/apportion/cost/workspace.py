"""What a worker allocates beside weights and KV cache: what it holds all the time, and the largest part of a step.

A layer's attention, its FFN and the drawing of tokens follow one another, so the largest of the three counts. The
planner searches with a bound that is affine in a shard's heads, columns and rows. Of rank 0 it is that maximum where it
has everything, as on a stage of one device: with `f` of F columns, and attention `a` and FFN `b` of the whole layer,
a + f·(b − a)/F, which is at least a, and at least b·f/F. Of other ranks, whose shares are small, it is the sum.
"""

from dataclasses import dataclass

from apportion.cost.formats import kv_bytes
from apportion.cost.shard import Shard
from apportion.types.cluster import Device
from apportion.types.layout import (
    EXCHANGE_PIECE_BYTES,
    PREFILL_BLOCK_KEYS,
    PREFILL_ROWS,
    QUERY_TILE,
    WIDENED_ELEMENTS,
)
from apportion.types.model import LayerSpec, ModelSpec

GPU_RUNTIME_BYTES = 7 * 2**19
"""Of a worker on a GPU: what the caching allocator rounds up."""
CPU_RUNTIME_BYTES = 256 * 2**10
"""Of a worker on a CPU (benchmarks/memory_contract.py): sockets, Python's objects of the stage, and what glibc's heap
keeps between pieces that are in use."""
LAYER_RUNTIME_BYTES = 12 * 2**10
"""Of each layer on a CPU: its objects, its rows in the table of operations, and the last page of each matrix."""
SEQUENCE_RUNTIME_BYTES, SEQUENCE_MEMBER_BYTES = 8 * 2**10, 4 * 2**10
"""Of each sequence on a CPU: its block table and its part of messages and of a batch, and for each member of the group
views of what they exchange."""
HIDDEN_ACTIVATIONS = 4
"""Buffers of one hidden state per token that are alive at once: the stage's input, residual, norm, partial result."""
PROJECTION_ACTIVATIONS = 4
"""Buffers of all query and key heads per token: projected, rotated and two temporaries."""
GATED_ACTIVATIONS = 3
"""Buffers of all FFN columns per token: gate and up side by side, and their product."""
DRAW_BYTES = 32
"""Of each logit of the one row that is being drawn: probabilities in fp64, sorted, with their order and the sort's own
memory."""
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
            return hidden + self._prefill_bytes() + self._runtime_bytes() + self._shared_bytes()
        mask = min(self.tokens, QUERY_TILE) * self.context * (1 + self.element_bytes)
        widened = 2 * WIDENED_ELEMENTS * self.element_bytes if self.shard.formats.packed else 0
        return hidden + mask + widened + GPU_RUNTIME_BYTES

    def _runtime_bytes(self) -> int:
        layers = LAYER_RUNTIME_BYTES * self.shard.num_layers
        sequence = SEQUENCE_RUNTIME_BYTES + SEQUENCE_MEMBER_BYTES * self.shard.size
        return CPU_RUNTIME_BYTES + layers + sequence * self.sequences

    def _shared_bytes(self) -> int:
        """Of the memory through which a group exchanges: two slots a member, as far as messages fill them."""
        if self.shard.size == 1:
            return 0
        logits = self.sequences * self.model.vocab_rows if self.shard.has_head else 0
        largest = max(self.token_bytes * self.model.hidden_size, FP32_BYTES * logits)
        return 2 * self.shard.size * min(EXCHANGE_PIECE_BYTES, largest)

    def _prefill_bytes(self) -> int:
        """Of compiled attention, beside the piece of memory that all halves of layers use: each thread's queries,
        outputs, and scores and copies of one block of keys."""
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
        elements = max((model.kv_elements(layer, kv_heads) for layer, _ in self.shard.layers), default=0)
        gathered_kv = kv_bytes(self.context * elements, self.shard.formats.kv)
        scores = q_heads * tile * self.context * SCORE_BYTES if model.family in SCORED_FAMILIES else 0
        return projected + gathered_kv + scores

    def ffn(self, columns: int) -> int:
        per_column = max(
            (_activations_per_column(self.model, layer) for layer, _ in self.shard.layers), default=0
        )
        return self.token_bytes * per_column * columns

    def drawing(self, vocab_rows: int) -> int:
        """Rank 0 of the head's stage gathers the whole vocabulary and draws; of the others each has its rows."""
        if not self.shard.has_head:
            return 0
        if self.shard.rank > 0:
            return 2 * self.sequences * vocab_rows * FP32_BYTES
        if self.device.kind != "cpu":
            return 2 * self.sequences * self.model.vocab_rows * FP32_BYTES
        copies = 1 if self.shard.size == 1 else 2
        return (copies * self.sequences * FP32_BYTES + DRAW_BYTES) * self.model.vocab_rows


def workspace_bytes(
    model: ModelSpec,
    shard: Shard,
    device: Device,
    *,
    step_tokens: int,
    context_tokens: int,
    sequences: int,
    affine: bool = False,
) -> int:
    """Of steps of up to `step_tokens` for up to `sequences` of up to `context_tokens`; with `affine` the bound."""
    step = _Step(
        model=model,
        shard=shard,
        device=device,
        tokens=step_tokens,
        context=context_tokens,
        sequences=sequences,
    )
    if affine:
        return step.everywhere() + _affine_bound(step)
    attention, ffn = step.attention(shard.kv_heads), step.ffn(shard.ffn_columns)
    return step.everywhere() + max(attention, ffn, step.drawing(shard.vocab_rows))


def _affine_bound(step: _Step) -> int:
    """Of the largest part."""
    model, shard = step.model, step.shard
    drawing = step.drawing(shard.vocab_rows)
    if shard.rank > 0:
        return step.attention(shard.kv_heads) + step.ffn(shard.ffn_columns) + drawing
    rest = max(step.attention(model.kv_heads), drawing)
    above = max(0, step.ffn(model.ffn_columns) - rest)
    return rest + shard.ffn_columns * -(-above // model.ffn_columns)


def _activations_per_column(model: ModelSpec, layer: LayerSpec) -> int:
    """A gated FFN has three matrices, a plain one two. Of experts, those that a token uses."""
    if layer.num_experts:
        used = -(
            -layer.per_ffn_column.count * layer.experts_per_token // (layer.num_experts * model.hidden_size)
        )
        return max(used, GATED_ACTIVATIONS)
    return max(-(-layer.per_ffn_column.count // model.hidden_size), GATED_ACTIVATIONS)
