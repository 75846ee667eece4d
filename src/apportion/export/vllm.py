"""A plan as vLLM's environment and arguments.

Looked at, as copies quoted in public repositories of 2025 and 2026 (in use with vLLM 0.13 to 0.30; vLLM's own tree was
not to be had): distributed/utils.py (`get_pp_indices`: VLLM_PP_LAYER_PARTITION holds one layer count per pipeline rank,
which must sum to the model's), config/cache.py (`num_gpu_blocks_override`), v1/core/block_pool.py (block 0) and
v1/executor/ray_executor.py (order of ranks: the driver's node, then nodes with fewer workers, then by address).
"""

from apportion.export.differences import differences
from apportion.export.even import dtype, even_division, host_variables, layer_partition, stages_by_host
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.weights import weight_notes
from apportion.types.plan import Plan


def to_vllm(plan: Plan) -> Export:
    """Raises PlanError where no GPU takes part, or hosts take turns in the pipeline."""
    division = even_division(plan, "vLLM")
    return Export(
        launches=_launches(plan, division),
        device_map=None,
        division=division,
        notes=(
            *differences(plan, division.stages, "vLLM"),
            *weight_notes(plan, "vLLM"),
            *_notes(plan, division),
        ),
    )


def _launches(plan: Plan, division: EngineDivision) -> tuple[Launch, ...]:
    hosts = list(stages_by_host(plan, division))
    variables = {"VLLM_PP_LAYER_PARTITION": layer_partition(division)}
    serve = ("vllm", "serve", MODEL, *_arguments(plan, division))
    if len(hosts) == 1:
        seen = host_variables(plan, division, hosts[0])
        return (Launch(host=hosts[0], variables=seen | variables, command=serve),)
    serve = (*serve, "--distributed-executor-backend", "ray")
    return (
        *(
            Launch(
                host=host,
                variables=host_variables(plan, division, host),
                command=("ray", "start", *(["--head"] if i == 0 else ["--address", f"{hosts[0]}:6379"])),
            )
            for i, host in enumerate(hosts)
        ),
        Launch(host=hosts[0], variables=variables, command=serve),
    )


def _arguments(plan: Plan, division: EngineDivision) -> tuple[str, ...]:
    workload = plan.workload
    options = {
        "--pipeline-parallel-size": len(division.stages),
        "--tensor-parallel-size": division.stages[0].split.size,
        "--dtype": dtype(plan),
        "--max-model-len": workload.max_context_tokens,
        "--max-num-seqs": workload.concurrency,
        # vLLM counts decode tokens too.
        "--max-num-batched-tokens": plan.step_tokens,
        "--block-size": plan.block_tokens,
        # Block 0 is vLLM's own placeholder.
        "--num-gpu-blocks-override": plan.num_kv_blocks + 1,
    }
    return tuple(str(word) for pair in options.items() for word in pair)


def _notes(plan: Plan, division: EngineDivision) -> list[str]:
    notes = [
        "vLLM has one --gpu-memory-utilization for all devices, no budget for each: what other programs need of "
        "one card is set aside on all"
    ]
    stages = stages_by_host(plan, division)
    if len(stages) > 1:
        notes.append(
            "on Ray, vLLM orders hosts itself: the one that runs `vllm serve`, then those with fewer devices, "
            f"then by address; the layer counts suit the order {', '.join(stages)}"
        )
    return notes
