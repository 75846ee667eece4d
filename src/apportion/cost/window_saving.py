"""What an engine that holds only a window of sliding layers would save of a plan's KV cache."""

from dataclasses import replace

from apportion.cost.memory import plan_memory
from apportion.types.plan import Plan
from apportion.types.units import format_bytes

_LEAST_SHARE = 0.1
"""Of the cache, from which it is worth a line."""


def window_saving(plan: Plan) -> list[str]:
    """A line where the plan holds sliding layers whole, and it matters."""
    windows = sum(layer.window_tokens is not None for layer in plan.model.layers)
    if windows == 0 or plan.workload.window_extra_tokens is not None:
        return []
    asked = replace(plan.workload, window_extra_tokens=plan.chunk_tokens)
    sliding = sum(memory.kv_bytes for memory in plan_memory(replace(plan, workload=asked)).values())
    whole = sum(memory.kv_bytes for memory in plan.memory.values())
    if whole - sliding < _LEAST_SHARE * whole:
        return []
    return [
        f"{windows} of {plan.model.num_layers} layers attend to a window, and are planned with all of their context, as"
        f" here: an engine that holds the window alone needs {format_bytes(sliding)} of cache instead of"
        f" {format_bytes(whole)} (--for llama.cpp, or vllm)"
    ]
