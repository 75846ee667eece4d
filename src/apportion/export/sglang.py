"""A plan as SGLang's environment and arguments.

Looked at in SGLang 0.5.23 (its wheel): srt/distributed/utils.py (`get_pp_indices`: SGLANG_PP_LAYER_PARTITION, one layer
count per pipeline rank) and srt/arg_groups/fields (names); quoted in public repositories of 2026,
srt/entrypoints/engine.py (`_calculate_rank_ranges`: each node has pp_size / nnodes stages; devices in order).
"""

from apportion.cost.objective import microbatch_sequences
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

RENDEZVOUS_PORT = 50000


def to_sglang(plan: Plan) -> Export:
    return Export(
        launches=_launches(plan, list(stages_by_host(plan))),
        device_map=None,
        division=even_division(plan),
        notes=(
            *numbers_note([plan.cluster.device(name) for name in plan.device_ids]),
            *weight_notes(plan, "SGLang"),
            "--max-total-tokens is the cache's size; --mem-fraction-static, one fraction for all devices, has to leave "
            "as much: raise it where SGLang finds too little",
            *prefill_note(plan, "--chunked-prefill-size"),
        ),
    )


def _launches(plan: Plan, hosts: list[str]) -> tuple[Launch, ...]:
    several = len(hosts) > 1
    return tuple(
        Launch(
            host=host,
            variables={
                **host_variables(plan, host),
                "SGLANG_PP_LAYER_PARTITION": layer_partition(plan),
            },
            command=(
                *("python", "-m", "sglang.launch_server", "--model-path", MODEL),
                *_arguments(plan),
                *(_node(hosts, rank) if several else ()),
            ),
        )
        for rank, host in enumerate(hosts)
    )


def _node(hosts: list[str], rank: int) -> tuple[str, ...]:
    rendezvous = f"{hosts[0]}:{RENDEZVOUS_PORT}"
    return ("--nnodes", str(len(hosts)), "--node-rank", str(rank), "--dist-init-addr", rendezvous)


def _arguments(plan: Plan) -> tuple[str, ...]:
    workload = plan.workload
    options = {
        "--pp-size": len(plan.stages),
        "--tp-size": plan.stages[0].split.size,
        "--dtype": dtype(plan),
        "--context-length": workload.max_context_tokens,
        "--max-running-requests": workload.concurrency,
        "--chunked-prefill-size": plan.chunk_tokens,
        "--max-total-tokens": plan.num_kv_blocks * plan.block_tokens,
    }
    if kv_name(plan, "SGLang") != "auto":
        options["--kv-cache-dtype"] = kv_name(plan, "SGLang")
    if len(plan.stages) > 1:
        microbatches = even_division(plan).microbatches
        options["--pp-max-micro-batch-size"] = microbatch_sequences(workload.concurrency, microbatches)
    return tuple(str(word) for pair in options.items() for word in pair)
