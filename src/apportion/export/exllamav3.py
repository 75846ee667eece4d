"""A plan as the loader arguments that exllamav3's programs share.

Looked at: exllamav3 1.4.1 (4f8ad01), model_init.py (`-gs`: GiB for each visible device, `-tp`, `-cs` tokens of cache),
model/model_ls.py (devices are filled in order, each to its limit) and model/model_tp_alloc.py (`initial_split`:
shares follow the memory limits).
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil

from apportion.cost.memory import plan_capacity, stages_memory
from apportion.export.accelerators import visible
from apportion.export.differences import differences
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.regroup import Group, apportion_units, gpu_members, one_stage, regroup
from apportion.export.weights import one_weight_format, weight_bits, weight_notes
from apportion.types.errors import PlanError
from apportion.types.plan import Plan, Stage

GIB = 2**30
CACHE_PAGE_TOKENS = 256


def to_exllamav3(plan: Plan) -> Export:
    """Raises PlanError where no GPU takes part, or GPUs are on several hosts."""
    members = gpu_members(plan)
    gpus = [device for group in members for device in group]
    hosts = list(dict.fromkeys(device.host for device in gpus))
    if not hosts:
        raise PlanError("exllamav3 runs on CUDA or ROCm devices, and this plan has none; use --to llama.cpp")
    if len(hosts) > 1:
        raise PlanError(f"exllamav3 runs on one host, and this plan uses {', '.join(hosts)}; use --to vllm")
    division = EngineDivision(stages=_stages(plan, members), microbatches=1, pipelined_prefill=False)
    return Export(
        launches=(
            Launch(
                host=hosts[0],
                variables=visible(gpus),
                command=_command(plan, division),
            ),
        ),
        device_map=None,
        division=division,
        notes=(*differences(plan, division.stages, "exllamav3"), *_notes(plan, division)),
    )


def _stages(plan: Plan, members: Sequence[Group]) -> tuple[Stage, ...]:
    """One group over all GPUs where that is the plan, else a pipeline of single GPUs."""
    if len(members) > 1 or len(members[0]) < plan.stages[0].split.size:
        return regroup(plan, members, 1)
    weights = [Fraction(plan.memory[device.id].weights_bytes) for device in members[0]]
    return one_stage(plan, weights, apportion_units)


def _command(plan: Plan, division: EngineDivision) -> tuple[str, ...]:
    tokens = plan.num_kv_blocks * plan.block_tokens
    return (
        *("python", "examples/chat.py", "-m", MODEL),
        *("-gs", ",".join(f"{size:.2f}" for size in _limits_gib(plan, division))),
        *(("-tp",) if division.stages[0].split.size > 1 else ()),
        *("-cs", str(ceil(tokens / CACHE_PAGE_TOKENS) * CACHE_PAGE_TOKENS)),
        *("-ambs", str(plan.workload.concurrency)),
    )


def _limits_gib(plan: Plan, division: EngineDivision) -> list[float]:
    """What the division lets each device hold, rounded up.

    A group shares by the limits' ratio; in a pipeline the last may use all it has, so that nothing is left over.
    """
    memory = stages_memory(plan.model, plan.cluster, division.stages, plan_capacity(plan), affine=False)
    sizes = [used.engine_bytes for used in memory.values()]
    if division.stages[0].split.size == 1:
        sizes[-1] = max(sizes[-1], plan.cluster.device(list(memory)[-1]).usable_bytes)
    return [ceil(size * 100 / GIB) / 100 for size in sizes]


def _notes(plan: Plan, division: EngineDivision) -> list[str]:
    notes = [
        f"exllamav3 computes in fp16 from fp16 or EXL3 weights; the plan's bytes are for "
        f"{one_weight_format(plan)} ({weight_bits(plan):.3g} bits a parameter)",
        *weight_notes(plan, "exllamav3"),
    ]
    if division.stages[0].split.size > 1:
        notes.append("exllamav3 cuts attention and FFN by the memory left at each layer, not by given shares")
    elif len(division.stages) > 1:
        notes.append(
            "exllamav3 fills devices up to -gs in order, so layer counts follow from bytes and may be off by one"
        )
        notes.append("exllamav3 works on one batch at a time: stages wait for each other")
    return notes
