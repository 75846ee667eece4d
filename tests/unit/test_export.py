"""Plans in other engines' terms: the commands word for word, and what is said of that which they cannot express."""

import json
import subprocess
from dataclasses import replace

import pytest
from command import apportion
from planned import cluster, cpu, llama
from plans import hand_plan

from apportion.cost.estimate import estimate, plan_estimate
from apportion.export.engines import ENGINES, export
from apportion.export.regroup import apportion_units
from apportion.planner.plan_file import write_plan
from apportion.types.errors import PlanError

COMMON_VLLM = (
    "--dtype bfloat16 --max-model-len 2048 --max-num-seqs 4 --max-num-batched-tokens 259 --block-size 4 "
    "--num-gpu-blocks-override 2049"
)
COMMON_SGLANG = (
    "--dtype bfloat16 --context-length 2048 --max-running-requests 4 --chunked-prefill-size 256 "
    "--max-total-tokens 8192"
)
COMMON_LLAMA_CPP = "--ctx-size 8192 --parallel 4 --ubatch-size 259 --cache-type-k bf16 --cache-type-v bf16"


def gpu(name, ordinal, gib=8.0, speed=1.0, host="local"):
    return replace(
        cpu(name, gib, host=host),
        kind="cuda",
        torch_device=f"cuda:{ordinal}",
        mem_bytes_per_s=4e11 * speed,
        flops_per_s={"bf16": 5e13 * speed},
        layer_overhead_s=3e-5,
        step_overhead_s=1e-4,
    )


def plan_of(groups, layers, devices):
    plan = hand_plan(
        llama(sum(layers)),
        groups,
        layers,
        devices=devices,
        weight_format="bf16",
        max_context_tokens=2048,
        chunk_tokens=256,
    )
    workload = replace(plan.workload, prompt_tokens=512, output_tokens=128)
    return replace(plan, cluster=cluster(devices), workload=workload)


@pytest.fixture
def pipeline():
    return plan_of([[1], [1]], [8, 4], [gpu("big", 1, speed=2), gpu("small", 0)])


@pytest.fixture
def uneven():
    return plan_of([[3, 1]], [12], [gpu("big", 0, speed=2), gpu("small", 1)])


@pytest.fixture
def mixed():
    return plan_of([[1, 1], [1]], [7, 5], [gpu("a", 0), gpu("b", 1), gpu("c", 2)])


@pytest.fixture
def with_cpu():
    return plan_of([[1], [1], [1]], [6, 4, 2], [gpu("a", 0), cpu("laptop", 8), gpu("b", 1)])


@pytest.fixture
def hosts():
    devices = [gpu("a", 0, host="pc"), gpu("b", 3, host="old"), cpu("c", 8, host="nas")]
    return plan_of([[1], [1], [1]], [5, 4, 3], devices)


def shells(plan, engine):
    return [launch.shell() for launch in export(plan, engine).launches]


def notes(plan, engine):
    return "\n".join(export(plan, engine).notes)


def test_a_pipeline_is_the_same_division_in_vllm_and_sglang(pipeline):
    assert shells(pipeline, "vllm") == [
        'CUDA_VISIBLE_DEVICES=1,0 VLLM_PP_LAYER_PARTITION=8,4 vllm serve "$MODEL" '
        f"--pipeline-parallel-size 2 --tensor-parallel-size 1 {COMMON_VLLM}"
    ]
    assert shells(pipeline, "sglang") == [
        "CUDA_VISIBLE_DEVICES=1,0 SGLANG_PP_LAYER_PARTITION=8,4 python -m sglang.launch_server "
        f'--model-path "$MODEL" --pp-size 2 --tp-size 1 {COMMON_SGLANG} --pp-max-micro-batch-size 2'
    ]
    for engine in ("vllm", "sglang"):
        exported = export(pipeline, engine)
        assert exported.division.stages == pipeline.stages
        assert exported.notes[-1].endswith("for the plan (+0%)")


