"""Quantised safetensors checkpoints are planned by their bytes: from headers where there are files, else by formula."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export
from parity.tiny_models import tiny_config
from planned import cluster, cpu, workload
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from unit.catalog.test_catalog_families import CASES, saved

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.safetensors_header import SINGLE_NAME
from apportion.cli.main import exit_code
from apportion.cost.formats import stored_bytes
from apportion.planner.build import make_plan
from apportion.planner.stages.axes import ffn_granule
from apportion.planner.verify.plan import verify
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec

H, Q_WIDTH, KV_WIDTH, FF, V, LAYERS = 128, 512, 256, 512, 509, 3
SIZES = {
    "hidden_size": H,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": FF,
    "vocab_size": V,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "dtype": "float16",
}
MATRICES = {
    "self_attn.q_proj": (Q_WIDTH, H),
    "self_attn.k_proj": (KV_WIDTH, H),
    "self_attn.v_proj": (KV_WIDTH, H),
    "self_attn.o_proj": (H, Q_WIDTH),
    "mlp.gate_proj": (FF, H),
    "mlp.up_proj": (FF, H),
    "mlp.down_proj": (H, FF),
}
Tensors = dict[str, torch.Tensor]
Stored = Callable[[int, int], Tensors]
"""Of a matrix of (rows, columns), by what stands after the module's name."""


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def halves(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def singles(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float32)


def eights(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float8_e4m3fn)


def gptq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": ints(columns // 8, rows),
        "scales": halves(columns // 32, rows),
        "qzeros": ints(columns // 32, rows // 8),
        "g_idx": ints(columns),
    }


def awq(rows: int, columns: int) -> Tensors:
    return {
        "qweight": ints(columns, rows // 8),
        "scales": halves(columns // 64, rows),
        "qzeros": ints(columns // 64, rows // 8),
    }


def blocked_fp8(rows: int, columns: int) -> Tensors:
    return {"weight": eights(rows, columns), "weight_scale_inv": singles(rows // 32, columns // 32)}


def packed(rows: int, columns: int) -> Tensors:
    return {"weight_packed": ints(rows, columns // 8), "weight_scale": halves(rows, columns // 64)}


def fp8_rows(rows: int, columns: int) -> Tensors:
    return {"weight": eights(rows, columns), "weight_scale": halves(rows, 1)}


def nf4(rows: int, columns: int) -> Tensors:
    elements = rows * columns
    return {
        "weight": torch.zeros(elements // 2, 1, dtype=torch.uint8),
        "weight.absmax": singles(elements // 64),
        "weight.quant_map": singles(16),
    }


def exl3(rows: int, columns: int) -> Tensors:
    tiles = torch.zeros(columns // 16, rows // 16, 4 * 16, dtype=torch.int16)
    return {"trellis": tiles, "suh": halves(columns), "svh": halves(rows), "mcg": ints(1)}


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": weights}}, "ignore": ["lm_head"]}


METHODS: dict[str, tuple[dict[str, Any], Stored]] = {
    "gptq-int4": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq),
    "awq-int4": ({"quant_method": "awq", "bits": 4, "group_size": 64}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, blocked_fp8),
    "ct-int4": (
        {"quant_method": "compressed-tensors", **group(num_bits=4, type="int", group_size=64)},
        packed,
    ),
    "ct-fp8": ({"quant_method": "compressed-tensors", **group(num_bits=8, type="float")}, fp8_rows),
    "exl3-4bpw": ({"quant_method": "exl3", "bits": 4.0, "head_bits": 16}, exl3),
    "bnb-nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, nf4),
}


def config(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}))
    return folder


def checkpoint(
    folder: Path, quantisation: dict[str, Any], stored: Stored, kept: tuple[str, ...] = ()
) -> Path:
    tensors = {"model.embed_tokens.weight": halves(V, H), "lm_head.weight": halves(V, H)}
    tensors["model.norm.weight"] = halves(H)
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = halves(H)
        for name, shape in MATRICES.items():
            module = f"model.layers.{layer}.{name}"
            pieces = {"weight": halves(*shape)} if module in kept else stored(*shape)
            tensors |= {f"{module}.{piece}": tensor for piece, tensor in pieces.items()}
    config(folder, quantization_config=quantisation)
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def data_bytes(folder: Path) -> int:
    content = (folder / SINGLE_NAME).read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


def plan_of(model: ModelSpec):
    assert model.stored is not None
    return make_plan(model, cluster([cpu("a", 1)]), workload(), (model.stored.format,))


@pytest.mark.parametrize("method", METHODS)
def test_an_undivided_plan_holds_what_the_files_hold(method: str, tmp_path: Path):
    quantisation, stored = METHODS[method]
    folder = checkpoint(tmp_path, quantisation, stored)
    model = read_model_spec(folder)
    assert model.stored is not None
    assert model.stored.format == ("fp8" if method == "ct-fp8" else method)
    plan = plan_of(model)
    assert plan.memory["a"].weights_bytes == data_bytes(folder)
    assert all(check.ok for check in verify(plan))


@pytest.mark.parametrize("method", METHODS)
def test_the_formula_agrees_with_files(method: str, tmp_path: Path):
    quantisation, stored = METHODS[method]
    folder = checkpoint(tmp_path, quantisation, stored)
    formula, files = read_model_spec(folder / "config.json"), read_model_spec(folder)
    assert abs(stored_bytes(formula) / stored_bytes(files) - 1) < 5e-3
    assert formula.fingerprint == files.fingerprint == read_model_spec(config(tmp_path / "plain")).fingerprint
    for one, other in zip(formula.layers, files.layers, strict=True):
        assert one.per_ffn_column.stored_bytes == pytest.approx(other.per_ffn_column.stored_bytes, rel=0.02)
        assert one.per_kv_head.stored_bytes == pytest.approx(other.per_kv_head.stored_bytes, rel=0.02)


def test_gptq_by_hand(tmp_path: Path):
    model = read_model_spec(checkpoint(tmp_path, *METHODS["gptq-int4"]))
    layer = model.layers[0]

    def matrix(rows: int, columns: int) -> int:
        groups = columns // 32
        return rows * columns // 2 + groups * rows * 2 + groups * rows // 2

    heads = matrix(Q_WIDTH + 2 * KV_WIDTH, H) + matrix(H, Q_WIDTH)
    assert layer.per_kv_head.stored_bytes == heads // 2
    columns = matrix(2 * FF, H) + matrix(H, FF)
    assert layer.per_ffn_column.stored_bytes == columns // FF
    numbers = 4 * (5 * H + Q_WIDTH + FF)  # of the inputs' groups
    assert layer.replicated.stored_bytes == 2 * 2 * H + numbers + columns % FF
    assert (ffn_granule(model), layer.stored_block_bytes) == (32, 0)


def test_layers_that_are_kept_as_they_are(tmp_path: Path):
    kept = tuple(f"model.layers.1.{name}" for name in MATRICES if name.startswith("mlp"))
    quantisation = METHODS["awq-int4"][0] | {
        "modules_to_not_convert": ["lm_head", "layers.1.mlp", "model.layers.1.mlp"]
    }
    folder = checkpoint(tmp_path, quantisation, awq, kept)
    formula, files = read_model_spec(folder / "config.json"), read_model_spec(folder)
    assert (
        formula.layers[1].per_ffn_column.stored_bytes == files.layers[1].per_ffn_column.stored_bytes == 6 * H
    )
    assert formula.layers[0].per_ffn_column.stored_bytes < 2 * H
    assert plan_of(files).memory["a"].weights_bytes == data_bytes(folder)


def test_a_head_that_no_pattern_keeps_is_quantised(tmp_path: Path):
    quantisation = METHODS["ct-int4"][0]
    kept = read_model_spec(config(tmp_path, quantization_config=quantisation | {"ignore": ["re:.*head"]}))
    packed_too = read_model_spec(config(tmp_path, quantization_config=quantisation | {"ignore": []}))
    assert kept.stored is not None
    assert packed_too.stored is not None
    assert kept.stored.head_row_bytes == 2 * H
    assert packed_too.stored.head_row_bytes == H // 2 + H // 64 * 2


def test_files_of_another_config_are_refused(tmp_path: Path):
    folder = checkpoint(tmp_path, *METHODS["awq-int4"])
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"intermediate_size": 2 * FF}))
    with pytest.raises(ModelError, match=r"matrices of layer 0 hold 393216 awq-int4 elements, but .* 589824"):
        read_model_spec(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {k: t for k, t in load_file(folder / SINGLE_NAME).items() if "layers.2.mlp.up_proj" not in k}
    save_file(tensors, folder / SINGLE_NAME)
    with pytest.raises(ModelError, match=r"matrices of layer 2 hold 327680"):
        read_model_spec(folder)


def test_mxfp4_holds_the_experts_alone(tmp_path: Path):
    tiny_config("gpt_oss", 2, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    fields["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    formula = read_model_spec(tmp_path)
    experts, width = fields["num_local_experts"], 96
    part = formula.layers[0].per_ffn_column
    blocks = 3 * 64 * experts // 32 * 17  # of one column: 32 elements in 16 bytes and a scale of one
    assert part.stored_bytes == blocks + 2 * 2 * experts  # and the biases of gate and up
    assert formula.layers[0].per_kv_head.stored_bytes == 2 * formula.layers[0].per_kv_head.count
    assert ffn_granule(formula) == 32
    heads, kv, dim = fields["num_attention_heads"], fields["num_key_value_heads"], fields["head_dim"]

    def bf16(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    def u8(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.uint8)

    vocabulary = fields["vocab_size"]
    tensors = {"model.embed_tokens.weight": bf16(vocabulary, 64), "model.norm.weight": bf16(64)}
    if not fields["tie_word_embeddings"]:
        tensors["lm_head.weight"] = bf16(vocabulary, 64)
    for layer in range(2):
        of_layer = {
            "input_layernorm.weight": bf16(64),
            "post_attention_layernorm.weight": bf16(64),
            "self_attn.sinks": bf16(heads),
            "mlp.router.weight": bf16(experts, 64),
            "mlp.router.bias": bf16(experts),
            "mlp.experts.gate_up_proj_blocks": u8(experts, 2 * width, 2, 16),
            "mlp.experts.gate_up_proj_scales": u8(experts, 2 * width, 2),
            "mlp.experts.gate_up_proj_bias": bf16(experts, 2 * width),
            "mlp.experts.down_proj_blocks": u8(experts, 64, 3, 16),
            "mlp.experts.down_proj_scales": u8(experts, 64, 3),
            "mlp.experts.down_proj_bias": bf16(experts, 64),
        }
        for name, rows, columns in (
            ("q_proj", heads * dim, 64),
            ("k_proj", kv * dim, 64),
            ("v_proj", kv * dim, 64),
            ("o_proj", 64, heads * dim),
        ):
            of_layer[f"self_attn.{name}.weight"] = bf16(rows, columns)
            of_layer[f"self_attn.{name}.bias"] = bf16(rows)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in of_layer.items()}
    save_file(tensors, tmp_path / SINGLE_NAME)
    files = read_model_spec(tmp_path)
    assert stored_bytes(files) == stored_bytes(formula) == data_bytes(tmp_path)
    assert files.layers[0].per_ffn_column == part
    assert plan_of(files).memory["a"].weights_bytes == data_bytes(tmp_path)


@pytest.mark.parametrize(("known", "published_gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)])
def test_gpt_oss_is_as_large_as_published(known: str, published_gib: float):
    """Sizes of checkpoints: gpt-oss model card (arXiv 2508.10925), table 1."""
    model = read_model_spec(resolve_model(known, weights=False))
    assert model.stored is not None
    assert model.stored.format == "mxfp4"
    assert round(stored_bytes(model) / 2**30, 1) == published_gib


def test_a_group_of_cards_shares_whole_blocks():
    model = read_model_spec(resolve_model("gpt-oss-20b", weights=False))
    cards = parse_devices("rtx-3060-12gb + rtx-4060-ti-8gb", lambda _: ())
    plan = make_plan(model, cards, workload(), ("mxfp4",))
    assert plan.activation_format == "bf16"
    assert all(check.ok for check in verify(plan))
    for stage in plan.stages:
        assert stage.split.size == 1 or all(held % 32 == 0 for held in stage.split.ffn_columns)
    assert not any("as it is" in note for note in export(plan, "vllm").notes)
    assert any("give it a GGUF file of about 5.3 bits" in note for note in export(plan, "llama.cpp").notes)


def test_each_engine_takes_its_own_files(tmp_path: Path):
    model = read_model_spec(config(tmp_path, quantization_config=METHODS["exl3-4bpw"][0]))
    card = parse_devices("rtx-3060-12gb", lambda _: ())
    plan = make_plan(model, card, workload(), ("exl3-4bpw",))
    assert not any("as it is" in note for note in export(plan, "exllamav3").notes)
    assert any(
        "vLLM does not take the plan's exl3-4bpw checkpoint as it is" in n for n in export(plan, "vllm").notes
    )


def test_running_quantised_files_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = checkpoint(tmp_path, *METHODS["awq-int4"])
    assert exit_code(["run", str(folder), "hello", "--weights", "bf16"]) == 2
    error = capfd.readouterr().err
    assert "is in awq-int4: such weights can be planned and exported to other engines, but not run" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"quant_method": "gptq", "bits": 0, "group_size": 128}, "'bits' is 0"),
        ({"quant_method": "gptq", "bits": 4, "group_size": "128"}, "'group_size' is \"128\""),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "'weight_block_size' is [128]; it must be two"),
        ({"quant_method": "exl3", "bits": 4.0}, "'head_bits' is null; it must be a number of bits"),
        ({"quant_method": "compressed-tensors"}, "'config_groups' is null; it must be one scheme"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": 1}},
            "groups that each have 'weights'",
        ),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "ignore": ["re:("]}, "is no pattern"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "ignore": "lm_head"}, "it must be a list"),
    ],
)
def test_configs_that_cannot_be_used(quantisation: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        read_model_spec(config(tmp_path, quantization_config=quantisation))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_class", "fields"), [(name, fields) for family, name, fields in CASES if family == "deepseek_v3"]
)
def test_latent_attention_and_experts_in_fp8(config_class: str, fields: dict[str, Any], tmp_path: Path):
    saved(tmp_path, config_class, fields)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors: Tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    for name in [name for name in tensors if "_proj" in name and name.endswith(".weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = eights(rows, columns)
        tensors[f"{name}_scale_inv"] = singles(-(-rows // 16), -(-columns // 16))
    save_file(tensors, tmp_path / SINGLE_NAME)
    config_file = tmp_path / "config.json"
    plain = json.loads(config_file.read_text()) | {"dtype": "bfloat16"}
    quantisation = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config_file.write_text(json.dumps(plain | {"quantization_config": quantisation}))
    files, formula = read_model_spec(tmp_path), read_model_spec(config_file)
    assert plan_of(files).memory["a"].weights_bytes == data_bytes(tmp_path)
    assert abs(stored_bytes(formula) / stored_bytes(files) - 1) < 0.01
    for one, other in zip(formula.layers, files.layers, strict=True):
        assert one.per_ffn_column.stored_bytes == pytest.approx(other.per_ffn_column.stored_bytes, rel=0.01)
        assert one.per_kv_head.stored_bytes == pytest.approx(other.per_kv_head.stored_bytes, rel=0.05)
