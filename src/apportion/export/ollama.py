"""A plan as a Modelfile and the environment of `ollama serve`.

Looked at, at fb30760 (2026-08-21): llm/llama_server.go (models are run by llama.cpp's llama-server, which gets
`-ngl` from `num_gpu`, `-c` and `-np`, `--cache-type-*`, `-b` and `-ub` from `num_batch`, and the environment of
`ollama serve`, so LLAMA_ARG_* are read by it), envconfig/config.go (OLLAMA_*), server/sched.go (which cards take part:
one that holds all, or all of one make; OLLAMA_SCHED_SPREAD: all).
"""

from dataclasses import dataclass

from apportion.cost.traffic import coordinator_host
from apportion.export.accelerators import numbers_note, visible
from apportion.export.experts import ExpertSplit
from apportion.export.kv_formats import kv_name
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.llama_cpp import context_tokens, joined, shared_experts_override
from apportion.export.weights import weight_notes
from apportion.types.plan import Plan

MODELFILE = "Modelfile"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Of layers and the output what goes to GPUs, how many to each, and what llama-server is told beside that."""

    device_ids: tuple[str, ...]
    num_gpu: int
    counts: tuple[int, ...]
    variables: dict[str, str]


def to_ollama(plan: Plan) -> Export:
    stages = [stage for stage in plan.stages if plan.cluster.device(stage.split.device_ids[0]).kind != "cpu"]
    counts = tuple(stage.num_layers + stage.has_head for stage in stages)
    offload = Offload(
        device_ids=tuple(stage.split.device_ids[0] for stage in stages),
        num_gpu=sum(counts),
        counts=counts,
        variables={},
    )
    return ollama_export(
        plan, offload, EngineDivision(stages=plan.stages, microbatches=1, pipelined_prefill=False)
    )


def expert_ollama_export(plan: Plan, split: ExpertSplit) -> Export:
    """All layers on GPUs but for the experts of the first: llama-server reads the same options from its environment."""
    override = shared_experts_override(plan, split.num_on_cpu)
    offload = Offload(
        device_ids=tuple(gpu.id for gpu, _, _ in split.runs),
        num_gpu=plan.model.num_layers + 1,
        counts=tuple(stop - start + (stop == plan.model.num_layers) for _, start, stop in split.runs),
        variables={
            "LLAMA_ARG_N_CPU_MOE": str(split.num_on_cpu),
            **({"LLAMA_ARG_OVERRIDE_TENSOR": override[1]} if override else {}),
        },
    )
    return ollama_export(plan, offload, None)


def ollama_export(plan: Plan, offload: Offload, division: EngineDivision | None) -> Export:
    gpus = [plan.cluster.device(name) for name in offload.device_ids]
    host, name = coordinator_host(plan.cluster), plan.model.name
    return Export(
        launches=(
            Launch(
                host=host,
                variables=_variables(plan, offload),
                command=("ollama", "serve"),
                ready=("ollama", "list"),
            ),
            Launch(host=host, command=("ollama", "create", name, "-f", MODELFILE)),
            Launch(host=host, command=("ollama", "run", name)),
        ),
        device_map=None,
        division=division,
        notes=(*numbers_note(gpus), *weight_notes(plan, "Ollama"), *_notes(gpus_in_use=len(gpus))),
        files={MODELFILE: _modelfile(plan, offload)},
    )


def _variables(plan: Plan, offload: Offload) -> dict[str, str]:
    several = len(offload.counts) > 1
    return {
        **visible([plan.cluster.device(name) for name in offload.device_ids]),
        "OLLAMA_NUM_PARALLEL": str(plan.workload.concurrency),
        "OLLAMA_KV_CACHE_TYPE": kv_name(plan, "Ollama"),
        **({"OLLAMA_FLASH_ATTENTION": "1"} if kv_name(plan, "Ollama") != "f16" else {}),
        **({"OLLAMA_SCHED_SPREAD": "1", "LLAMA_ARG_TENSOR_SPLIT": joined(offload.counts)} if several else {}),
        **offload.variables,
    }


def _modelfile(plan: Plan, offload: Offload) -> str:
    assert plan.constraints.engine is not None
    parameters = {
        "num_ctx": context_tokens(plan) // plan.workload.concurrency,
        "num_gpu": offload.num_gpu,
        "num_batch": plan.constraints.engine.step_tokens,
    }
    lines = [f"FROM {MODEL}", *(f"PARAMETER {name} {value}" for name, value in parameters.items())]
    return "\n".join(lines) + "\n"


def _notes(*, gpus_in_use: int) -> list[str]:
    notes = [
        "Ollama reads its settings when it starts: first stop one that runs already (systemctl stop ollama, or quit its"
        " app); what it says is in ollama.log",
        "Ollama works on one batch at a time; each request may have num_ctx tokens",
    ]
    if gpus_in_use > 1:
        notes.append(
            "Ollama orders the cards itself: LLAMA_ARG_TENSOR_SPLIT, which it hands on to llama-server, counts layers "
            "in the order of the card numbers above; `ollama ps` and the server's log show what it did"
        )
    return notes
