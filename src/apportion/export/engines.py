"""The engines a plan can be exported to, by the name that `--to` and `--for` take."""

from collections.abc import Callable
from dataclasses import replace

from apportion.cost.memory import kv_blocks, plan_capacity, plan_memory
from apportion.cost.shard import stage_formats
from apportion.cost.traffic import coordinator_host
from apportion.export.accelerate import to_accelerate
from apportion.export.differences import differences
from apportion.export.exllamav3 import to_exllamav3
from apportion.export.experts import ExpertSplit, best_expert_split
from apportion.export.launch import Export
from apportion.export.limits import (
    ABILITIES,
    engine_of,
    engine_problems,
    too_old_note,
    without_buffers,
)
from apportion.export.llama_cpp import expert_export, group_export, to_llama_cpp
from apportion.export.mlx import to_mlx
from apportion.export.ollama import expert_ollama_export, to_ollama
from apportion.export.price import cost_sentence, division_tokens_per_s, price_sentence
from apportion.export.regroup import one_stage
from apportion.export.sglang import to_sglang
from apportion.export.vllm import to_vllm
from apportion.export.within import Planner, fitted, with_prefill_steps
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Plan
from apportion.types.units import WEIGHT_BITS, format_bytes

TRANSLATIONS: dict[str, Callable[[Plan], Export]] = {
    "vllm": to_vllm,
    "sglang": to_sglang,
    "llama.cpp": to_llama_cpp,
    "ollama": to_ollama,
    "accelerate": to_accelerate,
    "exllamav3": to_exllamav3,
}
"""Of plans within what the engine can do."""
ENGINES = (*TRANSLATIONS, "mlx")
PLANNED_FOR = tuple(TRANSLATIONS)
Q8_0_BITS = 8.5
EXPERT_ENGINES = ("llama.cpp", "ollama")
"""Those that can hold experts in host memory and all else of a layer on a GPU."""
"""Those whose divisions are enough like ours to plan for from the start."""
MEANT = {
    "llamacpp": "llama.cpp",
    "llama-server": "llama.cpp",
    "gguf": "llama.cpp",
    "lm-studio": "llama.cpp",
    "koboldcpp": "llama.cpp",
    "tabbyapi": "exllamav3",
    "exllamav2": "exllamav3",
    "transformers": "accelerate",
    "hf": "accelerate",
    "huggingface": "accelerate",
    "mlx-lm": "mlx",
    "exo": "mlx",
}
"""What people call them, or what runs them."""


def export(plan: Plan, engine: str, planner: Planner) -> Export:
    """The plan in that engine's terms, if need be planned again within what the engine can do; of several ways the
    fastest. The last note is what it costs.

    Raises PlanError where the engine has no use for the devices, InfeasibleError where they cannot hold the model.
    """
    if engine == "mlx":
        return to_mlx(plan)
    ways = [*_other_ways(plan, engine)]
    try:
        made = fitted(plan, engine, planner)
    except InfeasibleError:
        if not ways:
            raise
    else:
        ways.append(_translated(plan, made, engine))
    return max(ways, key=lambda way: way[0])[1]


def _translated(plan: Plan, made: Plan, engine: str) -> tuple[float, Export]:
    told = with_prefill_steps(made, engine)
    exported = TRANSLATIONS[engine](told)
    assert exported.division is not None
    title = ABILITIES[engine].title
    notes = (
        *differences(plan, made.stages, title),
        *too_old_note(ABILITIES[engine], plan.cluster),
        *exported.notes,
        price_sentence(plan, made, exported.division),
    )
    needed = {name: used.total_bytes for name, used in plan_memory(told).items()}
    if engine in EXPERT_ENGINES:
        needed = _in_q8_0(told, needed)
    return division_tokens_per_s(made, exported.division), replace(exported, notes=notes, needed_bytes=needed)


def _in_q8_0(plan: Plan, needed: dict[str, int]) -> dict[str, int]:
    """By device, with Q8_0 in place of int8: a scale for every 32 weights. Raises InfeasibleError."""
    memory = plan_memory(plan)
    for stage in plan.stages:
        for name in stage.split.device_ids if stage.weight_format == "int8" else ():
            more = memory[name].weights_bytes * (Q8_0_BITS / WEIGHT_BITS["int8"] - 1)
            needed = {**needed, name: needed[name] + round(more)}
            has = plan.cluster.device(name).memory_bytes
            if needed[name] > has:
                raise InfeasibleError(
                    f"{name} needs {format_bytes(needed[name])} with a Q8_0 file, has {format_bytes(has)}: int8 is"
                    f" {Q8_0_BITS:g} bits a weight there; plan with --weights q8_0 --for llama.cpp"
                )
    return needed


