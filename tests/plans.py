"""Plans laid out by hand, for tests that need a given division rather than the best one."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from apportion.cost.estimate import plan_estimate
from apportion.cost.memory import plan_memory
from apportion.cost.step_costs import step_costs
from apportion.cost.streaming import evenly_streamed
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import ModelSpec
from apportion.types.plan import (
    PLAN_VERSION,
    Balance,
    Certificate,
    Estimate,
    Plan,
    Stage,
    TensorSplit,
    Uncertainty,
)
from apportion.types.step_costs import even_costs
from apportion.types.units import FORMAT_BYTES
from apportion.types.workload import Workload

GIB = 2**30
BLOCK_TOKENS = 4
CERTAIN = Uncertainty(ttft=0, tpot=0, tokens_per_s=0, source="")


def cpu_device(device_id: str, memory_bytes: int = GIB, speed: float = 1.0) -> Device:
    return Device(
        id=device_id,
        host="local",
        kind="cpu",
        torch_device="cpu",
        memory_bytes=memory_bytes,
        reserved_bytes=0,
        mem_bytes_per_s=2e10 * speed,
        flops_per_s=dict.fromkeys(FORMAT_BYTES, 7e10 * speed),
        layer_overhead_s=2.2e-4 / speed,
        step_overhead_s=8e-4 / speed,
        num_threads=1,
        host_cores=None,
        speed=speed,
        source="measured",
    )


def cut(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Integer shares of `total` in the ratio of `weights`, each at least 1."""
    num = len(weights)
    ends = [round(total * part / sum(weights)) for part in accumulate(weights)]
    bounds = [0]
    for i, end in enumerate(ends):
        bounds.append(min(max(end, bounds[-1] + 1), total - (num - 1 - i)))
    return tuple(b - a for a, b in pairwise(bounds))


def hand_plan(
    model: ModelSpec,
    groups: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    concurrency: int = 4,
    max_context_tokens: int = 64,
    chunk_tokens: int = 12,
    microbatches: int | None = None,
    num_kv_blocks: int | None = None,
    weight_format: str = "fp32",
    activation_format: str | None = None,
    kv_format: str | None = None,
    devices: Sequence[Device] | None = None,
    streamed: Sequence[int] = (),
) -> Plan:
    """`groups[i]` are the share weights of stage i's members, `layers[i]` its number of layers and `streamed[i]` how
    many of them are streamed; one device a member."""
    assert sum(layers) == model.num_layers
    num_members = sum(len(weights) for weights in groups)
    devices = devices or [cpu_device(f"d{i}") for i in range(num_members)]
    ids = iter(device.id for device in devices)
    starts = [0, *accumulate(layers)]
    stages = []
    for i, weights in enumerate(groups):
        kv_heads = cut(model.kv_heads, weights)
        split = TensorSplit(
            device_ids=tuple(next(ids) for _ in weights),
            q_heads=tuple(h * model.q_heads_per_kv_head for h in kv_heads),
            kv_heads=kv_heads,
            ffn_columns=cut(model.ffn_columns, weights),
            vocab_rows=cut(model.vocab_rows, weights),
        )
        stages.append(
            Stage(
                layer_start=starts[i],
                layer_stop=starts[i + 1],
                split=split,
                weight_format=weight_format,
                activation_format=activation_format or weight_format,
                kv_format=kv_format or activation_format or weight_format,
                has_embedding=i == 0,
                has_head=i == len(groups) - 1,
                streamed_layers=evenly_streamed(model, starts[i], starts[i + 1], streamed[i])
                if streamed
                else (),
            )
        )
    blocks = num_kv_blocks or concurrency * -(-max_context_tokens // BLOCK_TOKENS)
    hosts = sorted({device.host for device in devices})
    links = [
        Link(src=src, dst=dst, latency_s=6e-5, bytes_per_s=1.5e9)
        for src in hosts
        for dst in hosts
        if src <= dst
    ]
    cluster = Cluster(devices=tuple(devices), links=tuple(links))
    nothing = Estimate(
        ttft_s=0, tpot_s=0, tokens_per_s=0, stage_s=(), link_s=(), bottleneck="", uncertainty=CERTAIN
    )
    plan = Plan(
        version=PLAN_VERSION,
        model=model,
        cluster=cluster,
        workload=Workload(
            prompt_tokens=8,
            output_tokens=8,
            concurrency=concurrency,
            max_context_tokens=max_context_tokens,
            objective="latency",
        ),
        weight_formats=(weight_format,),
        stages=tuple(stages),
        memory={},
        block_tokens=BLOCK_TOKENS,
        num_kv_blocks=blocks,
        microbatches=microbatches or len(groups),
        chunk_tokens=chunk_tokens,
        estimate=nothing,
        certificate=Certificate(objective="latency", value=1, lower_bound=1, gap=0, method="by hand"),
        balance=Balance(epsilon_s=0, smallest_epsilon_s=0),
        step_costs=even_costs(len(stages)),
    )
    return replace(plan, memory=plan_memory(plan), step_costs=step_costs(plan), estimate=plan_estimate(plan))
