"""Exports for machines that people have: what an engine can execute fits, by arithmetic that is done here by hand."""

from dataclasses import replace
from functools import cache
from math import isclose

import pytest
from exported import export

from apportion.asked.engine_planner import EnginePlanner
from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.gpus import COMPUTE_CAPABILITIES, gpus
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import plan_memory
from apportion.export.engines import TRANSLATIONS
from apportion.export.price import decode_s
from apportion.export.within import fitted, with_prefill_steps
from apportion.planner.build import make_plan
from apportion.planner.verify.plan import verify
from apportion.types.errors import PlanError
from apportion.types.workload import Workload

GIB = 2**30


@cache
def planned(model, weights, devices, context):
    workload = Workload(
        prompt_tokens=512,
        output_tokens=128,
        concurrency=1,
        max_context_tokens=context,
        objective="latency",
    )
    cluster = parse_devices(devices, tuple)
    return make_plan(read_model_spec(resolve_model(model, weights=False)), cluster, workload, (weights,))


def counts(plan, engine):
    return [stage.num_layers for stage in export(plan, engine).division.stages]


def words(plan, engine):
    return export(plan, engine).launches[-1].command


def option(plan, engine, name):
    command = words(plan, engine)
    return command[command.index(name) + 1]


@pytest.fixture
def two_cards():
    """The plan is an uneven group, of which an even half is too much for the smaller card."""
    return planned("qwen2.5-14b", "bf16", "rtx-3080-12gb:9GiB + rtx-3090:22GiB", 8192)


@pytest.mark.parametrize(
    ("engine", "most"), [("vllm", 12), ("sglang", 12), ("exllamav3", 12), ("accelerate", 13)]
)
def test_a_pipeline_where_an_even_group_does_not_fit(two_cards, engine, most):
    """A layer is 275.3 M parameters in 2 bytes, 0.513 GiB, and 8192 tokens × 2 × 8 × 128 × 2 bytes of cache, 0.031; a
    table 152,064 × 5120 × 2 bytes, 1.45. Of 9 GiB that leaves (9 − 1.45)/0.544 = 13.9 layers, with vLLM's 0.5 GiB of
    buffers 12.96, with SGLang's 0.625 12.7, exllamav3's 0.5 12.96 and accelerate's 0.25 13.4; what a step computes in
    takes no whole layer more. The other has (22 − 1.45 − 0.625)/0.544 = 36.6."""
    assert two_cards.stages[0].split.size == 2
    assert counts(two_cards, engine) == [most, 48 - most]
    fits = export(two_cards, engine).needed_bytes
    assert fits["rtx-3080-12gb"] <= 9 * GIB
    assert fits["rtx-3090"] <= 22 * GIB


def test_cards_are_numbered_as_nvidia_smi_does():
    """The best of three cards are the second and third: CUDA would take the first two of its own order for them."""
    devices = "rig: rtx-3060-12gb + rtx-3090 + rtx-4090; link rig-rig 0.8GB/s 30us"
    exported = export(planned("llama-3.3-70b", "int4", devices, 16384), "vllm")
    variables = exported.launches[0].variables
    assert variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert set(variables["CUDA_VISIBLE_DEVICES"].split(",")) == {"1", "2"}
    assert any("2 is rtx-4090 on rig, 1 is rtx-3090 on rig" in note for note in exported.notes)


def test_the_export_is_the_best_that_the_engine_can_do():
    """A pipeline over the two fast cards comes to 17.9 tokens/s, in proportion to uneven shares of three cards 14.2."""
    plan = planned("llama-3.3-70b", "int4", "rig: rtx-3060-12gb + rtx-3090 + rtx-4090", 16384)
    made = fitted(plan, "vllm", EnginePlanner())
    assert made.estimate.tokens_per_s >= 17.9
    assert len({stage.split.size for stage in made.stages}) == 1
    assert [check for check in verify(made) if not check.ok] == []


def test_one_card_and_system_memory():
    """A layer is 487.5 M parameters in 4.5 bits, 0.2555 GiB, and 16384 × 4096 bytes of cache, 0.0625. The card has
    12 GiB less 0.86 of the driver's, less 512 × (2 × 16384 + 4 × 151,936) bytes of llama.cpp's compute buffer, 0.31,
    less the output, 151,936 × 5120 in 4.5 bits, 0.41: 10.42/0.318 = 32.8. The others stay with the embedding in system
    memory. A token reads 32 layers on each side: 8.9 GB at 313 GB/s and at 35.8 GB/s are 0.28 s."""
    plan = planned("qwen3-32b", "int4", "tower: rtx-3060-12gb + cpu:48GiB", 16384)
    assert plan.stages[0].split.size == 2
    exported = export(plan, "llama.cpp")
    assert [stage.split.device_ids for stage in exported.division.stages] == [("cpu",), ("rtx-3060-12gb",)]
    assert option(plan, "llama.cpp", "--n-gpu-layers") == str(32 + 1)
    assert isclose(
        decode_s(fitted(plan, "llama.cpp", EnginePlanner()), exported.division), 0.28, rel_tol=0.02
    )
    assert exported.needed_bytes["rtx-3060-12gb"] <= 12 * GIB
    assert "PARAMETER num_gpu 33\n" in export(plan, "ollama").files["Modelfile"]


def test_llama_cpp_s_own_sizes_are_left_where_memory_allows_them():
    plan = planned("qwen3-32b", "int4", "tower: rtx-3060-12gb + cpu:48GiB", 16384)
    assert option(plan, "llama.cpp", "--ubatch-size") == "512"
    for name in ("--cache-type-k", "--cache-type-v"):
        assert option(plan, "llama.cpp", name) == "f16"


