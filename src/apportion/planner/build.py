"""From model, cluster and workload to a plan: search, then estimate, certify and check the balance."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from apportion.cost.kv_capacity import with_kv_rooms
from apportion.cost.memory import plan_memory
from apportion.cost.service import check_kv_tokens
from apportion.cost.step_costs import step_costs
from apportion.cost.traffic import not_joined
from apportion.planner.balance import balance
from apportion.planner.bounds.bound import certify
from apportion.planner.bounds.fewest import prove_fewest
from apportion.planner.communication.find import least_communication
from apportion.planner.demand import find_demanded
from apportion.planner.divide import search
from apportion.planner.finder import Finder
from apportion.planner.found import Found
from apportion.planner.host_room import find_with_host_room, without_host_memory
from apportion.planner.infeasible.constraints import check_constraints, constraints_error
from apportion.planner.infeasible.error import infeasible_error
from apportion.planner.infeasible.host_memory import host_memory_error
from apportion.planner.infeasible.limits import limits_error, without_limits
from apportion.planner.infeasible.relief import Demand, changes, least_memory
from apportion.planner.problem import alternatives, chunk_candidates, make_problem
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import UNCONSTRAINED, Constraints
from apportion.types.errors import InfeasibleError
from apportion.types.model import ModelSpec
from apportion.types.plan import PLAN_VERSION, Certificate, Plan
from apportion.types.step_costs import even_costs
from apportion.types.workload import Workload


def find_division(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    constraints: Constraints = UNCONSTRAINED,
    *,
    streaming: bool = True,
) -> Found | None:
    """The best division that holds all its weights; where there is none and `streaming` is allowed, the best of those
    that stream some. None where nothing fits, or keeps limits and constraints. Raises InfeasibleError for an
    arrival rate that cannot be served, or a balance that no division keeps."""
    if workload.objective == "communication":
        smallest = chunk_candidates(workload.max_context_tokens)[-1]
        problem = make_problem(model, cluster, workload, weight_formats, smallest, constraints)
        return least_communication(problem.with_each_coordinator())

    held = find_demanded(workload, Finder(model, cluster, weight_formats, constraints, streaming=False))
    if held is not None or not streaming or constraints.engine is not None:
        return held

    def find(where: Cluster) -> Found | None:
        return find_demanded(workload, Finder(model, where, weight_formats, constraints, streaming=True))

    return find_with_host_room(cluster, find)


def fits(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    constraints: Constraints = UNCONSTRAINED,
    *,
    streaming: bool = True,
) -> bool:
    """Whether any division holds this workload, however slow."""
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    alone = replace(
        workload,
        objective="latency",
        prompt_tokens=1,
        output_tokens=1,
        arrival_rate=None,
        ttft_limit_s=None,
        tpot_limit_s=None,
    )
    problem = make_problem(model, cluster, alone, weight_formats, chunk_tokens, constraints)

    def find(where: Cluster, *, streaming: bool) -> Found | None:
        asked = replace(problem, cluster=where, streaming=streaming)
        found = (search(one) for one in asked.with_each_coordinator())
        return next((one for one in found if one is not None), None)

    if find(cluster, streaming=False) is not None:
        return True
    if not streaming:
        return False

    return find_with_host_room(cluster, partial(find, streaming=True)) is not None


def _found(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    constraints: Constraints,
    cards: Sequence[Device],
    *,
    streaming: bool,
) -> Found:
    """Raises InfeasibleError for what stands in the way: limits, or memory."""
    found = find_division(model, cluster, workload, weight_formats, constraints, streaming=streaming)
    if found is None and workload.limited:
        free = without_limits(workload)
        unlimited = find_division(model, cluster, free, weight_formats, constraints, streaming=streaming)
        if unlimited is not None:
            raise limits_error(workload, unlimited)
    if found is None:
        demand = Demand(
            model=model,
            cluster=cluster,
            workload=workload,
            weight_formats=weight_formats,
            fits=partial(fits, constraints=constraints, streaming=streaming),
            fits_streamed=None
            if streaming or not _may_stream(workload, constraints)
            else partial(fits, constraints=constraints, streaming=True),
            cards=cards,
            constraints=constraints,
        )
        roomy = replace(demand, cluster=without_host_memory(cluster))
        elsewhere = (
            find_division(model, roomy.cluster, workload, weight_formats, constraints) if streaming else None
        )
        raise (
            host_memory_error(demand, elsewhere) if elsewhere else _nothing_fits(demand, streaming=streaming)
        )
    return found


def _nothing_fits(demand: Demand, *, streaming: bool) -> InfeasibleError:
    model, cluster, workload = demand.model, demand.cluster, demand.workload
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    problem = make_problem(model, cluster, workload, demand.weight_formats, chunk_tokens, demand.constraints)

    def fits_with(constraints: Constraints) -> bool:
        return fits(model, cluster, workload, demand.weight_formats, constraints, streaming=streaming)

    def helping() -> Sequence[str]:
        return tuple(changes(demand, least_memory(demand)))

    return constraints_error(problem, fits_with, helping) or infeasible_error(demand)


def _certificate(found: Found) -> Certificate:
    certificate = certify(alternatives(found.problem), found.value)
    if found.problem.workload.objective != "fewest-devices":
        return certificate
    num_used = sum(stage.split.size for stage in found.stages)
    return replace(certificate, fewest_devices=prove_fewest(found.problem, num_used))


def make_plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: tuple[str, ...],
    constraints: Constraints = UNCONSTRAINED,
    *,
    streaming: bool = True,
    cards: Sequence[Device] = (),
) -> Plan:
    """The best division of the model, certified. Layers are streamed where nothing fits otherwise and `streaming`.
    `cards` are those that an error may advise to add, smallest first.

    Raises InfeasibleError where the devices cannot hold it, or keep its limits; ClusterError where one lacks a rate it
    needs; UsageError for a KV cache that is too small for the workload, or constraints that it does not go with.
    """
    check_kv_tokens(workload)
    check_constraints(model, cluster, workload, constraints)
    streaming = streaming and _may_stream(workload, constraints)
    return certified(
        _found(model, cluster, workload, weight_formats, constraints, cards, streaming=streaming)
    )


def _may_stream(workload: Workload, constraints: Constraints) -> bool:
    """Not for other engines, which do it in other ways or not at all."""
    return workload.objective != "communication" and constraints.engine is None


def certified(found: Found) -> Plan:
    """The division's plan, with its certificate over all that its search chose from."""
    problem, stages, chunk_tokens = found.problem, found.stages, found.problem.capacity.chunk_tokens
    model, cluster, workload = problem.model, problem.cluster, problem.workload
    made = Plan(
        version=PLAN_VERSION,
        model=model,
        cluster=cluster,
        workload=workload,
        weight_formats=problem.weight_formats,
        stages=stages,
        memory={},
        block_tokens=problem.capacity.block_tokens,
        num_kv_blocks=problem.capacity.num_kv_blocks,
        microbatches=found.microbatches,
        chunk_tokens=chunk_tokens,
        estimate=problem.estimate(stages, found.microbatches),
        certificate=_certificate(found),
        balance=balance(problem, stages, found.microbatches),
        constraints=problem.constraints,
        not_joined=not_joined(cluster, stages),
        step_costs=even_costs(len(stages)),
    )
    return with_kv_rooms(replace(made, memory=plan_memory(made), step_costs=step_costs(made)))