def test_llama_cpp_counts_the_output_as_one_more_layer(pipeline):
    assert shells(pipeline, "llama.cpp") == [
        'CUDA_VISIBLE_DEVICES=1,0 llama-server --model "$MODEL" --n-gpu-layers 13 --split-mode layer '
        f"--tensor-split 8,5 {COMMON_LLAMA_CPP}"
    ]
    assert "decodes one batch at a time" in notes(pipeline, "llama.cpp")
    assert "embedding table stays in the memory of local's CPU" in notes(pipeline, "llama.cpp")


def test_llama_cpp_s_own_rule_puts_every_layer_where_the_plan_has_it():
    """By load_tensors: layer i is on the first device whose running share exceeds i / (num_layers + 1)."""
    plan = plan_of([[1], [1], [1]], [7, 13, 3], [gpu("a", 0), gpu("b", 1), gpu("c", 2)])
    words = export(plan, "llama.cpp").launches[0].command
    shares = [int(share) for share in words[words.index("--tensor-split") + 1].split(",")]
    for stage, share_stop in zip(plan.stages, (sum(shares[: i + 1]) for i in range(3)), strict=True):
        layers = range(stage.layer_start, stage.layer_stop + stage.has_head)
        assert all(layer / 24 < share_stop / sum(shares) for layer in layers)
        if not stage.has_head:
            assert stage.layer_stop / 24 >= share_stop / sum(shares)


def test_uneven_shares_survive_only_where_the_engine_takes_a_ratio(uneven):
    assert "--split-mode tensor --tensor-split 6,2" in shells(uneven, "llama.cpp")[0]
    assert export(uneven, "llama.cpp").division.stages == uneven.stages
    assert "VLLM_PP_LAYER_PARTITION=9,3" in shells(uneven, "vllm")[0]
    assert "vLLM cannot share layers as planned: stages of 2 devices become single devices" in notes(
        uneven, "vllm"
    )
    exllama = shells(uneven, "exllamav3")[0]
    assert exllama.startswith('CUDA_VISIBLE_DEVICES=0,1 python examples/chat.py -m "$MODEL" -gs ')
    assert exllama.endswith(" -tp -cs 8192 -ambs 4")
    limits = [float(size) for size in exllama.split("-gs ")[1].split()[0].split(",")]
    for device_id, limit in zip(("big", "small"), limits, strict=True):
        assert 0 <= limit - uneven.memory[device_id].engine_bytes / 2**30 < 0.011


def test_an_even_group_stays_a_group_where_that_is_faster():
    fast = cluster([gpu("a", 0), gpu("b", 1)])
    plan = plan_of([[1, 1]], [12], fast.devices)
    plan = replace(
        plan, cluster=replace(fast, links=(replace(fast.links[0], latency_s=5e-6, bytes_per_s=5e10),))
    )
    assert "--pipeline-parallel-size 1 --tensor-parallel-size 2" in shells(plan, "vllm")[0]
    assert "--tp-size 2" in shells(plan, "sglang")[0]
    assert export(plan, "vllm").division.stages == plan.stages


def test_a_group_that_would_not_fit_evenly_becomes_a_pipeline():
    """An even half of the layers is too much for the small device; 11 layers and 1 are not."""
    fast = cluster([gpu("a", 0, 4), gpu("b", 1, 0.9)])
    plan = plan_of([[7, 1]], [12], fast.devices)
    quick = (replace(fast.links[0], latency_s=5e-6, bytes_per_s=5e10),)
    roomy = replace(plan, cluster=replace(cluster([gpu("a", 0), gpu("b", 1)]), links=quick))
    assert "--tensor-parallel-size 2" in shells(roomy, "vllm")[0]
    tight = replace(plan, cluster=replace(fast, links=quick))
    assert "VLLM_PP_LAYER_PARTITION=11,1" in shells(tight, "vllm")[0]
    assert "does not fit" not in notes(tight, "vllm")


def test_stages_of_different_sizes_become_single_devices_and_the_cost_is_estimated(mixed):
    exported = export(mixed, "vllm")
    assert "VLLM_PP_LAYER_PARTITION=4,3,5" in exported.launches[0].shell()
    assert (
        "vLLM cannot give stages different tensor-parallel sizes: stages of 2 and 1 devices become"
        in (exported.notes[0])
    )
    assert exported.notes[1] == "layers move: 0–3 on a, 4–6 on b, 7–11 on c"
    planned = plan_estimate(mixed).tokens_per_s
    executed = estimate(
        mixed.model,
        mixed.cluster,
        mixed.workload,
        exported.division.stages,
        chunk_tokens=mixed.chunk_tokens,
        microbatches=3,
    ).tokens_per_s
    assert exported.notes[-1] == (
        f"predicted {executed:.1f} tokens/s for what it would execute, {planned:.1f} for the plan "
        f"({executed / planned - 1:+.0%})"
    )


