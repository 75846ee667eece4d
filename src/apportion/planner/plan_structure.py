"""Whether a plan that was read hangs together, so that whatever takes it may rely on it.

Figures of speed and bounds are for `verify` to recompute; all else is held here against the rest of the plan. A fault
is the place in the plan that is wrong, like `stages[1].layer_start`, and what is wrong there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from apportion.cost.formats import weight_formats
from apportion.cost.kv_capacity import kv_rooms
from apportion.cost.memory import kv_blocks, plan_memory
from apportion.cost.traffic import coordinator_host, host_link
from apportion.planner.stages.streamed import streams_as_it_can
from apportion.types.cluster import Cluster
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage
from apportion.types.replicated import ReplicatedPlan
from apportion.types.soundness import Fault, device_faults, link_faults
from apportion.types.units import FORMAT_BYTES, KV_BITS, format_bytes
from apportion.types.workload import Workload


def first_fault(plan: Plan | ReplicatedPlan) -> Fault | None:
    if isinstance(plan, Plan):
        return next(_faults(plan), None)
    return next(_replicated_faults(plan), None)


def _replicated_faults(plan: ReplicatedPlan) -> Iterator[Fault]:
    if not plan.replicas:
        yield "replicas", "at least one is needed"
    yield from _cluster_faults(plan.cluster)
    for number, replica in enumerate(plan.replicas):
        yield from ((f"replicas[{number}].{place}", problem) for place, problem in _faults(replica))
        if replica.model != plan.replicas[0].model:
            yield f"replicas[{number}].model", "it is not that of replica 0"
        if not {device.id for device in replica.cluster.devices} <= {d.id for d in plan.cluster.devices}:
            yield f"replicas[{number}].cluster.devices", "they are not of the whole cluster"
    for device_id, count in Counter(plan.device_ids).items():
        if count > 1:
            yield "replicas", f"device {device_id} is in {count} of them"


def _faults(plan: Plan) -> Iterator[Fault]:
    """Each rule may rely on those before it."""
    if not plan.stages:
        yield "stages", "at least one is needed"
        return
    yield from _cluster_faults(plan.cluster)
    yield from _model_faults(plan.model)
    yield from _workload_faults(plan.workload)
    yield from _stage_faults(plan)
    yield from _device_faults(plan)
    yield from _link_faults(plan)
    yield from _size_faults(plan)
    yield from _memory_faults(plan)
    yield from _figure_faults(plan)


def cluster_fault(cluster: Cluster) -> Fault | None:
    """Of one that was read by itself."""
    return next(_cluster_faults(cluster), None)


def _cluster_faults(cluster: Cluster) -> Iterator[Fault]:
    for number, device in enumerate(cluster.devices):
        yield from ((f"cluster.devices[{number}].{field}", what) for field, what in device_faults(device))
    for number, link in enumerate(cluster.links):
        yield from ((f"cluster.links[{number}].{field}", what) for field, what in link_faults(link))
    for name, count in Counter(device.id for device in cluster.devices).items():
        if count > 1:
            yield "cluster.devices", f"id '{name}' is given to {count} of them"
    if cluster.coordinator is not None and cluster.coordinator not in {one.host for one in cluster.devices}:
        yield "cluster.coordinator", f"no device is on host '{cluster.coordinator}'"


def _model_faults(model: ModelSpec) -> Iterator[Fault]:
    if not model.layers:
        yield "model.layers", "at least one is needed"
    if model.q_heads % model.kv_heads:
        yield "model.q_heads", f"{model.q_heads} are no multiple of {model.kv_heads} KV heads"
    for number, layer in enumerate(model.layers):
        if layer.experts_per_token > layer.num_experts:
            yield (
                f"model.layers[{number}].experts_per_token",
                f"there are {layer.num_experts} experts",
            )


def _workload_faults(workload: Workload) -> Iterator[Fault]:
    tokens = workload.prompt_tokens + workload.output_tokens
    if tokens > workload.max_context_tokens:
        yield (
            "workload.max_context_tokens",
            f"prompt and output take {tokens}, the context is {workload.max_context_tokens}",
        )
    if workload.most_sequences is not None and workload.most_sequences < workload.concurrency:
        yield "workload.most_sequences", f"there are {workload.concurrency}"
    if workload.kv_format is not None and workload.kv_format not in KV_BITS:
        yield "workload.kv_format", f"'{workload.kv_format}' is none of {', '.join(KV_BITS)}"


def _stage_faults(plan: Plan) -> Iterator[Fault]:
    model, last = plan.model, len(plan.stages) - 1
    unknown = [name for name in plan.weight_formats if name not in weight_formats(model)]
    if unknown or not plan.weight_formats:
        yield "weight_formats", f"{unknown or 'nothing'} is no format of this model's weights"
    expected = 0
    for number, stage in enumerate(plan.stages):
        place = f"stages[{number}]"
        if stage.layer_start != expected:
            yield f"{place}.layer_start", f"it is {stage.layer_start}, after layers up to {expected}"
        if not stage.layer_start < stage.layer_stop <= model.num_layers:
            yield f"{place}.layer_stop", f"{stage.layer_stop} of {model.num_layers} layers"
        expected = stage.layer_stop
        for field, value, right in (
            ("has_embedding", stage.has_embedding, number == 0),
            ("has_head", stage.has_head, number == last),
        ):
            if value != right:
                yield f"{place}.{field}", f"it is {str(value).lower()} in stage {number} of {last + 1}"
        yield from ((f"{place}.{field}", what) for field, what in _format_faults(plan, stage))
        yield from ((f"{place}.split.{field}", what) for field, what in _split_faults(model, stage))
    if expected != model.num_layers:
        yield f"stages[{last}].layer_stop", f"it is {expected}, and the model has {model.num_layers} layers"


def _format_faults(plan: Plan, stage: Stage) -> Iterator[Fault]:
    first = plan.stages[0]
    if stage.weight_format not in plan.weight_formats:
        yield "weight_format", f"'{stage.weight_format}' is none of {', '.join(plan.weight_formats)}"
    if stage.activation_format not in FORMAT_BYTES or stage.activation_format != first.activation_format:
        yield "activation_format", f"'{stage.activation_format}': one of {', '.join(FORMAT_BYTES)} for all"
    if stage.kv_format not in KV_BITS or stage.kv_format != first.kv_format:
        yield "kv_format", f"'{stage.kv_format}': one of {', '.join(KV_BITS)} for all"
    if plan.workload.kv_format not in (None, stage.kv_format):
        yield "kv_format", f"'{stage.kv_format}' is not the workload's '{plan.workload.kv_format}'"


def _split_faults(model: ModelSpec, stage: Stage) -> Iterator[Fault]:
    split = stage.split
    if not split.device_ids:
        yield "device_ids", "at least one is needed"
        return
    for field, shares, total, least in (
        ("kv_heads", split.kv_heads, model.kv_heads, 1),
        ("q_heads", split.q_heads, model.q_heads, 1),
        ("ffn_columns", split.ffn_columns, model.ffn_columns, 1),
        ("vocab_rows", split.vocab_rows, model.vocab_rows, 0),
    ):
        if len(shares) != split.size:
            yield field, f"{len(shares)} shares for {split.size} devices"
        elif sum(shares) != total or min(shares) < least:
            yield field, f"{' + '.join(map(str, shares))} are not shares ≥ {least} of {total}"
    if split.q_heads != tuple(heads * model.q_heads_per_kv_head for heads in split.kv_heads):
        yield "q_heads", "they are not the KV heads' own"


def _device_faults(plan: Plan) -> Iterator[Fault]:
    known = {device.id: device for device in plan.cluster.devices}
    used: set[str] = set()
    for number, stage in enumerate(plan.stages):
        place = f"stages[{number}]"
        for device_id in stage.split.device_ids:
            if device_id not in known:
                yield f"{place}.split.device_ids", f"'{device_id}' is not in the cluster"
                return
            if device_id in used:
                yield f"{place}.split.device_ids", f"'{device_id}' is used twice"
            if not known[device_id].rate(stage.weight_format):
                yield f"{place}.weight_format", f"{device_id} has no rate for {stage.weight_format}"
            used.add(device_id)
        if len({known[device_id].host for device_id in stage.split.device_ids}) > 1:
            yield f"{place}.split.device_ids", "they are of several hosts"
        if not streams_as_it_can(plan.cluster, stage):
            yield (
                f"{place}.streamed_layers",
                "not layers of the stage, in order, for devices with a rate for it",
            )


def _link_faults(plan: Plan) -> Iterator[Fault]:
    hosts = [plan.cluster.device(stage.split.device_ids[0]).host for stage in plan.stages]
    home = coordinator_host(plan.cluster)
    route = [home, *hosts, home]
    joined = [*pairwise(route)]
    joined += [(host, host) for host, stage in zip(hosts, plan.stages, strict=True) if stage.split.size > 1]
    for src, dst in joined:
        if host_link(plan.cluster, src, dst) is None:
            yield "cluster.links", f"none joins {src} and {dst}"


def _size_faults(plan: Plan) -> Iterator[Fault]:
    workload = plan.workload
    most = max(workload.concurrency, len(plan.stages))
    if plan.microbatches > most:
        yield "microbatches", f"{plan.microbatches} of {workload.concurrency} sequences"
    asked = kv_blocks(workload, plan.block_tokens)
    if plan.num_kv_blocks < asked:
        yield "num_kv_blocks", f"{plan.num_kv_blocks} of {plan.block_tokens} tokens; {asked} are needed"


def _memory_faults(plan: Plan) -> Iterator[Fault]:
    needed = plan_memory(plan)
    if set(plan.memory) != set(needed):
        yield "memory", f"it is of {', '.join(plan.memory) or 'nothing'}, not of {', '.join(needed)}"
        return
    for device_id, memory in needed.items():
        whole = plan.cluster.device(device_id).memory_bytes
        if memory.total_bytes > whole:
            yield (
                f"memory.{device_id}",
                f"the plan needs {format_bytes(memory.total_bytes)} there, and it has {format_bytes(whole)}",
            )
        if memory != plan.memory[device_id]:
            yield f"memory.{device_id}", "it is not what the plan's stages need; plan again"
    if plan.kv_rooms not in ((), kv_rooms(plan)):
        yield "kv_rooms", "they are not what the plan leaves; plan again"


def _figure_faults(plan: Plan) -> Iterator[Fault]:
    estimate, stages = plan.estimate, len(plan.stages)
    lengths: Iterable[tuple[str, Sequence[float], int]] = (
        ("stage_s", estimate.stage_s, stages),
        ("link_s", estimate.link_s, stages - 1),
    )
    for field, values, number in lengths:
        if len(values) != number:
            yield f"estimate.{field}", f"{len(values)} figures, and there are {stages} stages"
    if plan.certificate.objective != plan.workload.objective:
        yield "certificate.objective", f"it is not the workload's '{plan.workload.objective}'"
