"""Apportion divides one large language model among unequal, low-memory devices: planned exactly, certified, and run.

    plan, read_plan, write_plan    the best division of a model, and files of it; needs no torch
    what_if, Changes               the same plan with other devices, links or demands
    LLM, AsyncLLM                  a model that runs on its devices: blocking, and for event loops
    SamplingParams, Request        what is asked of it
    RequestOutput, CompletionOutput, TextToken    what it answers
    Plan, ReplicatedPlan, PlanOptions
    ApportionError and below       every error that a user can cause; see types/errors.py

What a name stands for is imported when it is first used.
"""

from importlib import import_module

from apportion.types.errors import (
    ApportionError,
    ClusterError,
    EngineError,
    InfeasibleError,
    ModelError,
    PlanError,
    QueueFullError,
    UsageError,
)

TYPE_CHECKING = False
"""What only the type checker takes for true: `python -m apportion` imports this file while the current folder comes
first, so that nothing may be imported here which Python itself has not."""

if TYPE_CHECKING:
    from typing import Any

    from apportion.library.llm import LLM, AsyncLLM, CompletionOutput, RequestOutput, TextToken
    from apportion.library.plans import PlanOptions, plan, read_plan, write_plan
    from apportion.planner.explain.whatif import Changes, what_if
    from apportion.types.plan import Plan
    from apportion.types.replicated import ReplicatedPlan
    from apportion.types.request import Request, SamplingParams

__version__ = "0.1.0"

_HOME_OF = {
    "LLM": "library.llm",
    "AsyncLLM": "library.llm",
    "Changes": "planner.explain.whatif",
    "CompletionOutput": "library.llm",
    "Plan": "types.plan",
    "PlanOptions": "library.plans",
    "ReplicatedPlan": "types.replicated",
    "Request": "types.request",
    "RequestOutput": "library.llm",
    "SamplingParams": "types.request",
    "TextToken": "library.llm",
    "plan": "library.plans",
    "read_plan": "library.plans",
    "what_if": "planner.explain.whatif",
    "write_plan": "library.plans",
}

__all__ = [
    "LLM",
    "ApportionError",
    "AsyncLLM",
    "Changes",
    "ClusterError",
    "CompletionOutput",
    "EngineError",
    "InfeasibleError",
    "ModelError",
    "Plan",
    "PlanError",
    "PlanOptions",
    "QueueFullError",
    "ReplicatedPlan",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TextToken",
    "UsageError",
    "plan",
    "read_plan",
    "what_if",
    "write_plan",
]


def __getattr__(name: str) -> "Any":
    if name not in _HOME_OF:
        raise AttributeError(f"module 'apportion' has no attribute '{name}'")
    value = getattr(import_module(f"apportion.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
