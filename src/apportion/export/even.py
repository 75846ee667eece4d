"""What vLLM and SGLang share: every stage a group of the same size, equal shares inside, stages on GPUs of one make."""

from collections import Counter

from apportion.export.accelerators import visible
from apportion.export.launch import EngineDivision
from apportion.export.limits import PREFILL_TOKENS
from apportion.types.plan import Plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def even_division(plan: Plan) -> EngineDivision:
    return EngineDivision(
        stages=plan.stages,
        microbatches=min(len(plan.stages), plan.workload.concurrency),
        pipelined_prefill=True,
    )


def stages_by_host(plan: Plan) -> Counter[str]:
    """How many stages each host has, in pipeline order."""
    return Counter(plan.cluster.device(stage.split.device_ids[0]).host for stage in plan.stages)


def host_variables(plan: Plan, host: str) -> dict[str, str]:
    """Show a host's devices in rank order: ranks take the visible devices one after another."""
    used = (plan.cluster.device(device_id) for device_id in plan.device_ids)
    return visible([device for device in used if device.host == host])


def dtype(plan: Plan) -> str:
    """Of activations; of quantised weights the checkpoint itself says what they are."""
    return DTYPES[plan.activation_format]


def layer_partition(plan: Plan) -> str:
    return ",".join(str(stage.num_layers) for stage in plan.stages)


def prefill_note(plan: Plan, option: str) -> list[str]:
    """One sentence where prompts are taken in smaller pieces than the engine's own."""
    if plan.chunk_tokens >= min(PREFILL_TOKENS, plan.workload.max_context_tokens):
        return []
    return [
        f"{option} is what memory holds beside weights and KV cache, less than the default of {PREFILL_TOKENS}: "
        "prompts are slower for it; less context or fewer sequences leave room for more"
    ]
