"""What of a model matters for dividing it: parameters, by the axis along which they are cut."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameters by how they are stored: elements of matrices, which take the weight format, and others (norms,
    routers, biases, sinks), which stay in that of activations.

    `rows` are output rows of matrices, for formats that keep figures beside each; a matrix whose inputs are cut has
    its rows on every member.
    """

    elements: int
    rows: int
    others: int
    stored_bytes: int = 0
    """In the model's own files, where these are quantised."""

    @property
    def count(self) -> int:
        return self.elements + self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """What a layer keeps of a sequence, where that is not one key and one value of `ModelSpec.head_dim` a KV head.

    Layers of one model may have KV heads of other widths and numbers; a "KV head" is then the unit of the axis that
    cuts attention, and may hold several of a layer's.
    """

    per_kv_head: int
    """Elements of a token's keys and values."""
    whole: int = 0
    """Elements of a token that every member of a group holds: latents, an indexer's keys."""
    products_per_kv_head: int = 0
    """Multiply-adds of one query position with one cached position."""
    state_bytes: int = 0
    """Of each sequence, however long: states of state-space layers and linear attention, whole on every member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer.

    Parameters are counted per unit of the axis that cuts them: a *KV head* with the query heads it serves,
    an *FFN column* (one unit of `ModelSpec.ffn_columns`; in an MoE layer, that column of every expert), and
    those *replicated* on every member of a tensor-parallel group (norms, routers, biases added after a
    reduction). A share of `h` KV heads and `c` columns holds `h·per_kv_head + c·per_ffn_column + replicated`.
    """

    per_kv_head: Parameters
    per_ffn_column: Parameters
    replicated: Parameters
    window_tokens: int | None
    """Sliding attention window, None for full attention."""
    num_experts: int
    """0 for a dense layer. Shared experts count as experts that every token is routed to."""
    experts_per_token: int
    cache: LayerCache | None = None
    """None where it is as the ModelSpec's heads say."""
    stored_block_bytes: int = 0
    """One quantisation block of every row that may be cut within a block: what a member may hold beyond its share of
    the stored bytes. Cuts are rounded down to whole blocks, so the first member never does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """Quantised files, which stages may hold as they are; the layers' bytes are with their parameters."""

    format: str
    """Of the weights as a whole, whatever single tensors are in: "q4_k_m", "gptq-int4", "mxfp4"."""
    container: Literal["gguf", "safetensors"]
    embedding_row_bytes: int
    head_row_bytes: int
    """As the embedding's where the two are tied."""
    outside_bytes: int
    """Of what is neither in a layer nor in a vocabulary table, which the head's stage holds: the final norm."""
    ffn_block_columns: int
    """FFN columns of whole quantisation blocks, where these divide the columns; 1 where they do not."""
    beside_embedding_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer as the planner sees it, made from its config.json and held against its files."""

    name: str
    family: str
    fingerprint: str
    """Hash of the config's content: a plan runs only on the model it was made for."""
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    """Of keys; under latent attention the whole cached latent: kv_lora_rank + qk_rope_head_dim."""
    ffn_columns: int
    """Units of the FFN axis: the FFN width (an expert's width in an MoE); where layers have several widths,
    their greatest common divisor, a layer's column then being `width / ffn_columns` wide."""
    vocab_rows: int
    tied_embeddings: bool
    max_context_tokens: int
    checkpoint_format: str
    """Weight format of the files ("bf16", "fp16", "fp32"); where there are none, or quantised ones, the config's."""
    kv_lora_rank: int | None = None
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): every head reads one latent of `head_dim` elements
    per token as its key, and the first `kv_lora_rank` of them as its value; each member of a group holds it whole.
    None where each KV head has keys and values of its own."""
    stored: StoredWeights | None = None
    """None where the files are not quantised."""
    beside_embedding: int = 0
    """Parameters that the first stage's members hold beside the vocabulary table: tables of positions, embeddings per
    layer, norms of embeddings."""
    notes: tuple[str, ...] = ()
    """What of this description is assumed, or left out."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_heads_per_kv_head(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def value_dim(self) -> int:
        return self.kv_lora_rank or self.head_dim

    def kv_elements(self, layer: LayerSpec, kv_heads: int) -> int:
        """Elements of one token's keys and values in one layer, where so many KV heads are held."""
        if layer.cache is not None:
            return layer.cache.per_kv_head * kv_heads + layer.cache.whole
        return 2 * self.head_dim * kv_heads if self.kv_lora_rank is None else self.head_dim

    def attention_products(self, layer: LayerSpec) -> int:
        """Multiply-adds of one query position with one cached position, for each KV head."""
        if layer.cache is not None:
            return layer.cache.products_per_kv_head
        return self.q_heads_per_kv_head * (self.head_dim + self.value_dim)

    @property
    def embedding_params(self) -> int:
        """Parameters of one vocabulary table; an untied model has two (embedding and head)."""
        return self.vocab_rows * self.hidden_size

    def layer_parameters(self, layer: int) -> int:
        """Of one whole layer."""
        part = self.layers[layer]
        return (
            self.kv_heads * part.per_kv_head.count
            + self.ffn_columns * part.per_ffn_column.count
            + part.replicated.count
        )

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: all but the experts that it is not routed to."""
        idle = sum(
            self.ffn_columns
            * layer.per_ffn_column.count
            * (layer.num_experts - layer.experts_per_token)
            // layer.num_experts
            for layer in self.layers
            if layer.num_experts
        )
        return self.num_parameters - idle

    @property
    def num_parameters(self) -> int:
        """Of the whole model: layers, vocabulary tables, final norm."""
        layers = sum(self.layer_parameters(layer) for layer in range(self.num_layers))
        tables = 1 if self.tied_embeddings else 2
        return layers + tables * self.embedding_params + self.beside_embedding + self.hidden_size
