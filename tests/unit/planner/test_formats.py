"""Weight formats: bytes and seconds by hand, and what the planner makes of several."""

from dataclasses import replace

import pytest
from exported import export
from planned import GIB, cluster, cpu, llama, workload
from plans import hand_plan

from apportion.asked.weights import parse_weights
from apportion.catalog.runnable import check_runnable
from apportion.cli.main import exit_code
from apportion.cost.estimate import plan_estimate
from apportion.cost.formats import Formats, matrix_bytes, parameters_bytes, vocab_row_bytes
from apportion.cost.memory import plan_capacity, shard_weights_bytes, stages_memory
from apportion.cost.roofline import ffn_column_s, head_row_s
from apportion.cost.shard import stage_shards
from apportion.planner.build import make_plan
from apportion.planner.explain.whatif import Changes, what_if
from apportion.planner.problem import activation_format, kv_format
from apportion.planner.verify.plan import verify
from apportion.types.cluster import Cluster
from apportion.types.errors import ClusterError, UsageError
from apportion.types.model import Parameters

INT8, INT4 = (Formats(weights=name, activations="bf16", kv="bf16") for name in ("int8", "int4"))
PART = Parameters(elements=640, rows=10, others=7)


def gpu(name, gib, host="local", **rates):
    rates = rates or {"bf16": 5e13, "int8": 1e14}
    return replace(cpu(name, gib, host=host), kind="cuda", mem_bytes_per_s=4e11, flops_per_s=rates)


def test_bytes_of_matrices_and_of_what_is_beside_them():
    assert matrix_bytes(640, 10, "bf16") == 1280
    assert matrix_bytes(640, 10, "int8") == 640 + 10 * 4
    assert matrix_bytes(640, 10, "int4") == 20 * 18  # 20 groups of 32: 16 bytes and a scale of 2
    assert matrix_bytes(33, 1, "int4") == 19  # 4.5 bits of each, rounded up
    assert parameters_bytes(PART, INT8) == 680 + 7 * 2
    assert parameters_bytes(PART, replace(INT8, activations="fp32")) == 680 + 7 * 4
    assert parameters_bytes(PART, INT4) == 360 + 7 * 2


def test_a_packed_table_is_not_shared():
    model = replace(llama(), hidden_size=64)
    both = {"has_embedding": True, "has_head": True}
    assert vocab_row_bytes(model, Formats(weights="bf16", activations="bf16", kv="bf16"), **both) == 128
    assert vocab_row_bytes(model, INT8, **both) == 68 + 68
    assert vocab_row_bytes(model, INT4, **both) == 68 + 36  # looked up in int8 rows
    assert vocab_row_bytes(model, Formats(weights="fp16", activations="fp32", kv="fp32"), **both) == 128 + 128
    assert vocab_row_bytes(replace(model, tied_embeddings=False), INT4, **both) == 68 + 36
    assert vocab_row_bytes(model, INT4, has_embedding=False, has_head=True) == 36


def test_a_shard_in_int8():
    model = llama(
        2, hidden=64
    )  # per KV head 40960 elements in 384 rows, 192 a column in 2, 128 norms in 128 rows
    stage = hand_plan(model, [[1]], [2], weight_format="bf16").stages[0]
    shard = stage_shards(model, replace(stage, weight_format="int8"))[0]
    layer = 8 * (40960 + 384 * 4) + 8192 * (192 + 2 * 4) + (128 * 4 + 128 * 2)
    assert shard_weights_bytes(model, shard) == 2 * layer + 128256 * (68 + 68) + 64 * 2


def test_seconds_in_int8():
    device = gpu("a", 1, bf16=1000.0, int8=2000.0)
    device = replace(device, mem_bytes_per_s=400.0)
    layer, model = llama(2, hidden=64).layers[0], llama(2, hidden=64)
    assert ffn_column_s(device, layer, 1, INT8) == (192 + 8) / 400
    assert ffn_column_s(device, layer, 100, INT8) == 2 * 192 * 100 / 2000
    assert ffn_column_s(device, layer, 100, INT4) == 2 * 192 * 100 / 1000  # turned into 16 bits first
    assert head_row_s(device, model, 2, INT4) == 2 * 64 * 2 / 1000
    assert device.rate("fp32") is None


def test_kv_and_links_do_not_depend_on_the_weights():
    plan = make_plan(llama(), cluster([gpu("a", 2), gpu("b", 2, "far")]), workload(), ("int8",))
    wide = [replace(stage, weight_format="bf16") for stage in plan.stages]
    memory = stages_memory(plan.model, plan.cluster, wide, plan_capacity(plan))
    for name, held in plan.memory.items():
        assert (held.kv_bytes, held.buffer_bytes) == (memory[name].kv_bytes, memory[name].buffer_bytes)
        assert held.weights_bytes < memory[name].weights_bytes
    assert plan_estimate(replace(plan, stages=tuple(wide))).link_s == plan.estimate.link_s


def test_activations():
    cards, processors = cluster([gpu("a", 8), cpu("b", 8)]), cluster([cpu("b", 8)])
    model = llama()
    assert activation_format(model, processors, ("bf16", "int8")) == "fp32"
    assert activation_format(model, cards, ("fp32", "bf16")) == "fp32"
    assert activation_format(model, cards, ("fp16", "int8")) == "fp16"
    assert activation_format(model, cards, ("int8",)) == "bf16"
    assert activation_format(replace(model, checkpoint_format="fp16"), cards, ("int4",)) == "fp16"
    assert activation_format(replace(model, checkpoint_format="fp32"), cards, ("int4",)) == "bf16"
    old = cluster([gpu("old", 8, fp16=1e13, int8=2e13)])
    assert activation_format(model, old, ("int8",)) == "fp16"


