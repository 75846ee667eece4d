"""What of a model matters for dividing it: parameters, by the axis along which they are cut."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer.

    Parameters are counted per unit of the axis that cuts them: a *KV head* with the query heads it serves,
    an *FFN column* (one unit of `ModelSpec.ffn_columns`; in an MoE layer, that column of every expert), and
    those *replicated* on every member of a tensor-parallel group (norms, routers, biases added after a
    reduction). A share of `h` KV heads and `c` columns holds
    `h·attention_params_per_kv_head + c·ffn_params_per_column + replicated_params`.
    """

    attention_params_per_kv_head: int
    ffn_params_per_column: int
    replicated_params: int
    window_tokens: int | None
    """Sliding attention window, None for full attention."""
    num_experts: int
    """0 for a dense layer."""
    experts_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer as the planner sees it, made from its config.json alone."""

    name: str
    family: str
    fingerprint: str
    """Hash of the config's content: a plan runs only on the model it was made for."""
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    ffn_columns: int
    """Units of the FFN axis: the FFN width (an expert's width in an MoE); where layers have several widths,
    their greatest common divisor, a layer's column then being `width / ffn_columns` wide."""
    vocab_rows: int
    tied_embeddings: bool
    max_context_tokens: int
    checkpoint_format: str
    """Weight format of the files ("bf16", "fp16", "fp32")."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def q_heads_per_kv_head(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def embedding_params(self) -> int:
        """Parameters of one vocabulary table; an untied model has two (embedding and head)."""
        return self.vocab_rows * self.hidden_size