def _other_ways(plan: Plan, engine: str) -> list[tuple[float, Export]]:
    """Divisions that are none of the planner's: experts in host memory, and one group at the plan's own ratio."""
    if engine not in EXPERT_ENGINES:
        return []
    ways = [_experts(plan, engine)]
    if engine == "llama.cpp" and len(plan.stages) == 1 and plan.stages[0].split.size > 1:
        ways += [
            _group(plan, ratio) for ratio in (plan.stages[0].split.kv_heads, plan.stages[0].split.ffn_columns)
        ]
    return [way for way in ways if way is not None]


def _problems(plan: Plan, engine: str) -> list[Plan]:
    """The plan on the engine's devices with its buffers, of most tokens at once first; its stages may be others."""
    ability, cluster = ABILITIES[engine], without_buffers(plan.cluster, plan.constraints)
    constraints = replace(plan.constraints, engine=None)
    return [
        replace(plan, cluster=one.cluster, workload=one.workload, constraints=one.constraints)
        for some in engine_problems(ability, plan.model, cluster, plan.workload, constraints)
        for one in some
    ]


def faster_experts(plan: Plan) -> ExpertSplit | None:
    """Of a plan for an engine that can hold experts in host memory and all else on GPUs: that division, where it is
    faster, which is the one that `export` then prints."""
    limits = plan.constraints.engine
    if limits is None or engine_of(limits) not in EXPERT_ENGINES:
        return None
    found = _expert_split(plan, engine_of(limits))
    return found[1] if found and found[1].tokens_per_s > plan.estimate.tokens_per_s else None


def _experts(plan: Plan, engine: str) -> tuple[float, Export] | None:
    found = _expert_split(plan, engine)
    if found is None:
        return None
    held, split = found
    to = expert_export if engine == "llama.cpp" else expert_ollama_export
    exported = to(held, split)
    notes = (split.statement, *exported.notes, cost_sentence(plan, split.tokens_per_s, split.tpot_s))
    return split.tokens_per_s, replace(exported, notes=notes, needed_bytes=split.needed_bytes)


def _expert_split(plan: Plan, engine: str) -> tuple[Plan, ExpertSplit] | None:
    """The problem with the most tokens at once that fits, with the best split of it."""
    for held in _problems(plan, engine):
        found: list[tuple[ExpertSplit, str]] = []
        assert held.constraints.engine is not None
        for name in plan.weight_formats:
            formats = replace(stage_formats(plan.stages[0]), weights=name)
            capacity = replace(
                plan_capacity(held),
                chunk_tokens=held.constraints.engine.step_tokens,
                num_kv_blocks=kv_blocks(held.workload, held.block_tokens),
            )
            split = best_expert_split(
                held.model, held.cluster, held.workload, formats, capacity, held.constraints
            )
            found += [] if split is None else [(split, name)]
        if found:
            split, name = max(found, key=lambda one: one[0].tokens_per_s)
            stages = tuple(replace(stage, weight_format=name) for stage in held.stages)
            return replace(held, stages=stages), split
    return None


def _group(plan: Plan, ratio: tuple[int, ...]) -> tuple[float, Export] | None:
    """The GPUs of the main host that the plan groups, at one ratio; None where they are not, or it does not fit."""
    main = coordinator_host(plan.cluster)
    members = [plan.cluster.device(name) for name in plan.device_ids]
    stage = one_stage(plan, plan.device_ids, ratio)
    alike = len({device.kind for device in members}) == 1 and members[0].kind != "cpu"
    if not alike or any(device.host != main for device in members) or 0 in stage.split.kv_heads:
        return None
    for held in _problems(plan, "llama.cpp"):
        made = replace(
            held,
            stages=(stage,),
            num_swap_blocks=0,
            num_kv_blocks=kv_blocks(held.workload, held.block_tokens),
        )
        needed = {name: used.total_bytes for name, used in plan_memory(made).items()}
        if all(size <= made.cluster.device(name).memory_bytes for name, size in needed.items()):
            exported = group_export(made, ratio)
            assert exported.division is not None
            notes = (
                *differences(plan, made.stages, "llama.cpp"),
                *exported.notes,
                price_sentence(plan, made, exported.division),
            )
            tokens_per_s = division_tokens_per_s(made, exported.division)
            return tokens_per_s, replace(exported, notes=notes, needed_bytes=needed)
    return None
