"""A plan as `mlx.launch` with mlx-lm's server, on Apple's GPUs, one a host.

Looked at, at d78bf58 (2026-08-22): mlx_lm/utils.py (`sharded_load`: a tensor group over all hosts, or a pipeline),
mlx_lm/models/pipeline.py (equal numbers of layers, the last on rank 0; what a number of hosts leaves over gets no
place) and which models have `shard` and `pipeline`; MLX's page "Launching Distributed Programs". Divisions are even, so
there are few: every number of hosts, as a tensor group and as a pipeline.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from apportion.cost.memory import plan_memory
from apportion.cost.traffic import host_link
from apportion.export.kv_formats import kv_name
from apportion.export.launch import MODEL, EngineDivision, Export, Launch
from apportion.export.limits import TORCH_BYTES, can_share_equally, without_buffers
from apportion.export.price import division_tokens_per_s, price_sentence
from apportion.export.regroup import make_stage, one_stage
from apportion.export.weights import weight_notes
from apportion.types.cluster import Cluster, Device
from apportion.types.constraints import UNCONSTRAINED
from apportion.types.errors import InfeasibleError, PlanError
from apportion.types.plan import Plan, Stage
from apportion.types.units import format_bytes

SHARDED = frozenset({
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "exaone_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss", "kimi_k25",
    "llama", "longcat_flash", "minimax", "ministral3", "qwen2", "qwen3", "qwen3_5", "step3p5",
})  # fmt: skip
"""Models that mlx-lm divides as a tensor group,"""
PIPELINED = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "ministral3"})
"""and as a pipeline."""
BUFFER_BYTES = TORCH_BYTES
"""Of MLX's allocator; assumed. What the system needs is in a Mac's reserve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    devices: tuple[Device, ...]
    stages: tuple[Stage, ...]
    pipeline: bool


def to_mlx(plan: Plan) -> Export:
    """Raises PlanError where no Apple GPU is there, InfeasibleError where the model does not fit."""
    kv_name(plan, "MLX")
    macs = _macs(plan)
    cluster = replace(without_buffers(plan.cluster, plan.constraints), devices=macs)
    base = replace(
        plan,
        cluster=cluster,
        constraints=UNCONSTRAINED,
        workload=replace(plan.workload, window_extra_tokens=None),
    )
    short: dict[str, int] = {}
    fitting: list[tuple[Plan, _Way, EngineDivision]] = []
    for way in _ways(base):
        made = replace(base, stages=way.stages, num_swap_blocks=0)
        beyond = _beyond_bytes(made)
        if max(beyond.values()) <= 0:
            division = EngineDivision(stages=way.stages, microbatches=1, pipelined_prefill=False)
            fitting.append((made, way, division))
        elif not short or max(beyond.values()) < max(short.values()):
            short = beyond
    if not fitting:
        raise _infeasible(base, short)
    made, way, division = max(fitting, key=lambda one: division_tokens_per_s(one[0], one[2]))
    return Export(
        launches=(_launch(way),),
        device_map=None,
        division=division,
        notes=(*_notes(way), *weight_notes(plan, "MLX"), price_sentence(plan, made, division)),
        needed_bytes={name: used.total_bytes + BUFFER_BYTES for name, used in plan_memory(made).items()},
    )


def _macs(plan: Plan) -> tuple[Device, ...]:
    """The one of each host, those with the most memory first."""
    macs = [device for device in plan.cluster.devices if device.kind == "metal"]
    if not macs:
        raise PlanError("MLX runs on Apple's GPUs, and this plan has none; use --to llama.cpp")
    return tuple(sorted(macs, key=lambda device: -device.usable_bytes))


def _ways(plan: Plan) -> Iterator[_Way]:
    model, macs = plan.model, plan.cluster.devices
    for size in range(1, len(macs) + 1):
        chosen = macs[:size]
        names = [device.id for device in chosen]
        if not _joined(plan.cluster, chosen):
            continue
        if size == 1 or (model.family in SHARDED and can_share_equally(model, size)):
            yield _Way(devices=chosen, stages=(one_stage(plan, names, [1] * size),), pipeline=False)
        if size > 1 and model.family in PIPELINED and model.num_layers % size == 0:
            each = model.num_layers // size
            # Rank 0, the first host, has the last layers.
            stages = [
                make_stage(plan, [name], (number * each, (number + 1) * each))
                for number, name in enumerate(reversed(names))
            ]
            yield _Way(devices=chosen, stages=tuple(stages), pipeline=True)


def _joined(cluster: Cluster, devices: Sequence[Device]) -> bool:
    return all(
        host_link(cluster, one.host, other.host) for one in devices for other in devices if one is not other
    )


def _beyond_bytes(plan: Plan) -> dict[str, int]:
    memory = plan_memory(plan)
    return {
        name: used.total_bytes + BUFFER_BYTES - plan.cluster.device(name).memory_bytes
        for name, used in memory.items()
    }


def _infeasible(plan: Plan, short: dict[str, int]) -> InfeasibleError:
    if not short:
        return InfeasibleError(f"mlx-lm does not divide {plan.model.family} models; use --to llama.cpp")
    name = max(short, key=lambda one: short[one])
    return InfeasibleError(
        f"MLX divides evenly, and the division that comes nearest needs {format_bytes(short[name])} more than {name} "
        "has; give a shorter --context, narrower --weights, or use --to llama.cpp, which takes any number of layers"
    )


def _launch(way: _Way) -> Launch:
    hosts = [device.host for device in way.devices]
    server = ("mlx_lm.server", "--model", MODEL, *(["--pipeline"] if way.pipeline else []))
    if len(hosts) > 1:
        server = ("mlx.launch", "--backend", "ring", "--hosts", ",".join(hosts), *server)
    return Launch(host=hosts[0], command=server)


def _notes(way: _Way) -> list[str]:
    if len(way.devices) == 1:
        return ["one Mac holds it all"]
    names = ", ".join(device.id for device in way.devices)
    form = "a pipeline of equally many layers" if way.pipeline else "a tensor group of equal shares"
    return [
        f"mlx-lm divides evenly or not at all: here {form} on {names}",
        "over Thunderbolt 5, `mlx.distributed_config --backend jaccl` writes a --hostfile for RDMA, which is faster",
    ]
