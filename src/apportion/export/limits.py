"""What other engines can do with a model and devices, and what they take beside weights and KV cache.

Bytes of buffers are what public reports show; docs/export.md lists them. They are on top of the plan's own workspace,
which stands for the activations of one step, and of the driver's context, which a device's memory leaves out already
(catalogue cards have it in their reserve).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apportion.types.cluster import Cluster, Device, DeviceKind
from apportion.types.constraints import Constraints, EngineLimits
from apportion.types.errors import PlanError
from apportion.types.model import ModelSpec
from apportion.types.units import FORMAT_BYTES
from apportion.types.workload import Workload

MIB = 2**20
UBATCHES = (512, 256, 128, 64, 32)
"""Tokens that llama.cpp takes in at once: its default, and less where memory forces that."""
VLLM_GRAPH_BYTES = 512 * MIB
"""Of CUDA graphs: 0.13 GiB for a small model (github.com/generative-computing/mellea/pull/416), 0.36 GiB with 16 sizes
(github.com/gpustack/runner/pull/251)."""
SGLANG_GRAPH_BYTES, SGLANG_NCCL_BYTES = 640 * MIB, 1024 * MIB
"""0.6 GB of graphs and, in a group, 1 GB of NCCL's: github.com/sgl-project/sglang/pull/7873."""
PREFILL_TOKENS = 2048
"""vLLM's default (config/scheduler.py, DEFAULT_MAX_NUM_BATCHED_TOKENS), and SGLang's on cards of up to 35 GB
(srt/server_args.py)."""
VLLM_CAPABILITY = 7.0
"""docs.vllm.ai, installation on GPUs: compute capability 7.0 or higher."""
SGLANG_CAPABILITY = 7.5
"""Of FlashInfer, with which it computes attention there: SM75 and later (pypi.org/project/flashinfer-python)."""
TORCH_BYTES = 256 * MIB
"""What PyTorch's caching allocator keeps beyond what is in use; assumed."""
WIDENED_BYTES = 256 * MIB
"""Of weights that exllamav3 reconstructs for a prompt; assumed."""

