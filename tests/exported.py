"""Plans in other engines' terms, with the planner that the command line gives them."""

from apportion.asked.engine_planner import EnginePlanner
from apportion.export import engines
from apportion.export.launch import Export
from apportion.types.plan import Plan


def export(plan: Plan, engine: str) -> Export:
    return engines.export(plan, engine, EnginePlanner())