def test_cpu_members_are_left_out_or_kept(with_cpu):
    assert "VLLM_PP_LAYER_PARTITION=9,3" in shells(with_cpu, "vllm")[0]
    assert "left out: laptop" in notes(with_cpu, "vllm")
    assert "left out: laptop" in notes(with_cpu, "exllamav3")
    line = shells(with_cpu, "llama.cpp")[0]
    assert r"--n-gpu-layers 13 --split-mode layer --tensor-split 10,3" in line
    assert r"--override-tensor 'blk\.(6|7|8|9)\.=CPU'" in line
    assert "the KV of laptop's layers stays on a" in notes(with_cpu, "llama.cpp")


def test_a_first_stage_on_the_cpu_is_what_llama_cpp_does_not_offload():
    plan = plan_of([[1], [1]], [3, 9], [cpu("laptop", 8), gpu("a", 0)])
    assert "--n-gpu-layers 10 --split-mode layer --tensor-split 10 --ctx-size" in shells(plan, "llama.cpp")[0]
    assert "embedding table" not in notes(plan, "llama.cpp")


def test_several_cpus_of_one_machine_have_no_predicted_speed():
    plan = plan_of([[1], [1]], [5, 7], [cpu("laptop", 8), cpu("desk", 8)])
    for engine in ("llama.cpp", "accelerate"):
        assert export(plan, engine).division is None
        assert "laptop, desk become one, whose speed the plan does not say" in notes(plan, engine)
        assert "predicted" not in notes(plan, engine)
        assert "layers move" not in notes(plan_of([[1, 1]], [12], plan.cluster.devices), engine)
    for engine in ("vllm", "sglang", "exllamav3"):
        with pytest.raises(PlanError, match=r"CUDA or ROCm.*none; use --to llama\.cpp"):
            export(plan, engine)


def test_several_hosts(hosts):
    assert shells(hosts, "llama.cpp") == [
        "CUDA_VISIBLE_DEVICES=3 ggml-rpc-server --device CUDA0 -H old -p 50052",
        "ggml-rpc-server --device CPU -t 1 -H nas -p 50053",
        'CUDA_VISIBLE_DEVICES=0 llama-server --model "$MODEL" --rpc old:50052,nas:50053 --n-gpu-layers 13 '
        f"--split-mode layer --device CUDA0,RPC0,RPC1 --tensor-split 5,4,4 {COMMON_LLAMA_CPP}",
    ]
    assert shells(hosts, "vllm")[:2] == [
        "CUDA_VISIBLE_DEVICES=0 ray start --head",
        "CUDA_VISIBLE_DEVICES=3 ray start --address pc:6379",
    ]
    assert shells(hosts, "vllm")[2].endswith("--distributed-executor-backend ray")
    sglang = export(hosts, "sglang").launches
    assert [launch.host for launch in sglang] == ["pc", "old"]
    assert sglang[1].shell().endswith("--nnodes 2 --node-rank 1 --dist-init-addr pc:50000")
    for engine in ("accelerate", "exllamav3"):
        with pytest.raises(PlanError, match="runs on one host, and this plan uses pc, old"):
            export(hosts, engine)


def test_rpc_first_needs_no_device_order():
    """llama.cpp's own order is RPC devices before local ones."""
    plan = plan_of([[1], [1]], [5, 7], [gpu("b", 0, host="old"), gpu("a", 0, host="pc")])
    plan = replace(plan, cluster=cluster([plan.cluster.device("a"), plan.cluster.device("b")]))
    assert "--rpc old:50052" in shells(plan, "llama.cpp")[1]
    assert "--device" not in shells(plan, "llama.cpp")[1]


