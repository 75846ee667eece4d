"""Plans within what another engine can do: the best that the planner finds, or a given one that the engine can execute
as it is, both with the engine's own buffers left free."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol

from apportion.cost.kv_capacity import with_kv_rooms, with_most_kv
from apportion.cost.memory import kv_blocks, plan_memory
from apportion.cost.service import least_kv_tokens
from apportion.export.limits import (
    ABILITIES,
    Ability,
    EngineProblem,
    engine_problems,
    without_buffers,
)
from apportion.types.cluster import Cluster
from apportion.types.constraints import Constraints
from apportion.types.errors import InfeasibleError
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage
from apportion.types.workload import Workload


class Planner(Protocol):
    """What of the planner is needed: the best division without layers that are streamed, quickly or certified."""

    def best(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        weight_formats: tuple[str, ...],
        constraints: Constraints,
    ) -> tuple[float, tuple[Stage, ...]] | None:
        """Its objective and stages; None where nothing fits."""
        ...

    def plan(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        weight_formats: tuple[str, ...],
        constraints: Constraints,
    ) -> Plan:
        """Raises InfeasibleError where nothing fits."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A division in one weight format that the engine can execute."""

    value: float
    problem: EngineProblem
    weight_format: str
    stages: tuple[Stage, ...]


def plan_within(
    engine: str,
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: Sequence[str],
    constraints: Constraints,
    planner: Planner,
) -> Plan:
    """The best plan that the engine can execute, in one weight format.

    Raises PlanError where the engine has no use for the devices, InfeasibleError where they cannot hold the model.
    """
    ability = ABILITIES[engine]
    chosen = best_within(engine, model, cluster, workload, weight_formats, constraints, planner)
    if chosen is not None:
        return _planned(model, chosen.problem, (chosen.weight_format,), planner)
    first = next(engine_problems(ability, model, cluster, workload, constraints))[0]
    plan = _planned(model, first, (weight_formats[-1],), planner)
    raise InfeasibleError(
        f"{ability.title} cannot execute the only divisions that fit: it wants "
        + ("equally many stages on each host" if ability.alike_hosts else "a host's stages together")
        + f", and they pass {' → '.join(_hosts(plan.cluster, plan.stages))}; use llama.cpp (--for or --to llama.cpp)"
    )


def best_within(
    engine: str,
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: Sequence[str],
    constraints: Constraints,
    planner: Planner,
) -> Candidate | None:
    """None where nothing fits. Raises PlanError where the engine has no use for the devices."""
    ability = ABILITIES[engine]
    for problems in engine_problems(ability, model, cluster, workload, constraints):
        found: list[Candidate] = []
        for problem in problems:
            for name in weight_formats:
                best = planner.best(model, problem.cluster, problem.workload, (name,), problem.constraints)
                if best is not None and _in_its_order(ability, problem.cluster, best[1]):
                    value, stages = best
                    found.append(Candidate(value=value, problem=problem, weight_format=name, stages=stages))
        if found:
            return min(found, key=lambda one: one.value)
    return None


def _planned(model: ModelSpec, problem: EngineProblem, formats: tuple[str, ...], planner: Planner) -> Plan:
    return planner.plan(model, problem.cluster, problem.workload, formats, problem.constraints)


def fitted(plan: Plan, engine: str, planner: Planner) -> Plan:
    """The plan, where it is made for the engine or the engine can execute it as it is; else one made anew.

    Raises PlanError where the engine has no use for the devices, InfeasibleError where they cannot hold the model."""
    limits = plan.constraints.engine
    if limits is not None and limits.name == ABILITIES[engine].title:
        return plan
    return _as_it_is(plan, engine) or _anew(plan, engine, planner)


def _anew(plan: Plan, engine: str, planner: Planner) -> Plan:
    workload, filled = plan.workload, plan.num_kv_blocks > kv_blocks(plan.workload, plan.block_tokens)
    if filled:  # planned for the least, then given what is left
        workload = replace(workload, kv_tokens=least_kv_tokens(workload))
    cluster = without_buffers(plan.cluster, plan.constraints)
    constraints = replace(plan.constraints, engine=None, groups="any")
    after = plan_within(engine, plan.model, cluster, workload, plan.weight_formats, constraints, planner)
    return with_most_kv(after) if filled else after


def with_prefill_steps(plan: Plan, engine: str) -> Plan:
    """The plan with prompts taken in as the engine does by itself, or as much of that at once as memory holds.

    A plan's own chunk is the least that is as fast by its cost model; engines are made for more."""
    most = ABILITIES[engine].prefill_tokens
    chunk_tokens = min(most or 0, plan.workload.max_context_tokens)
    while chunk_tokens > plan.chunk_tokens:
        workload = plan.workload
        if workload.window_extra_tokens is not None:
            workload = replace(workload, window_extra_tokens=chunk_tokens)
        larger = replace(plan, chunk_tokens=chunk_tokens, workload=workload)
        memory = plan_memory(larger)
        if all(used.total_bytes <= plan.cluster.device(name).memory_bytes for name, used in memory.items()):
            return replace(larger, memory=memory)
        chunk_tokens //= 2
    return plan


def _as_it_is(plan: Plan, engine: str) -> Plan | None:
    """With the engine's buffers; None where they leave too little, or the engine cannot execute it."""
    ability = ABILITIES[engine]
    if len(plan.weight_formats_in_use) > 1 or any(stage.streamed_layers for stage in plan.stages):
        return None
    cluster = without_buffers(plan.cluster, plan.constraints)
    constraints = replace(plan.constraints, engine=None)
    for problems in engine_problems(ability, plan.model, cluster, plan.workload, constraints):
        for problem in problems:
            if not _executes(ability, plan, problem):
                continue
            held = replace(
                plan,
                cluster=problem.cluster,
                workload=problem.workload,
                constraints=problem.constraints,
                num_swap_blocks=0,
            )
            memory = plan_memory(held)
            if all(
                used.total_bytes <= held.cluster.device(name).memory_bytes for name, used in memory.items()
            ):
                return with_kv_rooms(replace(held, memory=memory))
    return None


def _executes(ability: Ability, plan: Plan, problem: EngineProblem) -> bool:
    limits, known = problem.constraints.engine, {device.id for device in problem.cluster.devices}
    assert limits is not None
    if not set(plan.device_ids) <= known:
        return False
    splits = [stage.split for stage in plan.stages]
    even = all(len(set(split.kv_heads)) == 1 and len(set(split.ffn_columns)) == 1 for split in splits)
    sizes = {split.size for split in splits}
    return even and sizes == {limits.group_size} and _in_its_order(ability, problem.cluster, plan.stages)


def _in_its_order(ability: Ability, cluster: Cluster, stages: Sequence[Stage]) -> bool:
    """Whether CPUs and hosts stand where the engine wants them."""
    main = cluster.devices[0].host
    devices = [cluster.device(stage.split.device_ids[0]) for stage in stages]
    if ability.cpu_first and any(one.kind == "cpu" and one.host == main for one in devices[1:]):
        return False
    hosts = _hosts(cluster, stages)
    if ability.hosts_together and len(hosts) != len(set(hosts)):
        return False
    counts = [sum(one.host == host for one in devices) for host in set(hosts)]
    return not ability.alike_hosts or len(set(counts)) == 1


def _hosts(cluster: Cluster, stages: Sequence[Stage]) -> list[str]:
    """As the stages pass them."""
    devices = (cluster.device(stage.split.device_ids[0]) for stage in stages)
    return [host for host, _ in groupby(device.host for device in devices)]
