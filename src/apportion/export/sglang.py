"""A plan as SGLang's environment and arguments.

Looked at: python/sglang/srt/distributed/utils.py at 1107be1 (`get_pp_indices`: SGLANG_PP_LAYER_PARTITION, one layer
count per pipeline rank); quoted in public repositories of 2026, srt/server_args.py (names) and
srt/entrypoints/engine.py (`_calculate_rank_ranges`: each node has pp_size / nnodes stages; devices in order).
"""

from apportion.cost.objective import microbatch_sequences
from apportion.export.differences import differences
from apportion.export.even import dtype, even_division, host_variables, layer_partition, stages_by_host
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.weights import weight_notes
from apportion.types.errors import PlanError
from apportion.types.plan import Plan

RENDEZVOUS_PORT = 50000


def to_sglang(plan: Plan) -> Export:
    """Raises PlanError where no GPU takes part, or hosts take turns or have different numbers of stages."""
    division = even_division(plan, "SGLang")
    stages = stages_by_host(plan, division)
    if len(set(stages.values())) > 1:
        counts = ", ".join(f"{count} on {host}" for host, count in stages.items())
        raise PlanError(
            f"SGLang runs equally many stages on each host, not {counts}; use --to vllm or llama.cpp"
        )
    return Export(
        launches=_launches(plan, division, list(stages)),
        device_map=None,
        division=division,
        notes=(
            *differences(plan, division.stages, "SGLang"),
            *weight_notes(plan, "SGLang"),
            "SGLang has one --mem-fraction-static for all devices, no budget for each: what other programs need "
            "of one card is set aside on all",
        ),
    )


def _launches(plan: Plan, division: EngineDivision, hosts: list[str]) -> tuple[Launch, ...]:
    several = len(hosts) > 1
    return tuple(
        Launch(
            host=host,
            variables={
                **host_variables(plan, division, host),
                "SGLANG_PP_LAYER_PARTITION": layer_partition(division),
            },
            command=(
                *("python", "-m", "sglang.launch_server", "--model-path", MODEL),
                *_arguments(plan, division),
                *(_node(hosts, rank) if several else ()),
            ),
        )
        for rank, host in enumerate(hosts)
    )


def _node(hosts: list[str], rank: int) -> tuple[str, ...]:
    rendezvous = f"{hosts[0]}:{RENDEZVOUS_PORT}"
    return ("--nnodes", str(len(hosts)), "--node-rank", str(rank), "--dist-init-addr", rendezvous)


def _arguments(plan: Plan, division: EngineDivision) -> tuple[str, ...]:
    workload = plan.workload
    options = {
        "--pp-size": len(division.stages),
        "--tp-size": division.stages[0].split.size,
        "--dtype": dtype(plan),
        "--context-length": workload.max_context_tokens,
        "--max-running-requests": workload.concurrency,
        "--chunked-prefill-size": plan.chunk_tokens,
        "--max-total-tokens": plan.num_kv_blocks * plan.block_tokens,
    }
    if len(division.stages) > 1:
        options["--pp-max-micro-batch-size"] = microbatch_sequences(
            workload.concurrency, division.microbatches
        )
    return tuple(str(word) for pair in options.items() for word in pair)
