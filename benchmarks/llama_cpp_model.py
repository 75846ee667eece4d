"""The speed model as a GGUF file, for llama.cpp: the same shapes and noise, in f16 or q8_0."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from speed_model import CONFIG

from apportion.model.weights.random_weights import RandomWeights

_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}


def write_gguf(file: Path, quantisation: str) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(1 if quantisation == "f16" else 7)
    for name, source, shape in _tensors():
        values = _values(source, shape)
        kind = _TYPES[quantisation] if len(shape) == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in GGUF, name in a checkpoint, shape)."""
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    kv = hidden // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
    vocabulary = (CONFIG["vocab_size"], hidden)
    yield "token_embd.weight", "model.embed_tokens.weight", vocabulary
    yield "output.weight", "lm_head.weight", vocabulary
    yield "output_norm.weight", "model.norm.weight", (hidden,)
    for i in range(CONFIG["num_hidden_layers"]):
        into, layer = f"blk.{i}", f"model.layers.{i}"
        yield f"{into}.attn_norm.weight", f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{into}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{into}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{into}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{into}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{into}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{into}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{into}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{into}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", (hidden, ffn)


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    weights, tensor = RandomWeights(), torch.empty(shape)
    weights.check_shape(name, shape)
    weights.read_into(tensor, name, tuple((0, size) for size in shape))
    return tensor.numpy()
