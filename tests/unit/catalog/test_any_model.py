"""Models that the catalogue does not know are planned from what is there: 54 real configs at their published sizes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from apportion.catalog import general
from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.config_fields import ConfigFields
from apportion.catalog.families import FAMILIES
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.runnable import check_runnable
from apportion.catalog.tensor_roles import NamedTensor
from apportion.catalog.transformers_child import Described, ask_transformers
from apportion.cost.formats import stored_bytes
from apportion.model.hf.describe import describe
from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.errors import ModelError
from apportion.types.model import ModelSpec
from apportion.types.workload import Workload

FILE = Path(__file__).parents[2] / "data" / "real_configs.json"
MODELS: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["models"]
PUBLISHED = {
    "MiniMax-M2": 229,
    "DeepSeek-R1": 671,
    "DeepSeek-V3": 671,
    "DeepSeek-V4-Flash": 284,
    "Llama-4-Scout": 109,
    "Mixtral-8x7B": 46.7,
    "Kimi-K2": 1026,
    "GLM-5": 744,
    "Step-3.7-Flash": 196,
}
"""Billions of parameters of those whose name does not say it, as their model cards do (Kimi: "1T"; Step: without its
vision encoder of 1.8)."""
BITS = {"fp8": 8, "nvfp4": 4.5, "mxfp4": 4.25, "ct-int4": 4.5}
EXPERTS_ALONE = (
    "V4-Flash-NVFP4",
    "V4-Flash",
    "MiniMax-M2.5-NVFP4",
    "MiniMax-M2.7-NVFP4",
    "Gemma-4",
    "Qwen3.5-122B",
    "gpt-oss",
)
"""Of which only experts are in 4 bits."""


def describe_here(fields: ConfigFields, content: dict[str, object]) -> Described | str:
    """As in the child process, whose imports take seconds."""
    try:
        answer = describe(content)
    except Exception as error:
        return str(error)
    tensors = [NamedTensor.of_shape(name, shape) for name, shape in answer["tensors"].items()]
    return Described(tensors=tensors, config=ConfigFields(fields.file, answer["config"], {}))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(general, "ask_transformers", describe_here)


def written(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def billions(name: str) -> tuple[float, float]:
    """What the name or the model card says, and how near that is."""
    for key, size in PUBLISHED.items():
        if key in name:
            return size, 0.02
    found = re.search(r"-(\d+(?:\.\d+)?)B", name, re.IGNORECASE)
    assert found is not None
    return float(found[1]), 0.12


def routed_experts(spec: ModelSpec, files: dict[str, Any]) -> float:
    """layers × experts × three matrices of the hidden size."""
    config = files["config.json"]
    config = config.get("text_config", config)
    experts = next(
        config[key] for key in ("n_routed_experts", "num_local_experts", "num_experts") if key in config
    )
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    layers = sum(layer.num_experts > 0 for layer in spec.layers)
    return layers * experts * 3 * width * config["hidden_size"]


def expected_bytes(name: str, spec: ModelSpec, files: dict[str, Any]) -> float:
    if spec.stored is None:
        return 2 * spec.num_parameters
    if any(one in name for one in EXPERTS_ALONE) and "FP8" not in name:
        few = routed_experts(spec, files)
        wide = 1 if "V4" in name else 2
        bits = 4.25 if spec.stored.format == "mxfp4" or name.endswith("Flash") else 4.5
        tables = 2 * spec.embedding_params if "V4" in name else 0
        return few * bits / 8 + wide * (spec.num_parameters - few) + tables
    return spec.num_parameters * BITS[spec.stored.format] / 8


@pytest.mark.parametrize("name", MODELS)
def test_a_real_config_is_planned_at_its_size(name: str, tmp_path: Path):
    spec = read_model_spec(written(tmp_path, MODELS[name]))
    size, tolerance = billions(name)
    assert spec.num_parameters / 1e9 == pytest.approx(size, rel=tolerance)
    active = re.search(r"-A(\d+)B", name)
    if active:
        assert spec.active_parameters / 1e9 == pytest.approx(float(active[1]), rel=0.25)
    held = stored_bytes(spec) if spec.stored else 2 * spec.num_parameters
    # Where attention or shared experts stay in 16 bits beside NVFP4, more is held than the name's bits say.
    assert held == pytest.approx(
        expected_bytes(name, spec, MODELS[name]), rel=0.15 if "120B-A12B" in name else 0.12
    )


def test_there_are_54():
    assert len(MODELS) == 54


ASKED = Workload(
    prompt_tokens=512, output_tokens=128, concurrency=2, max_context_tokens=8192, objective="latency"
)


@pytest.mark.parametrize(
    "name",
    ["google--gemma-4-26B-A4B", "Qwen--Qwen3.5-35B-A3B", "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
     "nvidia--Llama-3_3-Nemotron-Super-49B-v1"],
)  # fmt: skip
def test_a_plan_of_layers_of_several_kinds_is_verified(name: str, tmp_path: Path):
    spec = read_model_spec(written(tmp_path, MODELS[name]))
    two = parse_devices("2x h200-sxm", lambda _: [])
    plan = make_plan(spec, two, ASKED, (spec.stored.format if spec.stored else "bf16",))
    assert all(check.ok for check in verify(plan))
    with pytest.raises(ModelError, match=f"of the family {spec.family} can be planned, but not run"):
        check_runnable(plan)


def caches(name: str, folder: Path) -> list[tuple[int, int | None]]:
    """Elements of a token and the window, by layer."""
    spec = read_model_spec(written(folder, MODELS[name]))
    return [(spec.kv_elements(layer, spec.kv_heads), layer.window_tokens) for layer in spec.layers]


def test_gemma_4_has_layers_of_two_kinds(tmp_path: Path):
    """25 sliding ones with 8 KV heads of 256; 5 global ones with 2 of 512, whose values are their keys' projection."""
    held = caches("google--gemma-4-26B-A4B", tmp_path)
    assert held.count((2 * 8 * 256, 1024)) == 25
    assert held.count((2 * 2 * 512, None)) == 5


