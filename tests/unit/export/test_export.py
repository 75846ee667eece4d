"""Plans in other engines' terms: the commands word for word, what an engine cannot express planned again."""

import json
import subprocess
from dataclasses import replace
from math import isclose

import pytest
from command import apportion
from exported import export
from planned import cluster, cpu, llama
from plans import hand_plan

from apportion.asked.engine_planner import EnginePlanner
from apportion.cost.estimate import estimate, plan_estimate
from apportion.cost.kv_capacity import with_kv_rooms, with_most_kv
from apportion.cost.memory import plan_memory
from apportion.export.engines import ENGINES
from apportion.export.limits import ABILITIES, compute_buffer_bytes
from apportion.export.price import division_tokens_per_s
from apportion.export.within import fitted
from apportion.planner.plan_file import write_plan
from apportion.planner.verify.plan import verify
from apportion.types.errors import InfeasibleError, PlanError

COMMON_VLLM = (
    "--dtype bfloat16 --max-model-len 2048 --max-num-seqs 4 --max-num-batched-tokens 2051 --block-size 4"
)
COMMON_SGLANG = (
    "--dtype bfloat16 --context-length 2048 --max-running-requests 4 --chunked-prefill-size 2048 "
    "--max-total-tokens 8192"
)
COMMON_LLAMA_CPP = "--ctx-size 8192 --parallel 4 --ubatch-size 512 --cache-type-k f16 --cache-type-v f16"


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
    certificate = replace(plan.certificate, value=1.0, lower_bound=1.0)  # what is read has one above 0
    plan = replace(plan, cluster=cluster(devices), workload=workload, certificate=certificate)
    return with_kv_rooms(replace(plan, memory=plan_memory(plan), estimate=plan_estimate(plan)))


@pytest.fixture
def pipeline():
    return plan_of([[1], [1]], [8, 4], [gpu("big", 1, speed=2), gpu("small", 0)])


@pytest.fixture
def uneven():
    plan = plan_of([[3, 1]], [12], [gpu("big", 0, speed=2), gpu("small", 1)])
    return replace(plan, cluster=quickly_joined(plan.cluster.devices))


def quickly_joined(devices):
    """So quickly that groups pay."""
    joined = cluster(devices)
    return replace(joined, links=(replace(joined.links[0], latency_s=5e-6, bytes_per_s=5e10),))


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


def divided(stages):
    return [(stage.layer_start, stage.layer_stop, stage.split.device_ids) for stage in stages]


