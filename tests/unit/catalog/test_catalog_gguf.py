"""GGUF headers: files written here as llama.cpp's converter writes them, and files that are broken."""

import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parity.tiny_models import tiny_config
from unit.catalog.test_catalog_families import LATENT as LATENT_FIELDS
from unit.catalog.test_catalog_families import MOE, saved

from apportion.catalog.gguf_file import TENSOR_TYPES, read_gguf
from apportion.catalog.model_config import read_model_spec
from apportion.cost.formats import stored_bytes
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

Tensors = list[tuple[str, tuple[int, ...]]]
F32, F16, Q8, Q4_K = 0, 1, 8, 12
H, Q, KV, D, FF, E, V, LAYERS = 64, 8, 4, 16, 120, 4, 509, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_bytes(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case _:
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)


def header(
    metadata: dict[str, Any], tensors: Tensors, tensor_type: int | Mapping[str, int] = F32, version: int = 3
) -> bytes:
    """Vectors are F32."""
    parts = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    parts += [text(key) + value_bytes(value) for key, value in metadata.items()]
    for name, shape in tensors:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        kind = tensor_type if isinstance(tensor_type, int) else tensor_type[name]
        parts.append(text(name) + dims + struct.pack("<IQ", F32 if len(shape) == 1 else kind, 0))
    return b"".join(parts)


def write(
    path: Path, metadata: dict[str, Any], tensors: Tensors, tensor_type: int | Mapping[str, int] = F32
) -> Path:
    path.write_bytes(header(metadata, tensors, tensor_type) + b"weights that nobody reads")
    return path


def metadata(architecture: str, **more: Any) -> dict[str, Any]:
    values = {
        "embedding_length": H,
        "feed_forward_length": FF,
        "block_count": LAYERS,
        "attention.head_count": Q,
        "attention.head_count_kv": [KV] * LAYERS,
        "attention.key_length": D,
        "context_length": 256,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.tokens": ["a", "b", "longer"],
        "general.flag": True,
        "general.scale": 1.5,
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }


ATTENTION: Tensors = [
    ("attn_q.weight", (H, Q * D)),
    ("attn_k.weight", (H, KV * D)),
    ("attn_v.weight", (H, KV * D)),
    ("attn_output.weight", (Q * D, H)),
]
QKV_BIAS: Tensors = [("attn_q.bias", (Q * D,)), ("attn_k.bias", (KV * D,)), ("attn_v.bias", (KV * D,))]
OUTPUT_BIAS: Tensors = [("attn_output.bias", (H,))]
NORMS: Tensors = [("attn_norm.weight", (H,)), ("ffn_norm.weight", (H,))]
POST_NORMS: Tensors = [("post_attention_norm.weight", (H,)), ("post_ffw_norm.weight", (H,))]
QK_NORMS: Tensors = [("attn_q_norm.weight", (D,)), ("attn_k_norm.weight", (D,))]
FFN: Tensors = [("ffn_gate.weight", (H, FF)), ("ffn_up.weight", (H, FF)), ("ffn_down.weight", (FF, H))]
FUSED_FFN: Tensors = [("ffn_up.weight", (H, 2 * FF)), ("ffn_down.weight", (FF, H))]
MLP_BIAS: Tensors = [("ffn_gate.bias", (FF,)), ("ffn_up.bias", (FF,)), ("ffn_down.bias", (H,))]


def experts(width: int, number: int) -> Tensors:
    return [
        ("ffn_gate_inp.weight", (H, number)),
        ("ffn_gate_exps.weight", (H, width, number)),
        ("ffn_up_exps.weight", (H, width, number)),
        ("ffn_down_exps.weight", (width, H, number)),
    ]


