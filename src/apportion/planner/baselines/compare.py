"""The usual rules for dividing a model, weighed with the planner's own cost model and memory check.

A rule gives stages; prefill chunk and microbatches are chosen for it, as those with the least objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from apportion.planner.baselines.program import layer_times
from apportion.planner.baselines.rules import (
    Rule,
    balanced_fill,
    compute_proportional,
    even_layers,
    even_tensor,
    greedy_fill,
    memory_proportional,
)
from apportion.planner.problem import Problem, alternatives, plan_problem
from apportion.planner.stages.groups import common_formats
from apportion.planner.weigh import Division, weigh
from apportion.types.errors import InfeasibleError
from apportion.types.plan import Plan

RULES: dict[str, tuple[str, Rule]] = {
    "even layers": ("vLLM pipeline", even_layers),
    "by memory": ("exo, llama.cpp", memory_proportional),
    "by compute": ("Parallax, cake", compute_proportional),
    "greedy fill": ("accelerate (seq.)", greedy_fill),
    "balanced fill": ("accelerate (auto)", balanced_fill),
    "even tensor": ("vLLM tensor", even_tensor),
    "layer times": ("prima.cpp", layer_times),
}
"""Who uses it, and the rule itself, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a rule comes to: a division, or the reason why there is none."""

    rule: str
    used_by: str
    division: Division | None
    why_not: str


def baselines(problem: Problem) -> tuple[Baseline, ...]:
    """Every rule, each with the prefill chunk that is best for it among those the planner chooses from."""
    by_chunk = [baselines_with_chunk(one) for one in alternatives(problem)]
    return tuple(_best(of_rule) for of_rule in zip(*by_chunk, strict=True))


def plan_baselines(plan: Plan) -> tuple[Baseline, ...]:
    """Every rule on the problem that the plan answers."""
    return baselines(plan_problem(plan))


def baselines_with_chunk(problem: Problem) -> tuple[Baseline, ...]:
    """Every rule with the problem's prefill chunk."""
    return tuple(_in_best_format(name, used_by, rule, problem) for name, (used_by, rule) in RULES.items())


def _in_best_format(name: str, used_by: str, rule: Rule, problem: Problem) -> Baseline:
    """The rules know one weight format for all: the best of those that every device has."""
    formats = common_formats(problem.weight_formats, problem.cluster.devices)
    if not formats:
        return Baseline(
            rule=name, used_by=used_by, division=None, why_not="the devices have no weight format in common"
        )
    return _best([_baseline(name, used_by, rule, problem.in_format(one)) for one in formats])


def _baseline(name: str, used_by: str, rule: Rule, problem: Problem) -> Baseline:
    try:
        division = weigh(problem, rule(problem))
    except InfeasibleError as error:
        return Baseline(rule=name, used_by=used_by, division=None, why_not=str(error))
    return Baseline(rule=name, used_by=used_by, division=division, why_not="")


def _best(of_rule: Sequence[Baseline]) -> Baseline:
    """Where none is feasible, the last: the smallest chunk or narrowest format, which needs the least memory."""
    values = {index: one.division.value for index, one in enumerate(of_rule) if one.division}
    return of_rule[min(values, key=lambda index: values[index])] if values else of_rule[-1]