@pytest.fixture(scope="module")
def experts():
    return planned("qwen3-235b-a22b", "int4", "tower: rtx-4090 + cpu:160GiB", 8192)


def test_experts_in_system_memory_and_the_rest_on_the_card(experts):
    """Of 94 layers each has experts of 128 × 3 × 4096 × 1536 in 4.5 bits, 1.266 GiB, and 71.8 M other parameters, 37.6
    MiB, with 8192 × 2048 bytes of cache, 16 MiB: 4.92 GiB for all. The card has 24 GiB less 1.22 of the driver's, 0.30
    of compute buffer, 0.33 of output: (22.15 − 4.92)/1.266 = 13.6 layers' experts."""
    command = words(experts, "llama.cpp")
    assert option(experts, "llama.cpp", "--n-gpu-layers") == "95"
    assert option(experts, "llama.cpp", "--n-cpu-moe") == str(94 - 13)
    assert "--override-tensor" not in command
    needed = export(experts, "llama.cpp").needed_bytes
    assert needed["rtx-4090"] <= 24 * GIB < needed["rtx-4090"] + round(1.266 * GIB)
    assert needed["cpu"] <= 160 * GIB
    assert needed["cpu"] >= 81 * round(1.2656 * GIB)


def test_ollama_gets_the_experts_through_llama_server_s_environment(experts):
    exported = export(experts, "ollama")
    assert exported.launches[0].variables["LLAMA_ARG_N_CPU_MOE"] == "81"
    assert "PARAMETER num_gpu 95\n" in exported.files["Modelfile"]


@pytest.mark.parametrize(
    ("engine", "name"), [("vllm", "--max-num-batched-tokens"), ("sglang", "--chunked-prefill-size")]
)
def test_prompts_are_taken_in_as_the_engine_does_and_not_by_our_chunk(engine, name):
    """A chunk of 256 is the most that we plan; these engines take 2048 unless told otherwise."""
    plan = planned("llama-3.1-8b", "bf16", "rtx-3090", 4096)
    assert plan.chunk_tokens <= 256
    assert option(plan, engine, name) == "2048"
    assert not any(name in note for note in export(plan, engine).notes)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_prompts_are_taken_in_at_once_as_far_as_memory_holds(engine):
    """The most of 2048, 1024, … that fits: with twice the tokens the card would be too small."""
    plan = fitted(planned("llama-3.1-8b", "bf16", "rtx-3090", 4096), engine, EnginePlanner())
    (device,), (used,) = plan.cluster.devices, plan_memory(plan).values()
    wants = {
        chunk: plan_memory(replace(plan, chunk_tokens=chunk))[device.id].total_bytes
        for chunk in (plan.chunk_tokens, 512, 1024, 2048)
    }
    assert used.total_bytes < wants[512] < wants[1024] < wants[2048]
    for chunk in (512, 1024):
        held = replace(device, memory_bytes=wants[2 * chunk] - 1)
        tight = with_prefill_steps(replace(plan, cluster=replace(plan.cluster, devices=(held,))), engine)
        assert tight.chunk_tokens == chunk
        assert tight.memory[device.id].total_bytes == wants[chunk]
        assert any("default of 2048" in note for note in TRANSLATIONS[engine](tight).notes)
    held = replace(device, memory_bytes=used.total_bytes)
    full = replace(plan, cluster=replace(plan.cluster, devices=(held,)))
    assert with_prefill_steps(full, engine) == full


def test_windows_hold_what_is_taken_in_at_once_beside_them():
    """gemma-3-1b: 26 layers, of which 22 see 512 tokens, with one KV head of 256 elements, 2 × 256 × 2 bytes a token;
    vLLM's cache of each has a window and the tokens of a step, 2048, of a context of 8192."""
    plan = planned("gemma-3-1b", "bf16", "rtx-3090", 8192)
    made = with_prefill_steps(fitted(plan, "vllm", EnginePlanner()), "vllm")
    assert made.chunk_tokens == 2048
    assert made.memory["rtx-3090"].kv_bytes == (4 * 8192 + 22 * (512 + 2048)) * 1024


@pytest.mark.parametrize(
    ("engine", "card"), [("vllm", "gtx-1080-ti"), ("vllm", "p100-16gb"), ("sglang", "v100-pcie-32gb")]
)
def test_cards_that_are_too_old_for_an_engine_are_refused_or_left_out(engine, card):
    """Compute capability: GTX 1080 Ti 6.1, P100 6.0, V100 7.0, RTX 3090 8.6."""
    with pytest.raises(PlanError, match=rf"{card} has less; use llama\.cpp"):
        export(planned("llama-3.2-1b", "fp16", card, 1024), engine)
    exported = export(planned("llama-3.2-1b", "fp16", f"{card} + rtx-3090", 1024), engine)
    assert {name for stage in exported.division.stages for name in stage.split.device_ids} == {"rtx-3090"}
    assert any(f"{card} has less and is left out" in note for note in exported.notes)
    assert export(planned("llama-3.2-1b", "fp16", card, 1024), "llama.cpp")


def test_volta_is_new_enough_for_vllm():
    assert export(planned("llama-3.2-1b", "fp16", "v100-32gb", 1024), "vllm")


def test_each_architecture_of_nvidia_has_a_compute_capability():
    assert {gpu.architecture for gpu in gpus().values() if gpu.kind == "cuda"} == set(COMPUTE_CAPABILITIES)
