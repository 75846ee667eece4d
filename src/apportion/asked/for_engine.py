"""`--for ENGINE`: a plan within what another engine can do, from the start."""

from dataclasses import replace
from typing import TYPE_CHECKING

from apportion.asked.choices import PlanChoices, StreamChoice
from apportion.types.errors import UsageError
from apportion.types.names import one_of

if TYPE_CHECKING:
    from apportion.asked.plan import Asked
    from apportion.planner.explain.whatif import Maker
    from apportion.types.cluster import Cluster
    from apportion.types.constraints import Constraints
    from apportion.types.model import ModelSpec
    from apportion.types.plan import Plan, Stage
    from apportion.types.workload import Workload


def engine_named(name: str, option: str) -> str:
    """Raises UsageError for one that is not known."""
    from apportion.export.engines import ENGINES, MEANT
    from apportion.types.names import unknown_name

    if name not in ENGINES:
        raise UsageError(f"{option}: {unknown_name('engine', name, ENGINES, meant=MEANT)}")
    return name


def check_engine(choices: PlanChoices) -> None:
    """Raises UsageError for an engine that is not known, or is not planned for, or does not do what else is asked."""
    from apportion.export.engines import PLANNED_FOR

    if choices.for_engine is None:
        return
    engine = engine_named(choices.for_engine, "--for")
    if engine not in PLANNED_FOR:
        raise UsageError(
            f"--for {engine}: it divides evenly or not at all, so there is nothing to plan; "
            f"make a plan without --for, and give it to apportion export --to {engine}"
        )
    for name, given in (("--replicas", choices.replicas), ("--swap-space", choices.swap_space)):
        if given is not None:
            raise UsageError(f"{name} is not for other engines; leave out {name}, or --for {engine}")
    if choices.stream is StreamChoice.AUTO:
        raise UsageError(
            f"--stream auto is not for other engines, which do not stream as this one; leave it out, or --for {engine}"
        )


def plan_for_engine(asked: "Asked", engine: str, constraints: "Constraints") -> "Plan":
    """Raises PlanError where the engine has no use for the devices, InfeasibleError where they cannot hold the
    model."""
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.engines import EXPERT_ENGINES
    from apportion.export.within import plan_within

    if engine in EXPERT_ENGINES and "int8" in asked.weight_formats:
        raise UsageError(
            f"--weights int8 is not a format of {engine}'s files; its files of 8 bits take 8.5 bits a weight: write"
            " --weights q8_0"
        )
    return plan_within(
        engine,
        asked.model,
        asked.cluster,
        asked.workload,
        asked.weight_formats,
        constraints,
        EnginePlanner(),
    )


def maker(plan: "Plan") -> "Maker | None":
    """Who plans again what is for an engine: with its buffers on other devices, for other demands."""
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.limits import engine_of, without_buffers
    from apportion.export.within import plan_within

    limits = plan.constraints.engine
    if limits is None:
        return None

    def make(
        model: "ModelSpec",
        cluster: "Cluster",
        workload: "Workload",
        weight_formats: tuple[str, ...],
        constraints: "Constraints",
    ) -> "Plan":
        return plan_within(
            engine_of(limits),
            model,
            without_buffers(cluster, constraints),
            workload,
            weight_formats,
            replace(constraints, engine=None, groups="any"),
            EnginePlanner(),
        )

    return make


def windows_elsewhere(asked: "Asked") -> str:
    """Of what fits nowhere here: which engines hold it, since their layers with a sliding window keep no more of a
    sequence than that; empty where none does."""
    from apportion.asked.engine_planner import EnginePlanner
    from apportion.export.limits import ABILITIES
    from apportion.export.within import best_within
    from apportion.types.units import format_bytes

    context = asked.workload.max_context_tokens
    if asked.workload.limited or not any(
        (layer.window_tokens or context) < context for layer in asked.model.layers
    ):
        return ""
    found: dict[str, int] = {}
    here_bytes = 0
    for name in (name for name, ability in ABILITIES.items() if ability.windows):
        try:
            best = best_within(
                name,
                asked.model,
                asked.cluster,
                asked.workload,
                asked.weight_formats,
                asked.constraints,
                EnginePlanner(),
            )
        except UsageError:
            continue
        if best is not None:
            found[name] = _kv_bytes(asked, best.stages, best.problem.workload)
            here_bytes = _kv_bytes(asked, best.stages, asked.workload)
    if not found:
        return ""
    return (
        f"; or plan it for another engine, whose sliding-window layers hold no more than their window (KV cache of "
        f"{format_bytes(max(found.values()))} instead of {format_bytes(here_bytes)} here): --for {one_of([*found])}"
    )


def _kv_bytes(asked: "Asked", stages: "tuple[Stage, ...]", workload: "Workload") -> int:
    """Of all devices."""
    from apportion.cost.memory import stages_memory
    from apportion.planner.problem import chunk_candidates, make_problem

    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    problem = make_problem(asked.model, asked.cluster, workload, asked.weight_formats, chunk_tokens)
    memory = stages_memory(asked.model, asked.cluster, stages, problem.capacity)
    return sum(used.kv_bytes for used in memory.values())