def test_a_pipeline_is_the_same_division_in_vllm_and_sglang(pipeline):
    """Of 8192 tokens a layer keeps 2 × 8 × 64 elements of 2 bytes: 16 MiB; 8 layers are the most, of 2050 of 2048
    blocks."""
    kv_bytes = -(-8 * 8192 * 2048 * 2050 // 2048)
    assert shells(pipeline, "vllm") == [
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,0 VLLM_PP_LAYER_PARTITION=8,4 "
        f'vllm serve "$MODEL" --pipeline-parallel-size 2 --tensor-parallel-size 1 {COMMON_VLLM} '
        f"--kv-cache-memory-bytes {kv_bytes} --gpu-memory-utilization 0.1 --num-gpu-blocks-override 2049"
    ]
    assert shells(pipeline, "sglang") == [
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,0 SGLANG_PP_LAYER_PARTITION=8,4 "
        f'python -m sglang.launch_server --model-path "$MODEL" --pp-size 2 --tp-size 1 {COMMON_SGLANG} '
        "--pp-max-micro-batch-size 2"
    ]
    for engine in ("vllm", "sglang"):
        exported = export(pipeline, engine)
        assert divided(exported.division.stages) == divided(pipeline.stages)
        assert exported.notes[-1].endswith("for the plan (+0%)")
        assert "planned again" not in notes(pipeline, engine)


def test_whose_numbers_the_cards_have_is_said(pipeline):
    """CUDA counts the fastest first by default; these are nvidia-smi's."""
    for engine in set(ENGINES) - {"mlx"}:
        assert "card numbers are as nvidia-smi counts" in notes(pipeline, engine)
        assert "1 is big on local, 0 is small on local" in notes(pipeline, engine)


def test_llama_cpp_counts_the_output_as_one_more_layer(pipeline):
    assert shells(pipeline, "llama.cpp") == [
        'CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,0 llama-server --model "$MODEL" --n-gpu-layers 13 '
        f"--split-mode layer --tensor-split 8,5 {COMMON_LLAMA_CPP}"
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


def test_llama_cpp_s_own_rule_leaves_the_first_layers_to_the_cpu():
    """By load_tensors: of the layers from num_layers + 1 − n_gpu_layers on."""
    plan = plan_of([[1], [1], [1]], [5, 4, 3], [cpu("laptop", 8), gpu("a", 0), gpu("b", 1)])
    words = export(plan, "llama.cpp").launches[0].command
    number = int(words[words.index("--n-gpu-layers") + 1])
    assert 12 + 1 - number == 5
    assert words[words.index("--tensor-split") + 1] == "4,4"


def test_less_is_taken_in_at_once_where_memory_forces_that(pipeline):
    """The compute buffer of 512 tokens: a mask over 8192 tokens in 2 bytes and 128,256 logits in 4, 271 MB; 256 tokens
    save 136 of them, 128 tokens 203. Cards that are smaller by 180 MB have to do with these."""
    assert compute_buffer_bytes(pipeline.model, pipeline.workload, 512) == 512 * (2 * 8192 + 4 * 128256)
    needed = export(pipeline, "llama.cpp").needed_bytes
    devices = [
        replace(device, memory_bytes=needed[device.id] - 180_000_000) for device in pipeline.cluster.devices
    ]
    tight = replace(pipeline, cluster=cluster(devices))
    words = export(tight, "llama.cpp").launches[0].command
    assert words[words.index("--ubatch-size") + 1] == "128"
    assert words[words.index("--cache-type-k") + 1] == "f16"


def test_uneven_shares_survive_only_where_the_engine_takes_a_ratio(uneven):
    assert "--split-mode tensor --tensor-split 6,2" in shells(uneven, "llama.cpp")[0]
    assert export(uneven, "llama.cpp").division.stages == uneven.stages
    for engine in ("vllm", "sglang", "exllamav3", "accelerate"):
        assert all(len(set(stage.split.kv_heads)) == 1 for stage in export(uneven, engine).division.stages)
        assert "planned again within what" in notes(uneven, engine)


def test_an_even_group_stays_a_group():
    fast = cluster([gpu("a", 0), gpu("b", 1)])
    plan = plan_of([[1, 1]], [12], fast.devices)
    assert "--pipeline-parallel-size 1 --tensor-parallel-size 2" in shells(plan, "vllm")[0]
    assert "--tp-size 2" in shells(plan, "sglang")[0]
    assert export(plan, "vllm").division.stages == plan.stages


def test_a_group_that_would_not_fit_evenly_becomes_a_pipeline():
    """An even half of the layers is too much for the small device; a few layers are not."""
    plan = plan_of([[7, 1]], [12], [gpu("a", 0, 4), gpu("b", 1, 1.2)])
    roomy = replace(plan, cluster=quickly_joined([gpu("a", 0), gpu("b", 1)]))
    assert "--tensor-parallel-size 2" in shells(roomy, "vllm")[0]
    tight = replace(plan, cluster=quickly_joined(plan.cluster.devices))
    assert all(stage.split.size == 1 for stage in export(tight, "vllm").division.stages)


def test_stages_of_different_sizes_are_planned_again_and_the_cost_is_estimated(mixed):
    exported = export(mixed, "vllm")
    assert exported.notes[0].startswith(
        "planned again within what vLLM can do and with its buffers left free: layers 0"
    )
    made = fitted(mixed, "vllm", EnginePlanner())
    executed = estimate(
        mixed.model,
        made.cluster,
        mixed.workload,
        exported.division.stages,
        chunk_tokens=made.chunk_tokens,
        microbatches=min(len(made.stages), 4),
    )
    assert exported.notes[-1].startswith(f"predicted {executed.tokens_per_s:.3g} tokens/s with prompts")
    assert all(check.ok for check in verify(made))


def test_cpus_are_left_out_or_first(with_cpu):
    for engine in ("vllm", "sglang", "exllamav3"):
        used = [name for stage in export(with_cpu, engine).division.stages for name in stage.split.device_ids]
        assert "laptop" not in used
    for engine in ("llama.cpp", "ollama"):
        later = [stage.split.device_ids for stage in export(with_cpu, engine).division.stages[1:]]
        assert ("laptop",) not in later
    assert divided(export(with_cpu, "accelerate").division.stages) == divided(with_cpu.stages)


def test_a_first_stage_on_the_cpu_is_what_llama_cpp_does_not_offload():
    plan = plan_of([[1], [1]], [3, 9], [cpu("laptop", 8), gpu("a", 0)])
    assert "--n-gpu-layers 10 --split-mode layer --tensor-split 10 --ctx-size" in shells(plan, "llama.cpp")[0]
    assert "embedding table" not in notes(plan, "llama.cpp")
    assert "the first 3 layers, with their KV, stay in the memory of laptop" in notes(plan, "llama.cpp")


def test_several_cpus_of_one_machine_become_one():
    plan = plan_of([[1], [1]], [5, 7], [cpu("laptop", 8), cpu("desk", 8)])
    for engine in ("llama.cpp", "accelerate", "ollama"):
        (stage,) = export(plan, engine).division.stages
        assert stage.split.device_ids == ("laptop",)
        assert "layers 0–11 on laptop; without desk" in notes(plan, engine)
    whole = fitted(plan, "llama.cpp", EnginePlanner()).cluster.device("laptop")
    assert whole.memory_bytes == 16 * 2**30
    assert whole.num_threads == 2
    for engine in ("vllm", "sglang", "exllamav3"):
        with pytest.raises(PlanError, match=r"CUDA or ROCM devices, and there are none; use llama\.cpp"):
            export(plan, engine)


def test_several_hosts(hosts):
    assert shells(hosts, "llama.cpp") == [
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=3 ggml-rpc-server --device CUDA0 -H old -p 50052",
        "ggml-rpc-server --device CPU -t 1 -H nas -p 50053",
        'CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0 llama-server --model "$MODEL" '
        "--rpc old:50052,nas:50053 --n-gpu-layers 13 "
        f"--split-mode layer --device CUDA0,RPC0,RPC1 --tensor-split 5,4,4 {COMMON_LLAMA_CPP}",
    ]
    two = plan_of([[1], [1]], [5, 7], hosts.cluster.devices[:2])
    assert shells(two, "vllm")[:2] == [
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0 ray start --head",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=3 ray start --address pc:6379",
    ]
    assert shells(two, "vllm")[2].endswith("--distributed-executor-backend ray")
    sglang = export(two, "sglang").launches
    assert [launch.host for launch in sglang] == ["pc", "old"]
    assert sglang[1].shell().endswith("--nnodes 2 --node-rank 1 --dist-init-addr pc:50000")
    for engine in ("accelerate", "exllamav3", "ollama"):
        division = export(two, engine).division
        used = {two.cluster.device(name).host for stage in division.stages for name in stage.split.device_ids}
        assert len(used) == 1


def test_rpc_first_needs_no_device_order():
    """llama.cpp's own order is RPC devices before local ones."""
    plan = plan_of([[1], [1]], [5, 7], [gpu("b", 0, host="old"), gpu("a", 0, host="pc")])
    plan = replace(plan, cluster=cluster([plan.cluster.device("a"), plan.cluster.device("b")]))
    assert "--rpc old:50052" in shells(plan, "llama.cpp")[1]
    assert "--device" not in shells(plan, "llama.cpp")[1]


def test_hosts_that_take_turns_or_have_unequal_stages_are_planned_again():
    devices = [gpu("a", 0, host="pc"), gpu("b", 0, host="old"), gpu("c", 1, host="pc")]
    turns = plan_of([[1], [1], [1]], [5, 4, 3], devices)
    for engine in ("vllm", "sglang"):
        names = [
            turns.cluster.device(stage.split.device_ids[0]).host
            for stage in export(turns, engine).division.stages
        ]
        assert names == sorted(names, key=names.index)
    unequal = plan_of([[1], [1], [1]], [5, 4, 3], [devices[0], devices[2], devices[1]])
    hosts = [
        unequal.cluster.device(stage.split.device_ids[0]).host
        for stage in export(unequal, "sglang").division.stages
    ]
    assert len({hosts.count(host) for host in hosts}) == 1
    assert len(shells(unequal, "vllm")) == 3


def test_what_does_not_fit_is_refused_without_a_command(with_cpu):
    """A half GiB on each of two cards for 2.1 GB of weights."""
    small = [
        replace(device, memory_bytes=2**29) if device.kind == "cuda" else device
        for device in with_cpu.cluster.devices
    ]
    tight = replace(with_cpu, cluster=cluster(small))
    for engine in ("vllm", "sglang", "exllamav3"):
        with pytest.raises(InfeasibleError):
            export(tight, engine)
    assert "--n-gpu-layers" in shells(tight, "llama.cpp")[0]


def test_a_plan_for_one_engine_is_planned_again_for_another(pipeline):
    """The buffers of the first do not stay reserved."""
    for_vllm = fitted(pipeline, "vllm", EnginePlanner())
    assert fitted(for_vllm, "vllm", EnginePlanner()) == for_vllm
    other = fitted(for_vllm, "llama.cpp", EnginePlanner())
    assert other.constraints.engine.name == "llama.cpp"
    for device in pipeline.cluster.devices:
        taken = other.constraints.engine.buffer_bytes[device.id]
        assert other.cluster.device(device.id).reserved_bytes == device.reserved_bytes + taken


def test_a_cache_of_all_that_is_left_leaves_the_engine_s_buffers(pipeline):
    filled = with_most_kv(pipeline)
    made = fitted(filled, "llama.cpp", EnginePlanner())
    assert pipeline.num_kv_blocks < made.num_kv_blocks
    for name, used in made.memory.items():
        assert used.total_bytes <= filled.cluster.device(name).memory_bytes


def test_plans_of_an_engine_are_certified_within_what_it_can_do(uneven):
    for engine in ABILITIES:
        made = fitted(uneven, engine, EnginePlanner())
        assert made.constraints.engine.name == ABILITIES[engine].title
        assert [check for check in verify(made) if not check.ok] == []


def test_other_makes_of_gpu():
    amd = replace(gpu("amd", 2), kind="rocm")
    assert shells(plan_of([[1]], [4], [amd]), "vllm")[0].startswith("HIP_VISIBLE_DEVICES=2 ")
    apple = replace(gpu("apple", 0), kind="metal", torch_device="mps")
    both = plan_of([[1], [1]], [5, 7], [apple, gpu("a", 0)])
    assert "--device MTL0,CUDA0 --tensor-split 5,8" in shells(both, "llama.cpp")[0]
    assert "layers 0–11 on a; without apple" in notes(both, "vllm")
    assert export(both, "accelerate").device_map["model.layers.0"] == "mps"


def test_caches_in_formats_that_an_engine_lacks_are_refused(pipeline):
    narrow = replace(
        pipeline,
        stages=tuple(replace(stage, kv_format="q8_0") for stage in pipeline.stages),
        workload=replace(pipeline.workload, kv_format="q8_0"),
    )
    words = export(narrow, "llama.cpp").launches[0].command
    assert words[words.index("--cache-type-v") + 1] == "q8_0"
    assert words[words.index("--flash-attn") + 1] == "on"
    with pytest.raises(
        PlanError, match=r"vLLM has no KV cache in q8_0; plan again with --kv-format bf16, fp16, fp8"
    ):
        export(narrow, "vllm")


def test_ollama_gets_a_modelfile_and_hands_the_rest_to_llama_server(pipeline):
    exported = export(pipeline, "ollama")
    assert exported.files["Modelfile"] == (
        "FROM $MODEL\nPARAMETER num_ctx 2048\nPARAMETER num_gpu 13\nPARAMETER num_batch 512\n"
    )
    assert [launch.shell() for launch in exported.launches] == [
        "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,0 OLLAMA_NUM_PARALLEL=4 OLLAMA_KV_CACHE_TYPE=f16 "
        "OLLAMA_SCHED_SPREAD=1 LLAMA_ARG_TENSOR_SPLIT=8,5 ollama serve > ollama.log 2>&1 &\n"
        "for _ in $(seq 30); do ollama list > /dev/null 2>&1 && break; sleep 1; done",
        "ollama create llama -f Modelfile",
        "ollama run llama",
    ]


def test_mlx_divides_evenly_or_not_at_all():
    """Two Macs: a group of halves; where one holds half of it only, too; where neither does, nothing."""
    macs = [
        replace(gpu(name, 0, gib, host=name), kind="metal", torch_device="mps")
        for name, gib in (("studio", 2.0), ("mini", 2.0))
    ]
    plan = plan_of([[1], [1]], [8, 4], macs)
    exported = export(plan, "mlx")
    assert exported.launches[0].shell() == (
        'mlx.launch --backend ring --hosts studio,mini mlx_lm.server --model "$MODEL"'
    )
    assert exported.division.stages[0].split.kv_heads == (4, 4)
    small = replace(plan, cluster=cluster([macs[0], replace(macs[1], memory_bytes=2**29)]))
    with pytest.raises(
        InfeasibleError, match="MLX divides evenly, and the division that comes nearest needs"
    ):
        export(small, "mlx")
    roomy = plan_of([[1]], [12], [replace(macs[0], memory_bytes=2**33)])
    assert shells(roomy, "mlx") == ['mlx_lm.server --model "$MODEL"']
    with pytest.raises(PlanError, match="Apple's GPUs"):
        export(plan_of([[1]], [12], [gpu("a", 0)]), "mlx")


def test_mlx_pipelines_have_the_first_layers_on_the_last_host():
    """12 layers on 2 hosts are 6 each, over a slow link better than a group; 11 would lose one, so there is none."""
    macs = [
        replace(gpu(name, 0, 1.6, host=name), kind="metal", torch_device="mps") for name in ("studio", "mini")
    ]
    plan = plan_of([[1], [1]], [8, 4], macs)
    plan = replace(plan, model=replace(plan.model, family="ministral3"))
    exported = export(plan, "mlx")
    assert divided(exported.division.stages) == [(0, 6, ("mini",)), (6, 12, ("studio",))]
    assert exported.launches[0].shell().endswith(' mlx_lm.server --model "$MODEL" --pipeline')
    odd = plan_of([[1], [1]], [8, 3], macs)
    odd = replace(odd, model=replace(odd.model, family="ministral3"))
    assert [stage.split.size for stage in export(odd, "mlx").division.stages] == [2]


def test_the_command_prints_a_script_or_json(pipeline, tmp_path):
    file = tmp_path / "plan.json"
    write_plan(pipeline, file)
    done = apportion("export", str(file), "--to", "vllm")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "# MODEL: the folder of llama's checkpoint, or its id on the Hugging Face hub"
    assert lines[1] == "MODEL=${MODEL:-llama}"
    assert lines[2] == shells(pipeline, "vllm")[0]
    assert all(line.startswith("# ") for line in lines[3:])
    assert subprocess.run(["sh", "-n"], input=done.stdout, text=True).returncode == 0
    mapped = apportion("export", str(file), "--to", "accelerate")
    assert json.loads(mapped.stdout) == export(pipeline, "accelerate").device_map
    assert "# accelerate works on one batch at a time" in mapped.stderr


FAKE_OLLAMA = """#!/bin/sh
case $1 in
    serve) echo "$OLLAMA_NUM_PARALLEL at once"; sleep 1; touch serving; sleep 3; rm serving;;
    list) test -e serving;;
    *) test -e serving && echo "$*" >> done;;
esac
"""
"""Takes a second until it serves."""


def test_the_script_for_ollama_is_pasted_and_runs(pipeline, tmp_path):
    file = tmp_path / "plan.json"
    write_plan(pipeline, file)
    done = apportion("export", str(file), "--to", "ollama")
    fake = tmp_path / "ollama"
    fake.write_text(FAKE_OLLAMA)
    fake.chmod(0o755)
    ran = subprocess.run(
        ["sh"],
        input=done.stdout,
        text=True,
        cwd=tmp_path,
        env={"MODEL": "/m.gguf", "PATH": f"{tmp_path}:/bin:/usr/bin"},
        timeout=20,
    )
    assert ran.returncode == 0
    assert (tmp_path / "Modelfile").read_text().startswith("FROM /m.gguf\nPARAMETER num_ctx 2048")
    assert (tmp_path / "done").read_text() == "create llama -f Modelfile\nrun llama\n"
    assert (tmp_path / "ollama.log").read_text() == "4 at once\n"


def test_the_command_s_engines_are_those_there_are(tmp_path):
    done = apportion("export", str(tmp_path / "none.json"), "--to", "tgi")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(engine in done.stderr for engine in ENGINES)
    near = apportion("export", str(tmp_path / "none.json"), "--to", "llamacpp")
    assert near.returncode == 2
    assert "did you mean llama.cpp?" in near.stderr


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
        made = fitted(plan, engine, EnginePlanner())
        assert isclose(division_tokens_per_s(made, export(plan, engine).division), 4 * 128 / total_s)
