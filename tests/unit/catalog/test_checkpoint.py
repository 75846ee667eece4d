"""A folder's safetensors headers against its config.json: real checkpoints agree, altered ones are refused."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.tiny_models import FAMILIES, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from unit.catalog.test_catalog_families import CASES, saved

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.safetensors_header import INDEX_NAME, SINGLE_NAME, read_headers
from apportion.types.errors import ModelError

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family_agree_with_their_configs(family: str, tmp_path: Path):
    make_checkpoint(family, tmp_path, num_layers=3, dtype=torch.bfloat16)
    spec = read_model_spec(tmp_path)
    headers = read_headers(tmp_path)
    assert headers is not None
    assert sum(tensor.num_elements for tensor in headers) == spec.num_parameters
    assert spec.checkpoint_format == "bf16"


@pytest.mark.parametrize(("_", "config_class", "fields"), CASES)
def test_checkpoints_of_families_that_are_only_planned_agree_too(
    _: str, config_class: str, fields: dict[str, Any], tmp_path: Path
):
    saved(tmp_path, config_class, fields)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert read_headers(tmp_path)
    read_model_spec(tmp_path)


def changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    make_checkpoint("qwen3", folder, num_layers=2)
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_NAME)
    return folder


def configured(folder: Path, **fields: Any) -> Path:
    make_checkpoint("qwen3", folder, num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_the_files_decide_the_format_and_not_the_fingerprint(tmp_path: Path):
    folder = configured(tmp_path, dtype="float16")
    alone = read_model_spec(folder / "config.json")
    whole = read_model_spec(folder)
    assert (alone.checkpoint_format, whole.checkpoint_format) == ("fp16", "fp32")
    assert alone.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 512}, ["embed_tokens.weight", "[509, 64]", "[512, 64]"]),
        ({"num_key_value_heads": 2}, ["layers.0.self_attn.k_proj.", "[64", "[32"]),
        ({"intermediate_size": 128}, ["layers.0.mlp.", "120", "128"]),
        ({"num_hidden_layers": 1}, ["model.layers.1.", "1 layers"]),
        ({"num_hidden_layers": 3}, ["layer 2 hold 0 parameters"]),
        ({"tie_word_embeddings": False}, ["'lm_head.weight'", "[509, 64]", "tie_word_embeddings"]),
        ({"attention_bias": False}, ["layer 0", "parameters"]),
    ],
)
def test_a_config_of_another_model_is_refused(fields: dict[str, Any], told: list[str], tmp_path: Path):
    with pytest.raises(ModelError) as error:
        read_model_spec(configured(tmp_path, **fields))
    assert all(part in str(error.value) for part in told), str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_too_many_is_named(tmp_path: Path):
    folder = changed(tmp_path, lambda t: t.update({"model.layers.1.adapter.weight": torch.zeros(7, 5)}))
    with pytest.raises(ModelError, match=r"layer 1 .*adapter\.weight' \[7, 5\]"):
        read_model_spec(folder)


def test_quantised_tensors_are_refused(tmp_path: Path):
    def quantise(tensors: Tensors) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    with pytest.raises(ModelError, match=r"up_proj\.weight' is F8_E4M3.*quantised"):
        read_model_spec(changed(tmp_path, quantise))


def test_buffers_and_modules_for_more_tokens_are_no_parameters(tmp_path: Path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
        "model.layers.2.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.2.self_attn.q_proj.weight": torch.zeros(3, 3),
    }
    read_model_spec(changed(tmp_path, lambda tensors: tensors.update(extra)))


def test_an_incomplete_download_is_refused(tmp_path: Path):
    make_checkpoint("llama", tmp_path, num_layers=2, dtype=torch.bfloat16)
    next(iter(tmp_path.glob("*-00002-*.safetensors"))).unlink()
    with pytest.raises(
        ModelError, match=r"lacks 1 of its \d files, model-00002-of-.*; download it again, or name"
    ):
        read_model_spec(tmp_path)
    assert read_model_spec(tmp_path / "config.json").num_layers == 2
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(ModelError, match=f"lacks {INDEX_NAME}; download"):
        read_model_spec(tmp_path)


def test_a_folder_without_any_weights_is_planned_from_its_config(tmp_path: Path):
    make_checkpoint("llama", tmp_path, num_layers=2, dtype=torch.bfloat16)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert (tmp_path / INDEX_NAME).exists()
    assert read_headers(tmp_path) is None
    assert read_model_spec(tmp_path).num_layers == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 16, (5).to_bytes(8, "little") + b"[1,2]", (9).to_bytes(8, "little") + b'{"a": {}}'],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path):
    configured(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read_model_spec(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path):
    file = configured(tmp_path) / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="ends before its last tensor"):
        read_model_spec(tmp_path)


def test_the_bundled_model_agrees_with_its_config():
    demo = resolve_model("demo", weights=True)
    assert read_headers(demo)
    read_model_spec(demo)


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path):
    """Its file is sound: a header of no tensors."""
    folder = tmp_path / "m"
    shutil.copytree(resolve_model("demo", weights=False), folder)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(ModelError, match="hold no tensors; download them again"):
        read_model_spec(folder)