def test_each_stage_has_the_format_that_is_best_for_it():
    """The old card is slow in int8."""
    devices = [gpu("new", 0.6), gpu("old", 4, "far", fp16=5e13, bf16=5e13, int8=5e11)]
    plan = make_plan(llama(), cluster(devices), workload("throughput", 4), ("bf16", "int8"))
    assert {stage.weight_format for stage in plan.stages} == {"bf16", "int8"}
    assert plan.weight_formats == ("bf16", "int8")
    assert all(check.ok for check in verify(plan))
    wide = make_plan(llama(), cluster(devices), workload("throughput", 4), ("bf16",))
    assert plan.certificate.value < wide.certificate.value


def test_what_costs_nothing_is_wider():
    """Computing takes as long in both: fp32 is kept where there is room for it."""
    slow = replace(cpu("a", 8), flops_per_s={"fp32": 1e9, "int8": 1e9})
    formats = ("fp32", "int8")
    assert make_plan(llama(), cluster([slow]), workload(), formats).stages[0].weight_format == "fp32"
    tight = replace(slow, memory_bytes=3 * GIB)
    assert make_plan(llama(), cluster([tight]), workload(), formats).stages[0].weight_format == "int8"


def test_a_device_without_any_of_the_formats_is_refused():
    with pytest.raises(
        ClusterError, match="device a has no flops_per_s for 'fp32' or 'fp16'; it has bf16, int8"
    ):
        make_plan(llama(), cluster([gpu("a", 8)]), workload(), ("fp32", "fp16"))


def test_changes_keep_the_formats():
    plan = make_plan(llama(), cluster([gpu("a", 4), gpu("b", 4)]), workload(), ("bf16", "int8"))
    assert what_if(plan, Changes(remove=("b",))).weight_formats == ("bf16", "int8")


def test_weights_as_typed():
    assert parse_weights("int8, auto", llama(), "bf16") == ("bf16", "int8")
    assert parse_weights("int4", llama(), "bf16") == ("int4",)
    with pytest.raises(UsageError, match="unknown weight format 'int5'; did you mean int8 or int4"):
        parse_weights("int5", llama(), "bf16")


def test_the_command_chooses_among_formats(capfd):
    devices = "rtx-3060-12gb + gtx-1080-ti"
    assert exit_code(["plan", "llama-3.1-8b", "--devices", devices, "--weights", "fp16,int8"]) == 0
    assert "llama-3.1-8b in int8" in capfd.readouterr().out


def test_int4_is_for_other_engines():
    plan = make_plan(llama(), cluster([gpu("a", 8)]), workload(), ("int4",))
    with pytest.raises(
        UsageError, match="int4 weights can be planned and exported to other engines, but not run"
    ):
        check_runnable(plan)
    notes = " ".join(export(plan, "vllm").notes)
    assert "the nearest to the plan's int4 weights is an AWQ or GPTQ checkpoint" in notes
    assert "Q4_0 file (4.5 bits)" in " ".join(export(plan, "llama.cpp").notes)


def test_keys_and_values():
    cards, processors = cluster([gpu("a", 8), cpu("b", 8)]), cluster([cpu("b", 8)])

    def held(where: Cluster, names: tuple[str, ...], asked: str | None = None) -> str:
        activations = activation_format(llama(), where, names)
        return kv_format(where, replace(workload(), kv_format=asked), names, activations)

    assert held(processors, ("fp32",)) == held(processors, ("fp32", "int8")) == "fp32"
    assert held(processors, ("bf16", "int8")) == "bf16"
    assert held(processors, ("fp16",)) == held(processors, ("int8",)) == "fp16"
    assert held(processors, ("fp16",), "fp32") == "fp32"
    assert held(processors, ("fp32",), "bf16") == "bf16"
    assert held(cards, ("fp16",)) == "fp16"
    assert held(cards, ("int8",)) == "bf16"


def test_narrow_keys_and_values_take_half_the_memory_and_time():
    """On CPUs, which widen them in registers."""
    processors, model = cluster([cpu("b", 8)]), llama()
    wide, narrow = (
        make_plan(model, processors, replace(workload(), kv_format=name), ("fp32",))
        for name in ("fp32", "bf16")
    )
    assert all(check.ok for check in verify(narrow))
    assert (wide.kv_format, narrow.kv_format) == ("fp32", "bf16")
    assert narrow.memory["b"].kv_bytes * 2 == wide.memory["b"].kv_bytes
    assert narrow.memory["b"].workspace_bytes == wide.memory["b"].workspace_bytes
    assert narrow.estimate.tpot_s < wide.estimate.tpot_s


def test_gpus_keys_and_values_are_as_their_hidden_states():
    asked = replace(workload(), kv_format="fp32")
    with pytest.raises(UsageError, match=r"--kv-format fp32 is for CPUs alone; beside GPUs .* in bf16"):
        make_plan(llama(), cluster([gpu("a", 8)]), asked, ("bf16",))
    same = make_plan(llama(), cluster([gpu("a", 8)]), replace(asked, kv_format="bf16"), ("bf16",))
    assert same.kv_format == "bf16"
