"""A plan as the loader arguments that exllamav3's programs share.

Looked at: exllamav3 1.4.1 (4f8ad01), model_init.py (`-gs`: GiB for each visible device, `-tp`, `-cs` tokens of cache,
`-cq` its bits), model/model_ls.py (devices are filled in order, each to its limit) and model/model_tp_alloc.py
(`initial_split`: shares follow the memory limits).
"""

from math import ceil

from apportion.cost.memory import plan_memory
from apportion.export.accelerators import numbers_note, visible
from apportion.export.kv_formats import kv_name
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.weights import one_weight_format, weight_bits, weight_notes
from apportion.types.plan import Plan

GIB = 2**30
CACHE_PAGE_TOKENS = 256


def to_exllamav3(plan: Plan) -> Export:
    gpus = [plan.cluster.device(name) for name in plan.device_ids]
    return Export(
        launches=(Launch(host=gpus[0].host, variables=visible(gpus), command=_command(plan)),),
        device_map=None,
        division=EngineDivision(stages=plan.stages, microbatches=1, pipelined_prefill=False),
        notes=(*numbers_note(gpus), *_notes(plan)),
    )


def _command(plan: Plan) -> tuple[str, ...]:
    tokens = plan.num_kv_blocks * plan.block_tokens
    bits = kv_name(plan, "exllamav3")
    return (
        *("python", "examples/chat.py", "-m", MODEL),
        *("-gs", ",".join(f"{size:.2f}" for size in _limits_gib(plan))),
        *(("-tp",) if plan.stages[0].split.size > 1 else ()),
        *("-cs", str(ceil(tokens / CACHE_PAGE_TOKENS) * CACHE_PAGE_TOKENS)),
        *(("-cq", bits) if bits != "16" else ()),
        *("-ambs", str(plan.workload.concurrency)),
    )


def _limits_gib(plan: Plan) -> list[float]:
    """What the plan lets each device hold, rounded up.

    A group shares by the limits' ratio; in a pipeline the last may use all it has, so that nothing is left over.
    """
    memory = plan_memory(plan)
    sizes = [used.engine_bytes for used in memory.values()]
    if plan.stages[0].split.size == 1:
        sizes[-1] = max(sizes[-1], plan.cluster.device(list(memory)[-1]).usable_bytes)
    return [ceil(size * 100 / GIB) / 100 for size in sizes]


def _notes(plan: Plan) -> list[str]:
    notes = [
        f"exllamav3 computes in fp16 from fp16 or EXL3 weights; the plan's bytes are for "
        f"{one_weight_format(plan)} ({weight_bits(plan):.3g} bits a parameter)",
        *weight_notes(plan, "exllamav3"),
    ]
    if plan.stages[0].split.size > 1:
        notes.append("exllamav3 cuts attention and FFN by the memory left at each layer, not by given shares")
    elif len(plan.stages) > 1:
        notes.append(
            "exllamav3 fills devices up to -gs in order, so layer counts follow from bytes and may be off by one"
        )
        notes.append("exllamav3 works on one batch at a time: stages wait for each other")
    return notes