GPU_KINDS: tuple[DeviceKind, ...] = ("cuda", "rocm", "metal", "xpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """One engine's."""

    title: str
    kinds: tuple[DeviceKind, ...]
    groups: Literal["one device", "one or all", "equal sizes"]
    """On one host, shared equally."""
    buffer_bytes: int = 0
    """On every GPU,"""
    group_bytes: int = 0
    """and on members of a group."""
    reserves_worst_case: bool = False
    """Whether the compute buffer of a step at the end of the context is there from the start."""
    one_make: bool = True
    several_hosts: bool = False
    hosts_together: bool = False
    """Whether a host's stages have to follow one another."""
    alike_hosts: bool = False
    """Whether every host has equally many."""
    cpu: bool = False
    cpu_first: bool = False
    embedding_on_host: bool = False
    windows: bool = False
    """Whether layers with a sliding window hold no more of a sequence than that."""
    steps: tuple[int, ...] = (256,)
    """Tokens that may be taken in at once; fewer where memory forces that."""
    prefill_tokens: int | None = None
    """Of a prompt at once, unless told otherwise; None where a plan's chunk is not passed on."""
    least_capability: float = 0.0
    """Of NVIDIA's cards."""


def group_sizes(ability: Ability, model: ModelSpec, num_gpus: int) -> list[int]:
    """That groups can have, of so many GPUs on one host."""
    equal = [size for size in range(1, num_gpus + 1) if can_share_equally(model, size)]
    allowed = {"one device": (1,), "one or all": (1, num_gpus), "equal sizes": tuple(equal)}[ability.groups]
    return [size for size in equal if size in allowed]


def can_share_equally(model: ModelSpec, size: int) -> bool:
    return model.kv_heads % size == 0 and model.ffn_columns % size == 0


def buffer_bytes(ability: Ability, model: ModelSpec, workload: Workload, size: int, step_tokens: int) -> int:
    """On a member of a group of `size`, where `step_tokens` are taken in at once."""
    fixed = ability.buffer_bytes + (ability.group_bytes if size > 1 else 0)
    return fixed + (compute_buffer_bytes(model, workload, step_tokens) if ability.reserves_worst_case else 0)


def compute_buffer_bytes(model: ModelSpec, workload: Workload, step_tokens: int) -> int:
    """llama.cpp's with flash attention: the mask in 16 bits over the whole context, and the logits of a step (measured
    at 262,144 tokens with few logits: 0.31 GiB; with a quantised cache it is widened, 2.25 bytes for every token and
    element of a hidden state: github.com/unslothai/unsloth/pull/6718)."""
    tokens = workload.kv_tokens or workload.concurrency * workload.max_context_tokens
    widened = 9 * tokens * model.hidden_size // 4 if workload.kv_format not in (None, *FORMAT_BYTES) else 0
    return step_tokens * (2 * tokens + 4 * model.vocab_rows) + widened


_LLAMA_CPP = Ability(
    title="llama.cpp",
    kinds=GPU_KINDS,
    one_make=False,
    groups="one or all",
    reserves_worst_case=True,
    several_hosts=True,
    cpu=True,
    cpu_first=True,
    embedding_on_host=True,
    windows=True,
    steps=UBATCHES,
)
ABILITIES: dict[str, Ability] = {
    "vllm": Ability(
        title="vLLM",
        kinds=("cuda", "rocm"),
        groups="equal sizes",
        buffer_bytes=VLLM_GRAPH_BYTES,
        several_hosts=True,
        hosts_together=True,
        windows=True,
        prefill_tokens=PREFILL_TOKENS,
        least_capability=VLLM_CAPABILITY,
    ),
    "sglang": Ability(
        title="SGLang",
        kinds=("cuda", "rocm"),
        groups="equal sizes",
        buffer_bytes=SGLANG_GRAPH_BYTES,
        group_bytes=SGLANG_NCCL_BYTES,
        several_hosts=True,
        hosts_together=True,
        alike_hosts=True,
        prefill_tokens=PREFILL_TOKENS,
        least_capability=SGLANG_CAPABILITY,
    ),
    "llama.cpp": _LLAMA_CPP,
    "ollama": replace(_LLAMA_CPP, title="Ollama", one_make=True, groups="one device", several_hosts=False),
    "accelerate": Ability(
        title="accelerate",
        kinds=GPU_KINDS,
        one_make=False,
        groups="one device",
        buffer_bytes=TORCH_BYTES,
        cpu=True,
    ),
    "exllamav3": Ability(
        title="exllamav3",
        kinds=("cuda", "rocm"),
        groups="one or all",
        buffer_bytes=TORCH_BYTES + WIDENED_BYTES,
    ),
}
"""By the name that `--to` and `--for` take; of engines whose divisions the planner can search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProblem:
    """What is to be planned, so that the engine can execute it."""

    cluster: Cluster
    workload: Workload
    constraints: Constraints


def engine_problems(
    ability: Ability, model: ModelSpec, cluster: Cluster, workload: Workload, constraints: Constraints
) -> Iterator[list[EngineProblem]]:
    """Alternatives of which the best is wanted; then those that are for less memory, and so on.

    Raises PlanError where the engine has no use for any of the devices.
    """
    usable = tuple(device for device in cluster.devices if device.id not in constraints.excluded)
    old = [device.id for device in usable if _too_old(ability, device)]
    usable = tuple(device for device in usable if device.id not in old)
    parts = list(_clusters(ability, replace(cluster, devices=usable)))
    if not parts:
        if old:
            raise PlanError(
                f"{ability.title} wants NVIDIA cards of compute capability {ability.least_capability} or more, and"
                f" {', '.join(old)} {'has' if len(old) == 1 else 'have'} less; use llama.cpp (--for or --to llama.cpp)"
            )
        kinds = " or ".join(kind.upper() if kind != "metal" else "Metal" for kind in ability.kinds)
        raise PlanError(
            f"{ability.title} divides a model among {kinds} devices, and there are none; use llama.cpp (--for or --to"
            " llama.cpp)"
        )
    needed = constraints.used | {device.id for device in usable if constraints.use_all}
    parts = [part for part in parts if needed <= {device.id for device in part.devices}]
    if not parts:
        raise PlanError(
            f"{ability.title} cannot use {', '.join(sorted(needed))} together; leave out what asks for them"
        )
    constraints = replace(constraints, excluded=())
    for step_tokens in ability.steps:
        yield [
            _problem(ability, model, part, workload, constraints, size, step_tokens)
            for part in parts
            for size in group_sizes(ability, model, _most_gpus(part))
        ]


def _problem(
    ability: Ability,
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints,
    size: int,
    step_tokens: int,
) -> EngineProblem:
    taken = buffer_bytes(ability, model, workload, size, step_tokens)
    buffers = {device.id: taken for device in cluster.devices if device.kind != "cpu"}
    devices = tuple(
        replace(device, reserved_bytes=device.reserved_bytes + buffers.get(device.id, 0))
        for device in cluster.devices
    )
    limits = EngineLimits(
        name=ability.title,
        group_size=size,
        cpu_first=ability.cpu_first,
        embedding_on_host=ability.embedding_on_host,
        step_tokens=step_tokens,
        buffer_bytes=buffers,
    )
    return EngineProblem(
        cluster=replace(cluster, devices=devices),
        workload=replace(workload, window_extra_tokens=step_tokens if ability.windows else None),
        constraints=replace(constraints, groups="even" if size > 1 else "none", engine=limits),
    )


def engine_of(limits: EngineLimits) -> str:
    """By the name that `--to` and `--for` take."""
    return next(name for name, ability in ABILITIES.items() if ability.title == limits.name)


def without_buffers(cluster: Cluster, constraints: Constraints) -> Cluster:
    """The cluster as it was before a plan was made for an engine."""
    return cluster.without_buffers(constraints.engine.buffer_bytes) if constraints.engine else cluster


def _too_old(ability: Ability, device: Device) -> bool:
    return device.compute_capability is not None and device.compute_capability < ability.least_capability


def too_old_note(ability: Ability, cluster: Cluster) -> list[str]:
    """One sentence of the cards that the engine cannot use, if there are such."""
    old = [device.id for device in cluster.devices if _too_old(ability, device)]
    if not old:
        return []
    return [
        f"{ability.title} wants compute capability {ability.least_capability} or more: {', '.join(old)}"
        f" {'has' if len(old) == 1 else 'have'} less and {'is' if len(old) == 1 else 'are'} left out"
    ]


def _clusters(ability: Ability, cluster: Cluster) -> Iterator[Cluster]:
    """The devices that the engine can use together: of each make where it takes one, on each host where it takes one
    or wants them alike."""
    kinds = (*ability.kinds, *(["cpu"] if ability.cpu else []))
    usable = [device for device in cluster.devices if device.kind in kinds]
    gpus = [device for device in usable if device.kind != "cpu"]
    makes = list(dict.fromkeys(device.kind for device in gpus)) if ability.one_make else [None]
    for make in makes or [None]:
        found = [device for device in usable if make is None or device.kind in ("cpu", make)]
        hosts = list(dict.fromkeys(device.host for device in found))
        sets = [hosts] if ability.several_hosts else []
        if not ability.several_hosts or (ability.alike_hosts and len(hosts) > 1):
            sets += [[host] for host in hosts]
        for names in sets:
            devices = _one_cpu([device for device in found if device.host in names])
            if devices:
                yield replace(cluster, devices=tuple(devices))


def _one_cpu(devices: Sequence[Device]) -> list[Device]:
    """CPU devices of a host are parts of it: such engines have it whole."""
    parts: dict[str, list[Device]] = {}
    for device in devices:
        if device.kind == "cpu":
            parts.setdefault(device.host, []).append(device)
    wholes = {some[0].id: _whole(some) for some in parts.values()}
    return [wholes.get(one.id, one) for one in devices if one.kind != "cpu" or one.id in wholes]


def _whole(parts: Sequence[Device]) -> Device:
    rates = {name: sum(part.flops_per_s[name] for part in parts) for name in parts[0].flops_per_s}
    read = sum(part.mem_bytes_per_s for part in parts)
    most = parts[0].host_bytes_per_s
    return replace(
        parts[0],
        memory_bytes=sum(part.memory_bytes for part in parts),
        reserved_bytes=sum(part.reserved_bytes for part in parts),
        flops_per_s=rates,
        mem_bytes_per_s=read if most is None else min(read, most),
        num_threads=sum(part.num_threads for part in parts),
    )


def _most_gpus(cluster: Cluster) -> int:
    """On one host."""
    hosts = [device.host for device in cluster.devices if device.kind != "cpu"]
    return max((hosts.count(host) for host in hosts), default=1)