def test_hosts_that_take_turns_or_have_unequal_stages_are_refused():
    devices = [gpu("a", 0, host="pc"), gpu("b", 0, host="old"), gpu("c", 1, host="pc")]
    turns = plan_of([[1], [1], [1]], [5, 4, 3], devices)
    for engine in ("vllm", "sglang"):
        with pytest.raises(PlanError, match="pc → old → pc"):
            export(turns, engine)
    unequal = plan_of([[1], [1], [1]], [5, 4, 3], [devices[0], devices[2], devices[1]])
    with pytest.raises(PlanError, match="not 2 on pc, 1 on old"):
        export(unequal, "sglang")
    assert len(shells(unequal, "vllm")) == 3


def test_what_does_not_fit_is_named(with_cpu):
    small = replace(with_cpu.cluster.device("a"), memory_bytes=2**29)
    tight = replace(with_cpu, cluster=cluster([small, *with_cpu.cluster.devices[1:]]))
    assert "does not fit: a needs" in notes(tight, "vllm")
    assert "of 512.0 MiB" in notes(tight, "vllm")


def test_other_makes_of_gpu():
    amd = replace(gpu("amd", 2), kind="rocm")
    assert shells(plan_of([[1]], [4], [amd]), "vllm")[0].startswith("HIP_VISIBLE_DEVICES=2 ")
    apple = replace(gpu("apple", 0), kind="metal", torch_device="mps")
    both = plan_of([[1], [1]], [5, 7], [apple, gpu("a", 0)])
    assert "--device MTL0,CUDA0 --tensor-split 5,8" in shells(both, "llama.cpp")[0]
    assert "left out: apple" in notes(both, "vllm")
    assert export(both, "accelerate").device_map["model.layers.0"] == "mps"


@pytest.mark.parametrize(
    ("total", "weights", "shares"),
    [(12, [3, 1], (9, 3)), (7, [1, 1, 1], (3, 2, 2)), (4, [98, 1, 1], (2, 1, 1)), (9, [4, 0, 5], (5, 3, 1))],
)
def test_layers_are_apportioned_by_largest_remainder_and_none_is_empty(total, weights, shares):
    assert sorted(apportion_units(total, weights), reverse=True) == sorted(shares, reverse=True)
    assert sum(apportion_units(total, weights)) == total


def test_more_groups_than_layers_are_refused():
    with pytest.raises(PlanError, match=r"2 layers .* are too few for 4 groups"):
        export(plan_of([[1, 1, 1, 1]], [2], [gpu(name, i) for i, name in enumerate("abcd")]), "accelerate")


def test_the_command_prints_a_script_or_json(pipeline, tmp_path):
    file = tmp_path / "plan.json"
    write_plan(pipeline, file)
    done = apportion("export", str(file), "--to", "vllm")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "# MODEL: where llama is"
    assert lines[1] == shells(pipeline, "vllm")[0]
    assert all(line.startswith("# ") for line in lines[2:])
    assert subprocess.run(["sh", "-n"], input=done.stdout, text=True).returncode == 0
    mapped = apportion("export", str(file), "--to", "accelerate")
    assert json.loads(mapped.stdout) == export(pipeline, "accelerate").device_map
    assert "# accelerate works on one batch at a time" in mapped.stderr


def test_the_command_s_engines_are_those_there_are(tmp_path):
    done = apportion("export", str(tmp_path / "none.json"), "--to", "exo")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(engine in done.stderr for engine in ENGINES)


def test_an_engine_with_one_batch_at_a_time_pays_for_every_prompt_in_turn(pipeline):
    """R·o / (R·prefill + (o − 1)·decode), from the estimates of one request alone and of one microbatch of all."""
    plan = replace(pipeline, chunk_tokens=512)

    def figures(concurrency):
        workload = replace(plan.workload, concurrency=concurrency)
        return estimate(
            plan.model, plan.cluster, workload, plan.stages, chunk_tokens=plan.chunk_tokens, microbatches=1
        )

    total_s = 4 * figures(1).ttft_s + 127 * figures(4).tpot_s
    for engine in ("accelerate", "exllamav3"):
        assert export(plan, engine).notes[-1].startswith(f"predicted {4 * 128 / total_s:.1f} tokens/s")
