"""What to say where no division fits: what is needed, what there is, and changes that were checked to help."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from apportion.cost.memory import kv_cache_bytes, shard_memory, shard_weights_bytes
from apportion.planner.infeasible.relief import Demand, MoreMemory, changes, least_memory
from apportion.planner.problem import Problem, chunk_candidates, make_problem
from apportion.planner.search.division import stage_kind
from apportion.planner.stages.axes import StageKind, make_shard
from apportion.types.cluster import Cluster, Device
from apportion.types.errors import InfeasibleError
from apportion.types.units import format_bytes


def infeasible_error(demand: Demand) -> InfeasibleError:
    """The numbers, what binds, and the cheapest changes that were checked to help."""
    model, cluster, workload = demand.model, demand.cluster, demand.workload
    chunk_tokens = chunk_candidates(workload.max_context_tokens)[-1]
    asked = make_problem(model, cluster, workload, demand.weight_formats, chunk_tokens)
    problem = asked.narrowest()
    num_devices, largest = len(cluster.devices), _largest(cluster)
    available = sum(device.usable_bytes for device in cluster.devices)
    memory = least_memory(demand)
    helping = ", or ".join(changes(demand, memory))
    return InfeasibleError(
        f"{model.name} needs {format_bytes(whole_bytes(problem, largest))} undivided "
        f"({problem.formats.weights} weights, "
        f"{workload.concurrency} × {workload.max_context_tokens} tokens of context), "
        f"its largest layer {format_bytes(largest_layer_bytes(problem, largest))} by itself; "
        f"{num_devices} {'devices have' if num_devices > 1 else 'device has'} {format_bytes(available)}; "
        f"{_binding(asked, memory)}; {'try ' + helping if helping else 'add devices'}"
    )


def _binding(asked: Problem, memory: Sequence[MoreMemory]) -> str:
    """The constraint that is not met, and on which device."""
    devices = asked.cluster.devices
    largest = _largest(asked.cluster)
    most = f"the largest ({largest.id}) has {format_bytes(largest.usable_bytes)}"
    kept_bytes = least_bytes(asked)
    if kept_bytes > sum(device.usable_bytes for device in devices):
        return f"weights and KV cache alone take {format_bytes(kept_bytes)}, {most}"
    if memory:
        binding = memory[0].device
        return f"what binds is the memory of {binding.id}, {format_bytes(binding.usable_bytes)}"
    return f"what binds is not the memory of one device, {most}"


def _largest(cluster: Cluster) -> Device:
    return max(cluster.devices, key=lambda device: device.usable_bytes)


def whole_bytes(problem: Problem, device: Device) -> int:
    """What such a device would need for the undivided model."""
    return _engine_bytes(problem, device, stage_kind(problem.model, 0, problem.model.num_layers))


def least_bytes(problem: Problem) -> int:
    """Weights and KV cache of the undivided model: no division needs less."""
    model, problems = problem.model, [problem.in_format(name) for name in problem.weight_formats]
    whole = stage_kind(model, 0, model.num_layers)
    ends = replace(whole, layers=(), has_embedding=not problem.capacity.embedding_on_host)
    kinds = [(replace(whole, layers=((layer, 1),)), count) for layer, count in whole.layers]
    return sum(
        count * min(_kept_bytes(one, replace(kind, has_embedding=False, has_head=False)) for one in problems)
        for kind, count in kinds
    ) + min(_ends_bytes(problems, ends))


def _kept_bytes(problem: Problem, kind: StageKind) -> int:
    model = problem.model
    shard = make_shard(kind, problem.formats, 0, 1, model.kv_heads, model.ffn_columns, model.vocab_rows)
    return shard_weights_bytes(model, shard) + kv_cache_bytes(model, shard, problem.capacity)


def _ends_bytes(problems: Sequence[Problem], ends: StageKind) -> Iterator[int]:
    """Of embedding and head: in one stage, or in two with formats of their own."""
    yield min(_kept_bytes(one, ends) for one in problems)
    if not ends.has_embedding:
        return
    first, last = replace(ends, has_head=False), replace(ends, has_embedding=False)
    yield sum(min(_kept_bytes(one, end) for one in problems) for end in (first, last))


def largest_layer_bytes(problem: Problem, device: Device) -> int:
    """What such a device would need for one layer, with embedding or head where they come with it."""
    kinds = {stage_kind(problem.model, layer, layer + 1) for layer in range(problem.model.num_layers)}
    return max(_engine_bytes(problem, device, kind) for kind in kinds)


def _engine_bytes(problem: Problem, device: Device, kind: StageKind) -> int:
    model = problem.model
    shard = make_shard(kind, problem.formats, 0, 1, model.kv_heads, model.ffn_columns, model.vocab_rows)
    return shard_memory(model, shard, problem.capacity, device).engine_bytes