def test_hybrid_models_keep_states(tmp_path: Path):
    """Qwen3.5-35B-A3B: of 40 layers every fourth has 2 KV heads of 256; the others a state of 32 heads × 128 × 128 in
    fp32 and the last inputs of a convolution of 8192 channels."""
    spec = read_model_spec(written(tmp_path, MODELS["Qwen--Qwen3.5-35B-A3B"]))
    states = [layer.cache.state_bytes for layer in spec.layers if layer.cache]
    assert [size for size in states if size] == [4 * 32 * 128 * 128 + 2 * 8192 * 4] * 30
    assert [
        spec.kv_elements(layer, spec.kv_heads)
        for layer in spec.layers
        if layer.cache and not layer.cache.state_bytes
    ] == [1024] * 10
    assert any("30 of 40 layers keep a constant state" in note for note in spec.notes)


def test_latent_attention_with_an_indexer(tmp_path: Path):
    """DeepSeek-V3.2: 512 + 64 elements, and 128 of the indexer's key."""
    assert caches("deepseek-ai--DeepSeek-V3.2", tmp_path) == [(704, None)] * 61


def test_compressed_attention(tmp_path: Path):
    """DeepSeek-V4-Flash: keys are values, 512 elements; an entry stands for 128 tokens, or for 4, and then
    there are 256 of an indexer too; two layers attend to a window of 128 alone."""
    held = caches("deepseek-ai--DeepSeek-V4-Flash", tmp_path)
    assert held.count((512 // 128, None)) == 20
    assert held.count(((512 + 256) // 4, None)) == 21
    assert held.count((512, 128)) == 2


def test_searched_architectures(tmp_path: Path):
    """Llama-3.3-Nemotron-Super: 49 of 80 blocks have attention (8 KV heads of 128)."""
    held = [elements for elements, _ in caches("nvidia--Llama-3_3-Nemotron-Super-49B-v1", tmp_path)]
    assert held.count(2 * 8 * 128) == 49
    assert held.count(0) == 31


def test_what_also_sees_is_planned_as_a_language_model(tmp_path: Path):
    spec = read_model_spec(written(tmp_path, MODELS["Qwen--Qwen3-VL-32B-Instruct"]))
    assert spec.family == "qwen3_vl"
    assert spec.notes == ("the language model alone is planned; what sees and hears beside it is left out",)


OPT = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384}
FALCON = {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True}
BLOOM = {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880}
OLD: dict[str, tuple[dict[str, Any], float, int]] = {
    "opt": (OPT | {"word_embed_proj_dim": 4096}, 6.66, 2 * 4096),
    "bloom": (BLOOM, 7.07, 2 * 4096),
    "falcon": (FALCON, 6.92, 2 * 64),
    "gpt_neox": ({}, 20.55, 2 * 6144),
    "gpt2": ({}, 0.124, 2 * 768),
    "gemma3n_text": ({}, 6.87, 2 * 2 * 256),
}
"""Published sizes of OPT-6.7B, BLOOM-7B1, Falcon-7B, GPT-NeoX-20B, GPT-2 and Gemma 3n E4B's text part; a layer's
cache."""


@pytest.mark.parametrize("family", OLD)
def test_older_families(family: str, tmp_path: Path):
    fields, size, elements = OLD[family]
    spec = read_model_spec(written(tmp_path, {"config.json": {"model_type": family, **fields}}))
    assert spec.num_parameters / 1e9 == pytest.approx(size, rel=0.02)
    assert spec.kv_elements(spec.layers[0], spec.kv_heads) == elements
    assert any("names no dtype" in note for note in spec.notes)


def test_gemma_3n_shares_caches_between_layers(tmp_path: Path):
    """The last 15 of 35 layers read others' keys; embeddings per layer, 2.3 B parameters, are beside the table."""
    spec = read_model_spec(written(tmp_path, {"config.json": {"model_type": "gemma3n_text"}}))
    held = [spec.kv_elements(layer, spec.kv_heads) for layer in spec.layers]
    assert held == [1024] * 20 + [0] * 15
    assert spec.beside_embedding == pytest.approx(262144 * 35 * 256, rel=0.05)


def test_the_child_process_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It starts with no folder on its path: a module that lies where one plans is not imported."""
    config = {
        "model_type": "opt",
        "num_hidden_layers": 2,
        "hidden_size": 72,
        "word_embed_proj_dim": 72,
        "auto_map": {"AutoConfig": "evil.Config"},
    }
    folder = written(tmp_path, {"config.json": config})
    (folder / "json.py").write_text("raise SystemExit('the folder is on the path')")
    (folder / "evil.py").write_text("raise SystemExit('code of the folder is run')")
    here = read_model_spec(folder)
    monkeypatch.setattr(general, "ask_transformers", ask_transformers)
    monkeypatch.chdir(folder)
    assert read_model_spec(folder) == here


def test_files_of_an_unknown_family_are_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Exact sizes from safetensors headers: no class is asked, and a head that is tied is counted once."""
    monkeypatch.setattr(general, "ask_transformers", lambda *_: pytest.fail("asked"))
    config = GPTNeoXConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, vocab_size=200
    )
    model: Any = GPTNeoXForCausalLM(config)
    model.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert spec.family == "gpt_neox"
    assert spec.num_parameters == sum(one.numel() for one in model.parameters())
    assert spec.checkpoint_format == "fp32"
    assert [spec.kv_elements(layer, 4) for layer in spec.layers] == [128] * 3
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        read_model_spec(tmp_path)


def test_without_transformers_the_fields_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(general, "ask_transformers", lambda *_: "transformers is not installed")
    for name, size in (
        ("zai-org--GLM-5", 744),
        ("MiniMaxAI--MiniMax-M2.5", 229),
        ("nvidia--MiniMax-M2.5-NVFP4", 229),
    ):
        spec = read_model_spec(written(tmp_path, MODELS[name]))
        assert spec.num_parameters / 1e9 == pytest.approx(size, rel=0.02)
        assert "as if layers were of the common form: transformers is not installed" in spec.notes[0]


def test_known_families_start_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(general, "ask_transformers", lambda *_: pytest.fail("asked"))
    for name in (
        "Qwen--Qwen3-VL-8B-Instruct",
        "moonshotai--Kimi-K2.5",
        "XiaomiMiMo--MiMo-7B-Base",
    ):
        read_model_spec(written(tmp_path, MODELS[name]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "t5"}, "an encoder with a decoder cannot be planned"),
        ({"model_type": "bert"}, "is an encoder, which cannot be planned"),
        ({"model_type": "nothing-known"}, "lacks 'num_hidden_layers'"),
        ({"model_type": ["llama"]}, "'model_type' is ["),
        ({"model_type": "new", "num_hidden_layers": [2, "3"], "hidden_size": 8}, "lacks 'vocab_size'"),
        ({"model_type": "new", "num_hidden_layers": "12"}, "'num_hidden_layers' is \"12\""),
        ({"model_type": "new", "num_hidden_layers": 10**9}, "at most 1024"),
        (
            {"model_type": "new", "num_hidden_layers": 2, "hidden_size": [8], "vocab_size": 9},
            "'hidden_size' is [8]",
        ),
    ],
)
def test_configs_that_cannot_be_planned(config: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        read_model_spec(written(tmp_path, {"config.json": config}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_families_by_alias_are_no_families_of_their_own():
    from apportion.catalog.families import SAME_LAYOUT

    assert not SAME_LAYOUT.keys() & FAMILIES.keys()
    assert set(SAME_LAYOUT.values()) <= FAMILIES.keys()
