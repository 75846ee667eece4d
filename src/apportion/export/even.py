"""The division rule that vLLM and SGLang share: every stage a group of the same size, equal shares inside."""

from collections import Counter
from itertools import groupby
from math import gcd

from apportion.export.accelerators import visible
from apportion.export.launch import EngineDivision
from apportion.export.price import division_tokens_per_s, overfull
from apportion.export.regroup import Group, can_share_equally, gpu_members, regroup
from apportion.types.errors import PlanError
from apportion.types.plan import Plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def even_division(plan: Plan, engine: str) -> EngineDivision:
    """The fastest such division of the plan's GPUs, of those that fit if any does.

    Raises PlanError for a plan without GPUs, or one whose hosts take turns in the pipeline.
    """
    members = gpu_members(plan)
    sizes = [len(group) for group in members if group]
    if not sizes:
        raise PlanError(
            f"{engine} divides a model among CUDA or ROCm devices, and this plan has none; use --to llama.cpp"
        )
    _check_host_order(members, engine)
    largest = gcd(*sizes)
    divisions: list[EngineDivision] = []
    for size in range(largest, 0, -1):
        if largest % size == 0 and can_share_equally(plan.model, size):
            stages = regroup(plan, members, size)
            microbatches = min(len(stages), plan.workload.concurrency)
            divisions.append(EngineDivision(stages=stages, microbatches=microbatches, pipelined_prefill=True))
    return max(divisions, key=lambda one: (not overfull(plan, one), division_tokens_per_s(plan, one)))


def _check_host_order(members: tuple[Group, ...], engine: str) -> None:
    hosts = [host for host, _ in groupby(device.host for group in members for device in group)]
    if len(hosts) != len(set(hosts)):
        raise PlanError(
            f"{engine} keeps the stages of a host together, and this plan passes {' → '.join(hosts)}; "
            "use --to llama.cpp"
        )


def stages_by_host(plan: Plan, division: EngineDivision) -> Counter[str]:
    """How many stages each host has, in pipeline order."""
    return Counter(plan.cluster.device(stage.split.device_ids[0]).host for stage in division.stages)


def host_variables(plan: Plan, division: EngineDivision, host: str) -> dict[str, str]:
    """Show a host's devices in rank order: ranks take the visible devices one after another."""
    used = (
        plan.cluster.device(device_id) for stage in division.stages for device_id in stage.split.device_ids
    )
    return visible([device for device in used if device.host == host])


def dtype(plan: Plan) -> str:
    """Of activations; of quantised weights the checkpoint itself says what they are."""
    return DTYPES[plan.activation_format]


def layer_partition(division: EngineDivision) -> str:
    return ",".join(str(stage.num_layers) for stage in division.stages)
