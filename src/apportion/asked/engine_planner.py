"""The planner as exports need it."""

from apportion.planner.build import make_plan
from apportion.planner.weigh import best_division
from apportion.types.cluster import Cluster
from apportion.types.constraints import Constraints
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage
from apportion.types.workload import Workload


class EnginePlanner:
    """Plans for other engines hold all their weights: none is streamed."""

    def best(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        weight_formats: tuple[str, ...],
        constraints: Constraints,
    ) -> tuple[float, tuple[Stage, ...]] | None:
        found = best_division(model, cluster, workload, weight_formats, constraints)
        return None if found is None else (found.value, found.stages)

    def plan(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        weight_formats: tuple[str, ...],
        constraints: Constraints,
    ) -> Plan:
        return make_plan(model, cluster, workload, weight_formats, constraints)
