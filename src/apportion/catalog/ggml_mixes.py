"""The type that each part of a model gets in a GGUF file of a given kind: Q4_K_M is Q4_K with Q6_K for some.

The rules of llama.cpp's quantiser (src/llama-quant.cpp, `llama_tensor_get_type`), without overrides; an importance
matrix is taken where a kind needs one. Tests compare its README's sizes of Llama-3.1-8B (tools/quantize).
"""

from dataclasses import dataclass
from typing import Literal

from apportion.catalog.gguf_file import TENSOR_TYPES

Module = Literal["q", "k", "v", "o", "up", "down", "embedding", "output"]
BLOCKS = {name: (elements, num_bytes) for name, elements, num_bytes in TENSOR_TYPES.values()}
BASES = {
    **{name: name for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q6_k", "tq1_0", "tq2_0")},
    **{
        name: name for name in ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq3_xxs", "iq3_s", "iq4_nl", "iq4_xs")
    },
    "q2_k_s": "q2_k",
    "q3_k_s": "q3_k",
    "q3_k_m": "q3_k",
    "q3_k_l": "q3_k",
    "q4_k_s": "q4_k",
    "q4_k_m": "q4_k",
    "q5_k_s": "q5_k",
    "q5_k_m": "q5_k",
    "iq2_s": "iq2_xs",
    "iq2_m": "iq2_s",
    "iq3_xs": "iq3_s",
    "iq3_m": "iq3_s",
}
"""The type of most tensors, by the kind of file."""
_LOWEST = ("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m", "iq2_s", "iq2_m")
_TWO_BITS = ("iq2_s", "iq2_m")
_MORE_OUTPUT_OF_EIGHT = (
    "q2_k", "iq3_xs", "iq3_xxs", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq3_s", "iq3_m", "iq4_xs",
)  # fmt: skip
_OUTPUTS = {"q2_k": "q3_k", "iq3_xxs": "iq3_s", "q3_k_m": "q4_k", "q3_k_l": "q5_k", "iq3_m": "q4_k"}
_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "tq1_0": "q4_0", "tq2_0": "q4_0"}
"""For rows that are not whole blocks; of all other types iq4_nl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Of a file: its kind, and what of the model the rules look at."""

    kind: str
    num_layers: int
    q_heads_per_kv_head: int
    num_experts: int

    def type_of(self, module: Module, layer: int, row_elements: int) -> str:
        name = self._wanted(module, layer)
        if row_elements % BLOCKS[name][0] == 0:
            return name
        other = _FALLBACKS.get(name, "iq4_nl")
        return other if row_elements % BLOCKS[other][0] == 0 else "f16"

    def num_bytes(self, module: Module, layer: int, row_elements: int, elements: int) -> int:
        block, block_bytes = BLOCKS[self.type_of(module, layer, row_elements)]
        return -(-elements // block) * block_bytes

    def _wanted(self, module: Module, layer: int) -> str:
        base = BASES[self.kind]
        match module:
            case "output":
                return self._output()
            case "embedding":
                return self._embedding(base)
            case "v":
                return self._value(base, layer)
            case "down":
                return self._down(base, layer)
            case "o":
                return self._attention_output(base)
            case "q" | "k":
                return self._query_or_key(base, module)
            case _:
                inner = self.num_layers // 8 <= layer < 7 * self.num_layers // 8
                return "iq3_xxs" if self.kind == "iq3_xs" and inner else base

    def _output(self) -> str:
        if self.kind in (*_LOWEST, "iq3_xxs"):
            return "q5_k"
        return "q8_0" if self.kind == "q8_0" else "q6_k"

    def _embedding(self, base: str) -> str:
        if self.kind in (*_TWO_BITS, "iq3_xxs"):
            return "iq3_s"
        if self.kind in _LOWEST:
            return "q2_k"
        return "q4_k" if self.kind in ("tq1_0", "tq2_0") else base

    def _more_bits(self, layer: int) -> bool:
        eighth = self.num_layers // 8
        return layer < eighth or layer >= 7 * self.num_layers // 8 or (layer - eighth) % 3 == 2

    def _value(self, base: str, layer: int) -> str:
        if self.kind in _LOWEST:
            few = "iq3_s" if self.kind in _TWO_BITS else "q2_k"
            return "q4_k" if self._grouped or self.num_experts >= 4 else few
        name = self._plain_value(base, layer)
        if self.num_experts == 8:
            return "q8_0"
        seventy = self.num_layers == 80 and self.q_heads_per_kv_head > 1
        return "q5_k" if seventy and name in ("q3_k", "q4_k") else name

    @property
    def _grouped(self) -> bool:
        return self.q_heads_per_kv_head >= 4

    def _plain_value(self, base: str, layer: int) -> str:
        match self.kind:
            case "q2_k":
                return "q4_k" if self._grouped else "q3_k"
            case "q2_k_s" | "iq3_xxs" | "iq3_xs" | "iq3_s":
                return "q4_k" if self._grouped else base
            case "iq4_nl" | "iq4_xs":
                return "q5_k" if self._grouped else base
            case "q4_k_m" | "q5_k_m":
                return "q6_k" if self._more_bits(layer) else base
            case _:
                few = {"q3_k_m": ("q5_k", 2, "q4_k"), "q4_k_s": ("q5_k", 4, base)}
                first, count, then = few.get(self.kind, (base, 0, base))
                return {"iq3_m": "q4_k", "q3_k_l": "q5_k"}.get(self.kind, first if layer < count else then)

    def _down(self, base: str, layer: int) -> str:
        eighth = layer < self.num_layers // 8
        match self.kind:
            case "q3_k_m":
                return "q5_k" if layer < self.num_layers // 16 else "q4_k"
            case "q4_k_m" | "q5_k_m":
                return "q6_k" if self._more_bits(layer) else base
            case "iq3_m":
                return "q4_k" if eighth or (self.num_experts == 8 and self._more_bits(layer)) else base
            case _:
                first = {"q2_k_s": "q4_k", "q4_k_s": "q5_k", "iq4_nl": "q5_k", "iq4_xs": "q5_k"}
                first |= dict.fromkeys(_LOWEST, "q2_k")
                first |= dict.fromkeys(_TWO_BITS, "iq3_s")
                all_layers = {"q2_k": "q3_k", "q3_k_l": "q5_k"}
                return first[self.kind] if eighth and self.kind in first else all_layers.get(self.kind, base)

    def _attention_output(self, base: str) -> str:
        if self.num_experts == 8:
            return "q5_k" if self.kind in (*_LOWEST, *_MORE_OUTPUT_OF_EIGHT) else base
        lowest = {"iq1_s": "iq2_xxs", "iq1_m": "iq2_xxs"} | dict.fromkeys(_TWO_BITS, "iq3_s")
        return (_OUTPUTS | lowest).get(self.kind, base)

    def _query_or_key(self, base: str, module: str) -> str:
        if module == "k" and self.num_experts == 8:
            return "q4_k" if self.kind in _LOWEST else "q8_0"
        return {"iq3_xs": "iq3_xxs", "iq3_xxs": "iq2_s"}.get(self.kind, base)
