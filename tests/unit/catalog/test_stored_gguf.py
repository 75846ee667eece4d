"""Quantised GGUF files are planned by their bytes: written with llama.cpp's own package, counted by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from exported import export
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from planned import cluster, cpu, workload
from plans import hand_plan
from unit.catalog.test_catalog_gguf import ATTENTION, FFN, NORMS, Tensors, metadata, write

from apportion.asked.weights import chosen_formats, parse_weights
from apportion.catalog.gguf_file import read_gguf
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.runnable import check_runnable
from apportion.cli.main import exit_code
from apportion.cost.formats import stored_bytes, weight_formats
from apportion.cost.memory import shard_weights_bytes
from apportion.cost.roofline import Step, attention_s, ffn_column_s, head_row_s
from apportion.cost.shard import stage_formats, stage_shards
from apportion.cost.statements import replicated_bytes, whole_model_bytes
from apportion.planner.build import make_plan
from apportion.planner.explain.whatif import Changes, what_if
from apportion.planner.plan_file import parse_plan, plan_json
from apportion.planner.stages.axes import ffn_granule
from apportion.planner.verify.plan import verify
from apportion.types.errors import UsageError
from apportion.types.model import ModelSpec

F32, F16, Q4_K, Q6_K, Q8_0 = (
    getattr(GGMLQuantizationType, name) for name in ("F32", "F16", "Q4_K", "Q6_K", "Q8_0")
)
Q4_K_M = 15
H, HEADS, KV, D, FF, V, LAYERS = 256, 4, 2, 64, 1024, 300, 4
Type = GGMLQuantizationType


def mixed(name: str) -> Type:
    """As Q4_K_M mixes: more bits for the output, and for values and down projections of some layers."""
    if name.endswith("_norm.weight") or name == "rope_freqs.weight":
        return F32
    more = name in ("output.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight", "blk.3.ffn_down.weight")
    return Q6_K if more else Q4_K


def shapes(*, tied: bool) -> dict[str, tuple[int, ...]]:
    """Rows first, as numpy has them."""
    layer = {
        "attn_norm.weight": (H,),
        "ffn_norm.weight": (H,),
        "attn_q.weight": (HEADS * D, H),
        "attn_k.weight": (KV * D, H),
        "attn_v.weight": (KV * D, H),
        "attn_output.weight": (H, HEADS * D),
        "ffn_gate.weight": (FF, H),
        "ffn_up.weight": (FF, H),
        "ffn_down.weight": (H, FF),
    }
    ends = {"token_embd.weight": (V, H), "output_norm.weight": (H,), "rope_freqs.weight": (D // 2,)}
    blocks = {f"blk.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()}
    return ends | blocks | ({} if tied else {"output.weight": (V, H)})


def tiny(
    folder: Path,
    kind: Callable[[str], Type] = mixed,
    *,
    tied: bool = False,
    file_type: int | None = Q4_K_M,
) -> Path:
    path = folder / "tiny.Q4_K_M.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(H)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    if file_type is not None:
        writer.add_file_type(file_type)
    for name, shape in shapes(tied=tied).items():
        block, block_bytes = GGML_QUANT_SIZES[kind(name)]
        stored = np.zeros((*shape[:-1], shape[-1] // block * block_bytes), dtype=np.uint8)
        writer.add_tensor(name, stored, raw_dtype=kind(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bytes_in_file(path: Path) -> int:
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


def q4(elements: int) -> int:
    return elements // 256 * 144


def q6(elements: int) -> int:
    return elements // 256 * 210


def plan_of(model: ModelSpec, num_devices: int = 1, gib: float = 1):
    devices = [cpu(name, gib) for name in "abcd"[:num_devices]]
    return make_plan(model, cluster(devices), workload(), (model.stored.format,))


def shares(model: ModelSpec, heads: tuple[int, ...], columns: tuple[int, ...], rows: tuple[int, ...]):
    """The weights of each member of one group."""
    (stage,) = plan_of(model).stages
    split = replace(
        stage.split,
        device_ids=tuple("ab"),
        q_heads=tuple(2 * held for held in heads),
        kv_heads=heads,
        ffn_columns=columns,
        vocab_rows=rows,
    )
    return [shard_weights_bytes(model, shard) for shard in stage_shards(model, replace(stage, split=split))]


def test_bytes_by_hand(tmp_path: Path):
    model = read_model_spec(tiny(tmp_path))
    assert model.stored.format == "q4_k_m"
    first, second, third, last = model.layers
    attention = [q4(2 * H * H + 2 * KV * D * H), q4(2 * H * H + KV * D * H) + q6(KV * D * H)]
    assert second.per_kv_head.stored_bytes == attention[0] // KV
    assert first.per_kv_head.stored_bytes == attention[1] // KV
    assert second == third != last
    assert second.per_ffn_column.stored_bytes == q4(3 * H * FF) // FF
    assert last.per_ffn_column.stored_bytes == (q4(2 * H * FF) + q6(H * FF)) // FF
    assert second.replicated.stored_bytes == 2 * H * 4
    assert model.stored.embedding_row_bytes == q4(H)
    assert model.stored.head_row_bytes == q6(H)
    assert model.stored.outside_bytes == (H + D // 2) * 4


@pytest.mark.parametrize("tied", [False, True])
def test_an_undivided_plan_holds_what_the_file_holds(tied: bool, tmp_path: Path):
    path = tiny(tmp_path, tied=tied)
    model = read_model_spec(path)
    plan = plan_of(model)
    assert plan.memory["a"].weights_bytes == stored_bytes(model) == bytes_in_file(path)
    assert all(check.ok for check in verify(plan))


def test_stages_hold_their_layers_tensors(tmp_path: Path):
    model = read_model_spec(path := tiny(tmp_path, tied=True))
    plan = hand_plan(model, [[1], [1]], [3, 1], weight_format="q4_k_m", activation_format="fp16")
    first, last = plan.stages
    memory = [plan.memory[stage.split.device_ids[0]] for stage in plan.stages]
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    layers = [
        sum(size for name, size in sizes.items() if name.startswith(f"blk.{number}."))
        for number in range(LAYERS)
    ]
    table = sizes["token_embd.weight"]
    assert memory[0].weights_bytes == sum(layers[: first.layer_stop]) + table
    outside = sizes["output_norm.weight"] + sizes["rope_freqs.weight"]
    assert memory[1].weights_bytes == sum(layers[last.layer_start :]) + table + outside
    held = sum(one.weights_bytes + one.kv_bytes for one in plan.memory.values())
    assert held == whole_model_bytes(plan) + replicated_bytes(plan)
    assert parse_plan(plan_json(plan), "plan") == plan


def test_groups_cut_whole_blocks(tmp_path: Path):
    model = read_model_spec(path := tiny(tmp_path))
    assert ffn_granule(model) == 256  # super-blocks of 256 elements, along the inputs of ffn_down
    one, other = shares(model, (1, 1), (256, 768), (75, 225))
    assert (
        one + other
        == bytes_in_file(path)
        + LAYERS * model.layers[1].stored_block_bytes
        + (LAYERS * 2 * H + H + D // 2) * 4
    )  # norms on both
    # A KV head's queries are 128 inputs of attn_output, half a block: one more of each of its rows.
    assert model.layers[1].stored_block_bytes == q4(256) * H


def test_columns_that_blocks_do_not_divide_are_counted_with_a_block_more(tmp_path: Path):
    tensors: Tensors = [
        ("token_embd.weight", (H, V)),
        *((f"blk.{n}.{name}", size) for n in range(2) for name, size in ATTENTION + NORMS + FFN),
        ("output_norm.weight", (H,)),
    ]
    sizes = {"embedding_length": 64, "block_count": 2, "attention.head_count_kv": 4}
    tensors = [(name, tuple(64 if size == H else size for size in shape)) for name, shape in tensors]
    kinds = {name: 8 if shape[0] % 32 == 0 else 1 for name, shape in tensors}  # 120 columns stay in f16
    model = read_model_spec(write(tmp_path / "q8.gguf", metadata("llama", **sizes), tensors, kinds))
    assert model.stored.format == "q8_0"
    assert ffn_granule(model) == 8
    assert model.layers[0].stored_block_bytes == 0  # two query heads of 16 are a block of 32


def test_names(tmp_path: Path):
    assert read_model_spec(tiny(tmp_path, file_type=None)).stored.format == "q4_k"
    assert read_model_spec(tiny(tmp_path, file_type=1)).stored.format == "q4_k"
    few = read_model_spec(tiny(tmp_path, lambda name: Q8_0 if "ffn" in name and "norm" not in name else F32))
    assert few.stored is not None
    assert read_model_spec(tiny(tmp_path, lambda _: F16)).stored is None


def test_seconds_are_those_of_the_bytes(tmp_path: Path):
    model = read_model_spec(tiny(tmp_path))
    device = replace(cpu("a", 1), mem_bytes_per_s=1e9, flops_per_s={"fp32": 1e12, "fp16": 4e12})
    formats = stage_formats(plan_of(model).stages[0])
    layer, step = model.layers[1], Step(sequences=1, new_tokens=1, start_tokens=99, sampled_rows=1)
    assert ffn_column_s(device, layer, 1, formats) == q4(3 * H * FF) / FF / 1e9
    assert ffn_column_s(device, layer, 10**6, formats) == 2 * 3 * H * 10**6 / 4e12  # widened to 16 bits
    assert head_row_s(device, model, 1, formats) == q6(H) / 1e9
    weights = q4(2 * H * H + 2 * KV * D * H) + 2 * H * 4
    assert attention_s(device, model, layer, KV, step, formats) == (weights + 2 * D * KV * 100 * 2) / 1e9
    assert device.rate("q4_k_m") == 4e12
    assert replace(device, flops_per_s={"q4_k_m": 9e12}).rate("q4_k_m") == 9e12
    assert replace(device, flops_per_s={"int8": 1e12}).rate("q4_k_m") is None


def test_formats_that_are_asked_for(tmp_path: Path):
    model = read_model_spec(tiny(tmp_path))
    machine = cluster([cpu("a", 1)])
    assert chosen_formats(model, machine, None) == ("q4_k_m",)
    assert parse_weights("int4,auto,bf16", model, "q4_k_m") == ("bf16", "q4_k_m", "int4")
    assert 4.5 < weight_formats(model)["q4_k_m"] < 6.6
    with pytest.raises(UsageError, match="unknown weight format 'q5_k_m'; did you mean q4_k_m"):
        parse_weights("q5_k_m", model, "q4_k_m")


def test_plans_of_files_are_for_other_engines(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    path, file = tiny(tmp_path), tmp_path / "plan.json"
    card = ["cards=", "rtx-3060-12gb", ""][1]
    assert exit_code(["plan", str(path), "--devices", card, "--context", "512", "--out", str(file)]) == 0
    assert "in q4_k_m" in capfd.readouterr().out
    plan = parse_plan(file.read_text(), str(file))
    assert plan.activation_format == "fp16"
    with pytest.raises(UsageError, match=r"q4_k_m weights can be planned and exported .* but not run"):
        check_runnable(plan)
    assert exit_code(["export", str(file), "--to", "llama.cpp"]) == 0
    script = capfd.readouterr().out
    assert script.startswith(
        "# MODEL: a GGUF file of tiny.Q4_K_M in q4_k_m\nMODEL=${MODEL:-./tiny.Q4_K_M.gguf}\n"
    )
    assert "as in the GGUF file" not in script
    for engine, files in [("vllm", "a checkpoint"), ("exllamav3", "an EXL3 checkpoint")]:
        assert any(
            f"q4_k_m GGUF file as it is: give it {files}" in note for note in export(plan, engine).notes
        )


def test_llama_3_1_8b(tmp_path: Path):
    """bartowski/Meta-Llama-3.1-8B-Instruct-GGUF, Q4_K_M: a file of 4,920,739,232 bytes, of which 4685 MiB in 292
    tensors (both figures as others report them; the rest is vocabulary). Types as llama.cpp's quantiser mixes them."""
    layers, hidden, kv_width, ffn, vocabulary = 32, 4096, 1024, 14336, 128256

    def more_bits(layer: int) -> bool:
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2

    tensors: Tensors = [("token_embd.weight", (hidden, vocabulary)), ("output.weight", (hidden, vocabulary))]
    tensors += [("output_norm.weight", (hidden,)), ("rope_freqs.weight", (64,))]
    for layer in range(layers):
        widths = {"attn_q": (hidden, hidden), "attn_k": (hidden, kv_width), "attn_v": (hidden, kv_width)}
        widths |= {"attn_output": (hidden, hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
        widths |= {"ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn), "ffn_down": (ffn, hidden)}
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in widths.items()]
    kinds = {name: int(Q4_K) for name, _ in tensors} | {"output.weight": int(Q6_K)}
    for layer in filter(more_bits, range(layers)):
        kinds |= {f"blk.{layer}.{name}.weight": int(Q6_K) for name in ("attn_v", "ffn_down")}
    sizes = {"embedding_length": hidden, "block_count": layers, "feed_forward_length": ffn}
    sizes |= {"attention.head_count": 32, "attention.head_count_kv": 8, "attention.key_length": 128}
    described = metadata("llama", **sizes, context_length=131072) | {"general.file_type": Q4_K_M}
    path = write(tmp_path / "llama.gguf", described, tensors, kinds)
    assert len(read_gguf(path).tensors) == 292
    size = stored_bytes(read_model_spec(path))
    assert size == read_gguf(path).tensor_bytes
    assert size // 2**20 == 4685
    assert 0 < 4_920_739_232 - size < 8e6


def test_gpt_oss_20b(tmp_path: Path):
    """lmstudio-community/gpt-oss-20b-GGUF, MXFP4: a file of 12,109,565,632 bytes as others report it, vocabulary
    among them. Experts in MXFP4, other matrices in Q8_0, the rest in F32."""
    layers, hidden, experts, vocabulary = 24, 2880, 32, 201088
    expert = (hidden, hidden, experts)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (hidden, 4096),
        "attn_k": (hidden, 512),
        "attn_v": (hidden, 512),
        "attn_output": (4096, hidden),
        "attn_norm": (hidden,),
        "post_attention_norm": (hidden,),
        "attn_sinks": (64,),
        "ffn_gate_inp": (hidden, experts),
        "ffn_gate_exps": expert,
        "ffn_up_exps": expert,
        "ffn_down_exps": expert,
    }
    biases = {"attn_q": 4096, "attn_k": 512, "attn_v": 512, "attn_output": hidden}
    stacked = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), (hidden, experts))
    tensors: Tensors = [("token_embd.weight", (hidden, vocabulary)), ("output.weight", (hidden, vocabulary))]
    tensors.append(("output_norm.weight", (hidden,)))
    for layer in range(layers):
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
        tensors += [(f"blk.{layer}.{name}.bias", (size,)) for name, size in biases.items()]
        tensors += [(f"blk.{layer}.{name}.bias", shape) for name, shape in stacked.items()]
        tensors.append((f"blk.{layer}.ffn_gate_inp.bias", (experts,)))

    def kind(name: str) -> Type:
        if name.endswith("bias") or "gate_inp" in name:
            return F32
        return Type.MXFP4 if "exps" in name else Q8_0

    sizes = {"embedding_length": hidden, "block_count": layers, "feed_forward_length": hidden}
    sizes |= {"attention.head_count": 64, "attention.head_count_kv": 8, "attention.key_length": 64}
    sizes |= {"expert_count": experts, "expert_used_count": 4, "expert_feed_forward_length": hidden}
    described = metadata("gpt-oss", **sizes, context_length=131072, attention__sliding_window=128)
    kinds = {name: int(kind(name)) for name, _ in tensors}
    path = write(tmp_path / "gpt-oss.gguf", described | {"general.file_type": 38}, tensors, kinds)
    model = read_model_spec(path)
    assert model.stored is not None
    assert model.stored.format == "mxfp4"
    assert stored_bytes(model) == read_gguf(path).tensor_bytes
    assert 0 < 12_109_565_632 - stored_bytes(model) < 2e7


def test_changes_keep_what_the_files_hold(tmp_path: Path):
    plan = plan_of(read_model_spec(tiny(tmp_path)))
    wider = what_if(plan, Changes(weight_formats=("fp32",)))
    assert wider.memory["a"].weights_bytes > plan.memory["a"].weights_bytes
    back = what_if(wider, Changes(weight_formats=("q4_k_m",)))
    assert back.memory["a"].weights_bytes == plan.memory["a"].weights_bytes
