"""What to say where no division fits: what is needed, what there is, and changes that were checked to help."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from apportion.cost.memory import shard_memory
from apportion.planner.axes import StageKind, make_shard
from apportion.planner.problem import Problem, chunk_candidates, make_problem
from apportion.planner.search import stage_kind
from apportion.types.cluster import Cluster
from apportion.types.errors import InfeasibleError
from apportion.types.model import ModelSpec
from apportion.types.units import WEIGHT_BITS, format_bytes
from apportion.types.workload import Workload

WeightFormats = tuple[str, ...]
Fits = Callable[[ModelSpec, Cluster, Workload, WeightFormats], bool]


class StreamingFits(Protocol):
    def __call__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        weight_formats: WeightFormats,
        /,
        *,
        streaming: bool,
    ) -> bool: ...


MIN_CONTEXT_TOKENS = 64
MEMORY_FACTORS = (1.1, 1.25, 1.5, 2, 3, 4, 8, 16)


def infeasible_error(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    weight_formats: WeightFormats,
    fits: StreamingFits,
    *,
    streaming: bool,
) -> InfeasibleError:
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    problem = make_problem(model, cluster, workload, weight_formats, chunk_tokens).narrowest()
    largest = max(cluster.devices, key=lambda device: device.usable_bytes)
    num_devices = len(cluster.devices)
    have = "devices have" if num_devices > 1 else "device has"
    available = sum(device.usable_bytes for device in cluster.devices)
    changes = ", or ".join(
        _changes(model, cluster, workload, weight_formats, partial(fits, streaming=streaming))
    )
    if not streaming and fits(model, cluster, workload, weight_formats, streaming=True):
        changes = f"--stream auto{', or ' + changes if changes else ''}"
    return InfeasibleError(
        f"{model.name} needs {format_bytes(whole_bytes(problem))} undivided "
        f"({problem.formats.weights} weights, "
        f"{workload.concurrency} × {workload.max_context_tokens} tokens of context), "
        f"its largest layer {format_bytes(largest_layer_bytes(problem))} by itself; "
        f"{num_devices} {have} {format_bytes(available)}, the largest "
        f"({largest.id}) {format_bytes(largest.usable_bytes)}; "
        f"{'try ' + changes if changes else 'add devices'}"
    )


def whole_bytes(problem: Problem) -> int:
    """What one device would need for the undivided model."""
    return _engine_bytes(problem, stage_kind(problem.model, 0, problem.model.num_layers))


def least_bytes(problem: Problem) -> int:
    """Weights and KV cache of the undivided model: no division needs less."""
    model, problems = problem.model, [problem.in_format(name) for name in problem.weight_formats]
    whole = stage_kind(model, 0, model.num_layers)
    ends = replace(whole, layers=())
    kinds = [(replace(whole, layers=((layer, 1),)), count) for layer, count in whole.layers]
    return sum(
        count * min(_kept_bytes(one, replace(kind, has_embedding=False, has_head=False)) for one in problems)
        for kind, count in kinds
    ) + min(_ends_bytes(problems, ends))


def _kept_bytes(problem: Problem, kind: StageKind) -> int:
    model = problem.model
    shard = make_shard(kind, problem.formats, 0, 1, model.kv_heads, model.ffn_columns, model.vocab_rows)
    memory = shard_memory(model, shard, problem.capacity, reserved_bytes=0)
    return memory.weights_bytes + memory.kv_bytes


def _ends_bytes(problems: Sequence[Problem], ends: StageKind) -> Iterator[int]:
    """Of embedding and head: in one stage, or in two with formats of their own."""
    yield min(_kept_bytes(one, ends) for one in problems)
    first, last = replace(ends, has_head=False), replace(ends, has_embedding=False)
    yield sum(min(_kept_bytes(one, end) for one in problems) for end in (first, last))


def largest_layer_bytes(problem: Problem) -> int:
    """What one device would need for one layer, with embedding or head where they come with it."""
    kinds = {stage_kind(problem.model, layer, layer + 1) for layer in range(problem.model.num_layers)}
    return max(_engine_bytes(problem, kind) for kind in kinds)


def _engine_bytes(problem: Problem, kind: StageKind) -> int:
    model = problem.model
    shard = make_shard(kind, problem.formats, 0, 1, model.kv_heads, model.ffn_columns, model.vocab_rows)
    return shard_memory(model, shard, problem.capacity, reserved_bytes=0).engine_bytes


def _changes(
    model: ModelSpec, cluster: Cluster, workload: Workload, weight_formats: WeightFormats, fits: Fits
) -> Iterator[str]:
    context = workload.max_context_tokens // 2
    while context >= MIN_CONTEXT_TOKENS:
        if fits(model, cluster, _with_context(workload, context), weight_formats):
            yield f"--context {context}"
            break
        context //= 2
    if workload.concurrency > 1 and fits(model, cluster, replace(workload, concurrency=1), weight_formats):
        yield "--concurrency 1"
    narrowest = min(WEIGHT_BITS[name] for name in weight_formats)
    for smaller, bits in WEIGHT_BITS.items():
        known = all(device.rate(smaller) is not None for device in cluster.devices)
        if known and bits < narrowest and fits(model, cluster, workload, (smaller,)):
            yield f"--weights {smaller}"
            break
    for factor in MEMORY_FACTORS:
        devices = tuple(
            replace(device, memory_bytes=round(device.memory_bytes * factor)) for device in cluster.devices
        )
        if fits(model, replace(cluster, devices=devices), workload, weight_formats):
            yield f"{factor}× the memory on every device"
            break


def _with_context(workload: Workload, context: int) -> Workload:
    return replace(
        workload,
        max_context_tokens=context,
        prompt_tokens=min(workload.prompt_tokens, context // 2),
        output_tokens=min(workload.output_tokens, context // 4),
    )
