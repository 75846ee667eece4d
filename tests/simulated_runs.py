"""What runs on devices of known constants would report."""

from dataclasses import dataclass, replace

from plans import cpu_device, hand_plan

from apportion.calibrate.observation import Observation, observe
from apportion.cost.group_step import group_step_s, members_at_work, stage_members
from apportion.cost.roofline import Step
from apportion.cost.traffic import group_link
from apportion.types.cluster import Device
from apportion.types.model import LayerSpec, ModelSpec, Parameters
from apportion.types.plan import Plan

LAYER = LayerSpec(
    per_kv_head=Parameters(elements=400_000, rows=256, others=0),
    per_ffn_column=Parameters(elements=3072, rows=2, others=0),
    replicated=Parameters(elements=0, rows=2048, others=2048),
    window_tokens=None,
    num_experts=0,
    experts_per_token=0,
)
MODEL = ModelSpec(
    name="synthetic",
    family="llama",
    fingerprint="0",
    layers=(LAYER,) * 12,
    hidden_size=1024,
    q_heads=16,
    kv_heads=8,
    head_dim=64,
    ffn_columns=2816,
    vocab_rows=32000,
    tied_embeddings=False,
    max_context_tokens=4096,
    checkpoint_format="fp32",
)
PROMPT = 200
ASSUMED = cpu_device("d0")
TRUE = replace(
    ASSUMED,
    mem_bytes_per_s=1.5e10,
    flops_per_s=dict.fromkeys(ASSUMED.flops_per_s, 4e10),
    layer_overhead_s=3.5e-4,
    step_overhead_s=5e-4,
)
TRUE_LATENCY_S = 1.4e-4


@dataclass
class Work:
    num_steps: int
    num_sequences: int
    num_tokens: int
    start_tokens: int
    sampled_rows: int
    busy_s: float
    exchange_s: float


def plan_on(device: Device, groups: list[list[int]], layers: list[int], **options: int) -> Plan:
    num = sum(map(len, groups))
    devices = [replace(device, id=f"d{i}") for i in range(num)]
    return hand_plan(
        MODEL, groups, layers, devices=devices, max_context_tokens=512, chunk_tokens=PROMPT, **options
    )


def with_latency(plan: Plan, latency_s: float) -> Plan:
    links = tuple(replace(link, latency_s=latency_s) for link in plan.cluster.links)
    return replace(plan, cluster=replace(plan.cluster, links=links))


def simulated(
    groups: list[list[int]],
    layers: list[int],
    *,
    sequences: int = 1,
    run: str = "1",
    disturbed: float = 1.0,
    hardware: str = "cpu",
    truth: Device = TRUE,
    guess: Device = ASSUMED,
) -> tuple[Observation, ...]:
    """What a run on the true devices would report, observed by one who assumed the others."""
    assumed = with_latency(plan_on(guess, groups, layers), 6e-5)
    true = with_latency(plan_on(truth, groups, layers), TRUE_LATENCY_S)
    overlapping = sequences > 1 and len(groups) > 1
    steps = {
        "prefill": Step(sequences=1, new_tokens=PROMPT, start_tokens=0, sampled_rows=1),
        "decode": Step(sequences=sequences, new_tokens=1, start_tokens=PROMPT + 20, sampled_rows=sequences),
    }
    work: dict[str, dict[str, Work]] = {}
    for stage in true.stages:
        members = stage_members(MODEL, true.cluster, stage)
        members = members_at_work(true.cluster, members, overlapping=overlapping)
        link = group_link(true.cluster, stage.split.device_ids)
        for device, shard in members:
            work[device.id] = {}
            for phase, step in steps.items():
                alone = replace(shard, size=1)
                own_s = disturbed * group_step_s(MODEL, [(device, alone)], None, step)
                busy_s = disturbed * group_step_s(MODEL, members, link, step)
                work[device.id][phase] = Work(
                    num_steps=10,
                    num_sequences=10 * step.sequences,
                    num_tokens=10 * step.tokens,
                    start_tokens=10 * step.start_tokens * step.sequences,
                    sampled_rows=10 * step.sampled_rows,
                    busy_s=10 * busy_s,
                    exchange_s=10 * (busy_s - own_s),
                )
    slowest_s = [max(work[i]["decode"].busy_s for i in s.split.device_ids) / 10 for s in true.stages]
    names = dict.fromkeys(assumed.device_ids, hardware)
    return observe(assumed, work, names, run=run, alone_tpot_s=sum(slowest_s) if sequences == 1 else None)