def whole(layer: Tensors, *, tied: bool = False, more: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Tensors:
    head: Tensors = [] if tied else [("output.weight", (H, V))]
    blocks = [(f"blk.{index}.{name}", shape) for index in range(LAYERS) for name, shape in layer]
    return [("token_embd.weight", (H, V)), *blocks, ("output_norm.weight", (H,)), *head, *more]


LLAMA = whole(ATTENTION + NORMS + FFN, more=[("rope_freqs.weight", (D // 2,))])
GPT_OSS = [
    *ATTENTION, *QKV_BIAS, *OUTPUT_BIAS, ("attn_sinks.weight", (Q,)), *NORMS, *experts(FF, E),
    ("ffn_gate_inp.bias", (E,)), ("ffn_gate_exps.bias", (FF, E)), ("ffn_up_exps.bias", (FF, E)),
    ("ffn_down_exps.bias", (H, E)),
]  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], Tensors, dict[str, Any]]] = {
    "llama": (
        metadata("llama"),
        whole(ATTENTION + QKV_BIAS + OUTPUT_BIAS + NORMS + FFN + MLP_BIAS),
        {},
    ),
    "mixtral": (
        metadata("llama", expert_count=E, expert_used_count=2),
        whole(ATTENTION + NORMS + experts(FF, E)),
        {"sliding_window": None},
    ),
    "qwen2": (
        metadata("qwen2"),
        whole(ATTENTION + QKV_BIAS + NORMS + FFN, tied=True),
        {"use_sliding_window": False},
    ),
    "qwen3": (
        metadata("qwen3"),
        whole(ATTENTION + QK_NORMS + NORMS + FFN, tied=True),
        {"attention_bias": False},
    ),
    "qwen3_moe": (
        metadata("qwen3moe", expert_count=6, expert_used_count=2, expert_feed_forward_length=48),
        whole(ATTENTION + QK_NORMS + NORMS + experts(48, 6)),
        {"attention_bias": False, "mlp_only_layers": []},
    ),
    "gemma2": (
        metadata("gemma2", attention__sliding_window=8),
        whole(ATTENTION + NORMS + POST_NORMS + FFN, tied=True),
        {},
    ),
    "gemma3_text": (
        metadata("gemma3", attention__sliding_window=8),
        whole(ATTENTION + QK_NORMS + NORMS + POST_NORMS + FFN, tied=True),
        {"attention_bias": False, "sliding_window_pattern": 6},
    ),
    "phi3": (
        metadata("phi3", attention__sliding_window=8),
        whole([("attn_qkv.weight", (H, (Q + 2 * KV) * D)), ATTENTION[-1], *NORMS, *FUSED_FFN]),
        {},
    ),
    "olmo2": (
        metadata("olmo2"),
        whole(
            [
                *ATTENTION,
                ("attn_q_norm.weight", (Q * D,)),
                ("attn_k_norm.weight", (KV * D,)),
                *POST_NORMS,
                *FFN,
            ]
        ),
        {"attention_bias": False},
    ),
    "granite": (
        metadata("granite"),
        whole(ATTENTION + NORMS + FFN, tied=True),
        {"attention_bias": False, "mlp_bias": False},
    ),
    "gpt_oss": (
        metadata(
            "gpt-oss",
            expert_count=E,
            expert_used_count=2,
            expert_feed_forward_length=FF,
            attention__sliding_window=8,
        ),
        whole(GPT_OSS),
        {},
    ),
}


def apart_from_name(spec: ModelSpec) -> ModelSpec:
    return replace(spec, name="")


@pytest.mark.parametrize("family", CASES)
def test_the_same_model_as_from_its_config(family: str, tmp_path: Path):
    described, tensors, changes = CASES[family]
    path = write(tmp_path / "tiny-F32.gguf", described, tensors)
    tiny_config(family, LAYERS, dtype="float32", **changes).save_pretrained(tmp_path)
    spec = read_model_spec(path)
    assert apart_from_name(spec) == apart_from_name(read_model_spec(tmp_path))
    assert spec.name == "tiny-F32"


def test_glm4(tmp_path: Path):
    path = write(tmp_path / "m.gguf", metadata("glm4"), whole(ATTENTION + NORMS + POST_NORMS + FUSED_FFN))
    assert read_model_spec(path).family == "glm4"


def test_bytes_are_exact_and_the_vocabulary_is_read_over(tmp_path: Path):
    tensors: Tensors = [("token_embd.weight", (256, 512)), ("blk.0.attn_norm.weight", (64,))]
    gguf = read_gguf(write(tmp_path / "q.gguf", metadata("llama"), tensors, Q4_K))
    assert gguf.tensor_bytes == 512 * 144 + 64 * 4
    assert gguf.tensors["token_embd.weight"].type_name == "q4_k"
    assert gguf.metadata["tokenizer.ggml.tokens"] is None
    assert gguf.metadata["llama.attention.head_count_kv"] == [KV] * LAYERS
    assert gguf.metadata["general.flag"] is True


@pytest.mark.parametrize(
    ("name", "bits"),
    [("q4_0", 4.5), ("q8_0", 8.5), ("q4_k", 4.5), ("q6_k", 6.5625), ("iq2_xxs", 2.0625), ("mxfp4", 4.25)],
)
def test_bits_per_weight(name: str, bits: float):
    """As llama.cpp's documentation of quantisation states them."""
    block, block_bytes = next(sizes for kind, *sizes in TENSOR_TYPES.values() if kind == name)
    assert block_bytes * 8 / block == bits


SHARED: Tensors = [
    ("ffn_gate_shexp.weight", (H, 2 * 48)),
    ("ffn_up_shexp.weight", (H, 2 * 48)),
    ("ffn_down_shexp.weight", (2 * 48, H)),
]
LATENT: Tensors = [
    ("attn_q_a.weight", (H, 24)),
    ("attn_q_a_norm.weight", (24,)),
    ("attn_q_b.weight", (24, Q * 16)),
    ("attn_kv_a_mqa.weight", (H, 20 + 4)),
    ("attn_kv_a_norm.weight", (20,)),
    ("attn_k_b.weight", (12, 20, Q)),
    ("attn_v_b.weight", (20, 10, Q)),
    ("attn_output.weight", (Q * 10, H)),
]


def dense_first(attention: Tensors, num_dense: int, num_extra: int = 0) -> Tensors:
    routed: Tensors = [*experts(48, 6), ("exp_probs_b.bias", (6,)), *SHARED]
    blocks = [FFN] * num_dense + [routed] * (LAYERS - num_dense + num_extra)
    layers: Tensors = [
        (f"blk.{n}.{name}", shape) for n, ffn in enumerate(blocks) for name, shape in attention + NORMS + ffn
    ]
    extra: Tensors = [(f"blk.{LAYERS + n}.nextn.eh_proj.weight", (2 * H, H)) for n in range(num_extra)]
    return [
        *layers,
        *extra,
        ("token_embd.weight", (H, V)),
        ("output_norm.weight", (H,)),
        ("output.weight", (H, V)),
    ]


def test_latent_attention(tmp_path: Path):
    """The tiny deepseek_v3 of test_catalog_families, as llama.cpp's converter writes it."""
    described = metadata(
        "deepseek2",
        **{"attention.head_count_kv": 1, "attention.key_length": 24, "attention.value_length": 20},
        **{"attention.key_length_mla": 16, "attention.value_length_mla": 10, "rope.dimension_count": 4},
        **{"attention.q_lora_rank": 24, "attention.kv_lora_rank": 20, "leading_dense_block_count": 1},
        expert_count=6,
        expert_used_count=2,
        expert_shared_count=2,
        expert_feed_forward_length=48,
    )
    path = write(tmp_path / "v3.gguf", described, dense_first(LATENT, 1))
    expected = saved(tmp_path, "DeepseekV3Config", LATENT_FIELDS | {"dtype": "float32"})
    assert apart_from_name(read_model_spec(path)) == apart_from_name(expected)


def test_blocks_for_more_tokens_are_left_out(tmp_path: Path):
    described = metadata(
        "glm4moe",
        leading_dense_block_count=2,
        nextn_predict_layers=1,
        block_count=LAYERS + 1,
        expert_count=6,
        expert_used_count=2,
        expert_shared_count=2,
        expert_feed_forward_length=48,
    )
    tensors = dense_first(ATTENTION + QKV_BIAS + QK_NORMS, 2, num_extra=1)
    path = write(tmp_path / "glm.gguf", described, tensors)
    fields = {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2, "dtype": "float32"}
    expected = saved(tmp_path, "Glm4MoeConfig", MOE | fields)
    assert apart_from_name(read_model_spec(path)) == apart_from_name(expected)
    extra = {name for name, _ in tensors if name.startswith(f"blk.{LAYERS}.")}
    spec = read_model_spec(
        write(path, described, tensors, {name: F16 if "_norm" in name else Q8 for name, _ in tensors})
    )
    gguf = read_gguf(path)
    planned = sum(tensor.num_bytes for name, tensor in gguf.tensors.items() if name not in extra)
    assert stored_bytes(spec) == planned < gguf.tensor_bytes


def test_a_file_of_16_bits_is_not_quantised(tmp_path: Path):
    spec = read_model_spec(write(tmp_path / "half.gguf", metadata("llama"), LLAMA, F16))
    assert (spec.checkpoint_format, spec.stored) == ("fp16", None)


def test_a_file_in_parts(tmp_path: Path):
    first = tmp_path / "m-00001-of-00002.gguf"
    write(first, metadata("llama") | {"split.count": 2}, LLAMA[:9])
    with pytest.raises(
        ModelError, match=r"m-00002-of-00002\.gguf is not there; planning reads the headers of all 2"
    ):
        read_model_spec(first)
    second = write(tmp_path / "m-00002-of-00002.gguf", {"split.count": 2, "split.no": 1}, LLAMA[9:])
    tiny_config("llama", LAYERS, attention_bias=False, mlp_bias=False, dtype="float32").save_pretrained(
        tmp_path
    )
    assert apart_from_name(read_model_spec(first)) == apart_from_name(read_model_spec(tmp_path))
    with pytest.raises(ModelError, match=r"a part of 2; name the first, which ends in -00001-of-00002\.gguf"):
        read_model_spec(second)


@pytest.mark.parametrize(
    ("described", "tensors", "message"),
    [
        (metadata("bert", attention__causal=False), LLAMA, "'bert' is an encoder, which cannot be planned"),
        (metadata("new"), [], "no vocabulary table or no layers are found"),
        ({}, LLAMA, "names no architecture"),
        ({"general.architecture": "a\nb"}, LLAMA, "names no architecture"),
        (metadata("llama"), [], "has no token_embd.weight"),
        (metadata("llama"), LLAMA[:-5], "parameters, but its header describes"),
        (
            metadata("llama", block_count=10**9),
            LLAMA,
            "'num_hidden_layers' is 1000000000; it must be at most",
        ),
        (metadata("llama", attention__head_count_kv=[4, 4, 2, 4]), LLAMA, "differs between layers"),
        (metadata("llama", embedding_length="64"), LLAMA, "'hidden_size' is \"64\"; it must be a positive"),
    ],
)
def test_files_that_cannot_be_used(described: dict[str, Any], tensors: Tensors, message: str, tmp_path: Path):
    path = write(tmp_path / "m.gguf", described, tensors)
    with pytest.raises(ModelError, match=message) as caught:
        read_model_spec(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends within its header"),
        (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
        (header({}, [], version=1), "version 1 is not 2 or 3"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(20), "version 50331648 is not"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "ends within its header"),
        (header({}, [("x", (3,) * 5)]), "5 dimensions"),
        (header({}, [("x", (3, 3))], 99), "tensor type 99 is not known"),
        (header({}, [("x", (3, 3))], Q4_K), "9 elements is not in blocks of 256"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 77), "kind 77"),
    ],
)
def test_broken_headers(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_gguf(path)


def test_cut_and_damaged_files_are_errors_of_one_line(tmp_path: Path):
    content = header(metadata("llama"), LLAMA)
    draw = random.Random(1)
    path = tmp_path / "m.gguf"
    for number in range(300):
        damaged = bytearray(content)
        if number % 2:
            damaged = damaged[: draw.randrange(len(content))]
        else:
            for _ in range(3):
                damaged[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(damaged)
        message = ""
        try:
            read_model_spec(path)
        except ModelError as error:
            message = str(error)
        assert message.isprintable()


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(ModelError, match="cannot be read"):
        read_model_spec(tmp_path / "none.gguf")
