"""A plan as vLLM's environment and arguments.

Looked at in vLLM 0.33.0 (its source distribution): distributed/utils.py (`get_pp_indices`: VLLM_PP_LAYER_PARTITION
holds one layer count per pipeline rank, which must sum to the model's), v1/worker/gpu_worker.py
(`determine_available_memory`: `kv_cache_memory_bytes` is taken instead of what the fraction leaves), v1/worker/utils.py
(`request_memory`: the fraction of every card must be free at the start), v1/core/kv_cache_planning.py
(`num_gpu_blocks_override`), v1/core/block_pool.py (block 0), v1/executor/ray_utils.py (`get_bundles_sorted_by_node`).
"""

from apportion.cost.memory import plan_memory
from apportion.export.accelerators import numbers_note
from apportion.export.even import (
    dtype,
    even_division,
    host_variables,
    layer_partition,
    prefill_note,
    stages_by_host,
)
from apportion.export.kv_formats import kv_name
from apportion.export.launch import MODEL, Export, Launch
from apportion.export.weights import weight_notes
from apportion.types.plan import Plan

FREE_AT_START = 0.1
"""The fraction of a card that vLLM asks to be free before it loads; with an absolute size of the cache it has no other
meaning."""
SPARE_BLOCKS = 2
"""Beyond the blocks that are asked for: vLLM's own placeholder, and rounding."""


def to_vllm(plan: Plan) -> Export:
    return Export(
        launches=_launches(plan),
        device_map=None,
        division=even_division(plan),
        notes=(
            *numbers_note([plan.cluster.device(name) for name in plan.device_ids]),
            *weight_notes(plan, "vLLM"),
            *_notes(plan),
        ),
    )


def _launches(plan: Plan) -> tuple[Launch, ...]:
    hosts = list(stages_by_host(plan))
    variables = {"VLLM_PP_LAYER_PARTITION": layer_partition(plan)}
    serve = ("vllm", "serve", MODEL, *_arguments(plan))
    if len(hosts) == 1:
        seen = host_variables(plan, hosts[0])
        return (Launch(host=hosts[0], variables=seen | variables, command=serve),)
    serve = (*serve, "--distributed-executor-backend", "ray")
    return (
        *(
            Launch(
                host=host,
                variables=host_variables(plan, host),
                command=("ray", "start", *(["--head"] if i == 0 else ["--address", f"{hosts[0]}:6379"])),
            )
            for i, host in enumerate(hosts)
        ),
        Launch(host=hosts[0], variables=variables, command=serve),
    )


def _arguments(plan: Plan) -> tuple[str, ...]:
    workload = plan.workload
    options = {
        "--pipeline-parallel-size": len(plan.stages),
        "--tensor-parallel-size": plan.stages[0].split.size,
        "--dtype": dtype(plan),
        "--max-model-len": workload.max_context_tokens,
        "--max-num-seqs": workload.concurrency,
        # vLLM counts decode tokens too, and wants no fewer than sequences.
        "--max-num-batched-tokens": plan.step_tokens,
        "--block-size": plan.block_tokens,
        "--kv-cache-memory-bytes": _most_kv_bytes(plan),
        "--gpu-memory-utilization": FREE_AT_START,
    }
    if all(layer.window_tokens is None for layer in plan.model.layers):
        # Block 0 is vLLM's own placeholder. Where layers have windows, they share the blocks in groups.
        options["--num-gpu-blocks-override"] = plan.num_kv_blocks + 1
    if kv_name(plan, "vLLM") != "auto":
        options["--kv-cache-dtype"] = kv_name(plan, "vLLM")
    return tuple(str(word) for pair in options.items() for word in pair)


def _most_kv_bytes(plan: Plan) -> int:
    """Of the device with the most: one size for all, of which each takes as many blocks as all can hold."""
    most = max(used.kv_bytes for used in plan_memory(plan).values())
    return -(-most * (plan.num_kv_blocks + SPARE_BLOCKS) // plan.num_kv_blocks)


def _notes(plan: Plan) -> list[str]:
    notes = [
        "the KV cache is given in bytes, as cards differ: --gpu-memory-utilization is one fraction for all, and here "
        "only what must be free at the start"
    ]
    notes += prefill_note(plan, "--max-num-batched-tokens")
    stages = stages_by_host(plan)
    if len(stages) > 1:
        notes.append(
            "on Ray, vLLM orders hosts itself: the one that runs `vllm serve`, then by Ray's ids of nodes; the layer "
            f"counts suit the order {', '.join(stages)}"
        )
    return notes
