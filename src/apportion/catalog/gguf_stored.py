"""What a quantised GGUF file holds, tensor by tensor: every one has a type of its own.

Source: names of tensors from gguf-py's constants, of file types from llama.cpp's include/llama.h (`llama_ftype`).
"""

import re
from collections import Counter
from collections.abc import Iterator

from apportion.catalog.gguf_file import TENSOR_TYPES, Gguf, GgufTensor
from apportion.catalog.stored import Part, StoredTensor, with_stored
from apportion.types.model import ModelSpec

FLOAT_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_FILE_TYPES = {
    2: "q4_0",
    3: "q4_1",
    7: "q8_0",
    8: "q5_0",
    9: "q5_1",
    10: "q2_k",
    11: "q3_k_s",
    12: "q3_k_m",
    13: "q3_k_l",
    14: "q4_k_s",
    15: "q4_k_m",
    16: "q5_k_s",
    17: "q5_k_m",
    18: "q6_k",
    19: "iq2_xxs",
    20: "iq2_xs",
    21: "q2_k_s",
    22: "iq3_xs",
    23: "iq3_xxs",
    24: "iq1_s",
    25: "iq4_nl",
    26: "iq3_s",
    27: "iq3_m",
    28: "iq2_s",
    29: "iq2_m",
    30: "iq4_xs",
    31: "iq1_m",
    36: "tq1_0",
    37: "tq2_0",
    38: "mxfp4",
    39: "nvfp4",
    40: "q1_0",
}
"""Those of quantised files, by number."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_OUTPUTS_CUT: dict[str, Part] = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_qkv"), "attention"),
    **dict.fromkeys(("attn_q_b", "attn_k_b", "attn_v_b", "attn_kv_b"), "attention"),
    **dict.fromkeys(
        (f"ffn_{name}{experts}" for name in ("gate", "up") for experts in ("", "_exps", "_shexp")), "ffn"
    ),
}
_INPUTS_CUT: dict[str, Part] = {
    "attn_output": "attention",
    **dict.fromkeys(("ffn_down", "ffn_down_exps", "ffn_down_shexp"), "ffn"),
}
_TABLES: dict[str, Part] = {"token_embd.weight": "embedding", "output.weight": "head"}
_BLOCK_ELEMENTS = {name: elements for name, elements, _ in TENSOR_TYPES.values()}


def with_gguf_bytes(gguf: Gguf, spec: ModelSpec) -> ModelSpec:
    """The spec as it is where no tensor of the file is quantised."""
    if all(tensor.type_name in FLOAT_TYPES for tensor in gguf.tensors.values()):
        return spec
    return with_stored(spec, stored_name(gguf), "gguf", _stored(gguf, spec.num_layers))


def stored_name(gguf: Gguf) -> str:
    """Of a quantised file: what its type is called, or else the type of most elements."""
    quantised = Counter[str]()
    for tensor in gguf.tensors.values():
        if tensor.type_name not in FLOAT_TYPES:
            quantised[tensor.type_name] += tensor.num_elements
    file_type = gguf.metadata.get("general.file_type")
    main_type = quantised.most_common(1)[0][0]
    return _FILE_TYPES.get(file_type, main_type) if isinstance(file_type, int) else main_type


def block_number(name: str) -> int:
    """Of a tensor's block; -1 where it is in none."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else -1


def _stored(gguf: Gguf, num_layers: int) -> Iterator[StoredTensor]:
    for name, tensor in gguf.tensors.items():
        match = _BLOCK.fullmatch(name)
        if block_number(name) >= num_layers:
            continue
        if match is None:
            yield StoredTensor(layer=None, part=_TABLES.get(name, "outside"), num_bytes=tensor.num_bytes)
        else:
            yield _of_layer(int(match[1]), match[2], match[3] == "bias", tensor)


def _of_layer(layer: int, module: str, bias: bool, tensor: GgufTensor) -> StoredTensor:
    """A bias that is added after a reduction is replicated, and so is whatever has another name."""
    part, block_elements = _OUTPUTS_CUT.get(module, "replicated"), 1
    if module in _INPUTS_CUT and not bias:
        part, block_elements = _INPUTS_CUT[module], _BLOCK_ELEMENTS[tensor.type_name]
    return StoredTensor(layer=layer, part=part, num_bytes=tensor.num_bytes, block_elements=block_elements)
