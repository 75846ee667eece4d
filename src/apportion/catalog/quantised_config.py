"""Bytes of quantised files by the formula of their method, where there is a config and no files."""

from collections.abc import Iterator
from fractions import Fraction
from math import ceil

from apportion.catalog.quantisation import Quantisation
from apportion.catalog.stored import Part, StoredTensor, ffn_width, with_stored
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.units import FORMAT_BYTES

_ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_a_proj_with_mqa", "kv_b_proj")
_FFN_MODULES = ("gate_proj", "up_proj", "down_proj", "experts")
DOWN_SHARE = 3
"""One of so many FFN matrices has its inputs cut."""


def with_formula(spec: ModelSpec, quantisation: Quantisation) -> ModelSpec:
    """A part of a layer of which any module is left unquantised counts as if all were."""
    formula = _Formula(spec, quantisation)
    layers = (tensor for number, layer in enumerate(spec.layers) for tensor in formula.layer(number, layer))
    return with_stored(spec, quantisation.name, "safetensors", (*formula.tables(), *layers))


class _Formula:
    def __init__(self, spec: ModelSpec, quantisation: Quantisation) -> None:
        self._spec = spec
        self._method = quantisation
        self._float_bytes = FORMAT_BYTES[spec.checkpoint_format]

    def tables(self) -> Iterator[StoredTensor]:
        spec = self._spec
        bits = self._method.embedding_bits or Fraction(8 * self._float_bytes)
        yield StoredTensor(layer=None, part="embedding", num_bytes=ceil(spec.embedding_params * bits / 8))
        yield StoredTensor(layer=None, part="outside", num_bytes=spec.hidden_size * self._float_bytes)
        if not spec.tied_embeddings:
            bits = self._method.head_bits or Fraction(8 * self._float_bytes)
            size = ceil(spec.embedding_params * bits / 8)
            if self._method.head_bits is not None:
                size += spec.vocab_rows * self._method.row_bytes
            yield StoredTensor(layer=None, part="head", num_bytes=size)

    def layer(self, number: int, layer: LayerSpec) -> Iterator[StoredTensor]:
        attention = self._quantised(number, "self_attn", _ATTENTION_MODULES) and not self._method.experts_only
        ffn = self._quantised(number, "mlp", _FFN_MODULES) and (
            layer.num_experts > 0 or not self._method.experts_only
        )
        yield from self._attention(number, layer, quantised=attention)
        yield from self._ffn(number, layer, quantised=ffn)
        replicated = layer.replicated
        rows = replicated.rows if attention or ffn else 0
        size = (
            self._matrix(replicated.elements, rows, quantised=attention)
            + replicated.others * self._float_bytes
        )
        yield StoredTensor(layer=number, part="replicated", num_bytes=size)

    def _quantised(self, number: int, part: str, modules: tuple[str, ...]) -> bool:
        return not any(self._method.keeps(f"model.layers.{number}.{part}.{name}") for name in modules)

    def _attention(self, number: int, layer: LayerSpec, *, quantised: bool) -> Iterator[StoredTensor]:
        spec, part = self._spec, layer.per_kv_head
        q_width = 0 if spec.kv_lora_rank else spec.q_heads * spec.head_dim
        output = q_width * spec.hidden_size
        others = spec.kv_heads * part.others * self._float_bytes
        rows = spec.kv_heads * part.rows
        size = self._matrix(spec.kv_heads * part.elements - output, rows, quantised=quantised) + others
        yield StoredTensor(layer=number, part="attention", num_bytes=size)
        yield self._inputs_cut(number, "attention", output, quantised)
        yield self._group_numbers(number, 3 * spec.hidden_size + q_width, quantised)

    def _ffn(self, number: int, layer: LayerSpec, *, quantised: bool) -> Iterator[StoredTensor]:
        spec, part = self._spec, layer.per_ffn_column
        elements, copies = spec.ffn_columns * part.elements, max(1, layer.num_experts)
        down = elements // DOWN_SHARE
        others = spec.ffn_columns * part.others * self._float_bytes
        size = self._matrix(elements - down, spec.ffn_columns * part.rows, quantised=quantised) + others
        yield StoredTensor(layer=number, part="ffn", num_bytes=size)
        yield self._inputs_cut(number, "ffn", down, quantised)
        inputs = 2 * spec.hidden_size + ffn_width(spec, layer)
        yield self._group_numbers(number, copies * inputs, quantised)

    def _inputs_cut(self, number: int, part: Part, elements: int, quantised: bool) -> StoredTensor:
        """Its rows are on every member, and counted with what is replicated."""
        return StoredTensor(
            layer=number,
            part=part,
            num_bytes=self._matrix(elements, 0, quantised=quantised),
            block_elements=self._method.block_elements if quantised else 1,
        )

    def _group_numbers(self, number: int, inputs: int, quantised: bool) -> StoredTensor:
        num_bytes = quantised * inputs * self._method.input_bytes
        return StoredTensor(layer=number, part="replicated", num_bytes=num_bytes)

    def _matrix(self, elements: int, rows: int, *, quantised: bool) -> int:
        if not quantised:
            return elements * self._float_bytes
        return ceil(elements * self._method.element_bits / 8) + rows * self._method.row_bytes
