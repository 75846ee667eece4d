"""The design's statements about a plan, as numbers: balance, pipeline, memory and communication."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, pstdev

from apportion.cost.formats import (
    Formats,
    beside_embedding_bytes,
    head_row_bytes,
    outside_bytes,
    parameters_bytes,
    shares_table,
    vocab_row_bytes,
)
from apportion.cost.memory import layer_kv_bytes, layer_kv_tokens, plan_capacity
from apportion.cost.shard import stage_formats
from apportion.cost.traffic import LOGIT_BYTES, layer_reductions
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import Plan, Stage
from apportion.types.units import FORMAT_BYTES
from apportion.types.workload import Workload


def epsilon_s(stage_s: Sequence[float]) -> float:
    """ε = max_j |t_j − mean(t)|."""
    mean_s = sum(stage_s) / len(stage_s)
    return max(abs(seconds - mean_s) for seconds in stage_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """P microbatches through stages (and links, which are stages too) of times s_j.

    The makespan is Σ s_j + (P−1)·s_max, throughput P over that. `stage_executions_per_s` = P·S/s_max is
    the whitepaper's figure: it counts stage executions of P replicas, not results.
    """

    makespan_s: float
    microbatches_per_s: float
    stage_executions_per_s: float


def pipeline(times_s: Sequence[float], num_stages: int, microbatches: int) -> Pipeline:
    slowest_s = max(times_s)
    makespan_s = sum(times_s) + (microbatches - 1) * slowest_s
    return Pipeline(
        makespan_s=makespan_s,
        microbatches_per_s=microbatches / makespan_s,
        stage_executions_per_s=microbatches * num_stages / slowest_s,
    )


def model_parameters(model: ModelSpec) -> int:
    """Parameters of the undivided model: layers, vocabulary tables, final norm."""
    return model.num_parameters


def replicated_parameters(plan: Plan) -> int:
    """Parameters held more than once: norms in groups, and a tied table cut off from its other end."""
    model = plan.model
    layers = sum(
        (stage.split.size - 1)
        * sum(layer.replicated.count for layer in model.layers[stage.layer_start : stage.layer_stop])
        for stage in plan.stages
    )
    norms = (plan.stages[-1].split.size - 1) * model.hidden_size
    norms += (plan.stages[0].split.size - 1) * model.beside_embedding
    cut_table = model.embedding_params if model.tied_embeddings and len(plan.stages) > 1 else 0
    return layers + norms + cut_table


def whole_model_bytes(plan: Plan) -> int:
    """What one device would hold of weights, each in its stage's format, and KV cache, were the model not divided."""
    model = plan.model
    layers = sum(
        model.kv_heads * parameters_bytes(layer.per_kv_head, stage_formats(stage))
        + model.ffn_columns * parameters_bytes(layer.per_ffn_column, stage_formats(stage))
        + parameters_bytes(layer.replicated, stage_formats(stage))
        for stage in plan.stages
        for layer in model.layers[stage.layer_start : stage.layer_stop]
    )
    first, last = stage_formats(plan.stages[0]), stage_formats(plan.stages[-1])
    embedding = model.vocab_rows * vocab_row_bytes(model, first, has_embedding=True, has_head=False)
    head = 0 if _shared_table(plan) else model.vocab_rows * head_row_bytes(model, last)
    beside = beside_embedding_bytes(model, first)
    if _without_embedding(plan):
        embedding = beside = 0
    cache = sum(_cache_bytes(plan, layer, model.kv_heads) for layer in model.layers)
    return layers + embedding + beside + head + outside_bytes(model, last) + cache


def _cache_bytes(plan: Plan, layer: LayerSpec, kv_heads: int) -> int:
    """Of one layer, where so many KV heads are held; of none what every member of a group holds."""
    capacity = plan_capacity(plan)
    states = capacity.concurrency * layer.cache.state_bytes if layer.cache else 0
    token_bytes = layer_kv_bytes(plan.model, layer, kv_heads, plan.kv_format)
    return layer_kv_tokens(layer, capacity) * token_bytes + states


def _without_embedding(plan: Plan) -> bool:
    """Whether the embedding table is in memory that is no device's of the plan."""
    first = plan.cluster.device(plan.stages[0].split.device_ids[0])
    return plan.constraints.embedding_on_host and first.kind != "cpu"


def _shared_table(plan: Plan) -> bool:
    """Whether one table would do for embedding and head, were the model not divided."""
    if _without_embedding(plan):
        return False
    ends = (stage_formats(plan.stages[0]), stage_formats(plan.stages[-1]))
    return ends[0].weights == ends[1].weights and all(shares_table(plan.model, one) for one in ends)


def replicated_bytes(plan: Plan) -> int:
    """What the division adds to `whole_model_bytes`: everything of a layer that every member of a group holds (whole
    quantisation blocks, latents, states), what is beside the tables, and a shared table cut off from its other end."""
    model, last = plan.model, plan.stages[-1]
    layers = sum(
        (stage.split.size - 1)
        * (_per_member_bytes(layer, stage_formats(stage)) + _cache_bytes(plan, layer, 0))
        for stage in plan.stages
        for layer in model.layers[stage.layer_start : stage.layer_stop]
    )
    norms = (last.split.size - 1) * outside_bytes(model, stage_formats(last))
    first = plan.stages[0]
    if not _without_embedding(plan):
        norms += (first.split.size - 1) * beside_embedding_bytes(model, stage_formats(first))
    cut = _shared_table(plan) and len(plan.stages) > 1
    return layers + norms + (model.vocab_rows * head_row_bytes(model, stage_formats(last)) if cut else 0)


def _per_member_bytes(layer: LayerSpec, formats: Formats) -> int:
    """What each member but the first adds to a layer."""
    blocks = layer.stored_block_bytes if formats.as_stored else 0
    return parameters_bytes(layer.replicated, formats) + blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """Of one decoded token: hidden states between stages and partial sums inside groups."""

    messages: int
    payload_bytes: int


def token_communication(plan: Plan) -> Communication:
    return _token_communication(plan.model, plan.stages)


def step_communication(model: ModelSpec, workload: Workload, stages: Sequence[Stage]) -> Communication:
    """Of a decode step of all sequences: a message carries all their hidden states or partial sums; in a split head
    logits are gathered too."""
    token, split = _token_communication(model, stages), stages[-1].split
    gathered = LOGIT_BYTES * sum(split.vocab_rows[1:])
    return Communication(
        messages=token.messages + split.size - 1,
        payload_bytes=workload.concurrency * (token.payload_bytes + gathered),
    )


def _token_communication(model: ModelSpec, stages: Sequence[Stage]) -> Communication:
    hops = [stage.split.size for stage in stages[1:]]
    hidden_bytes = model.hidden_size * FORMAT_BYTES[stages[0].activation_format]
    exchanges = [_stage_exchange(model, stage) for stage in stages]
    return Communication(
        messages=sum(hops) + sum(messages for messages, _ in exchanges),
        payload_bytes=sum(hops) * hidden_bytes + sum(size for _, size in exchanges),
    )


def _stage_exchange(model: ModelSpec, stage: Stage) -> tuple[int, int]:
    """Messages and bytes of one token inside a group, over all ordered pairs."""
    pairs = stage.split.size * (stage.split.size - 1)
    element_bytes = FORMAT_BYTES[stage.activation_format]
    sizes = list(layer_reductions(model, element_bytes)) * stage.num_layers
    if stage.has_embedding:
        sizes.append(model.hidden_size * element_bytes)
    return pairs * len(sizes), pairs * sum(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpread:
    """How evenly the devices in use are filled: planned bytes, reserves included, and their part of the device's
    memory. Standard deviations are those of a population."""

    mean_part: float
    range_part: float
    std_part: float
    range_bytes: int
    std_bytes: float


def memory_spread(plan: Plan) -> MemorySpread:
    used = [memory.total_bytes for memory in plan.memory.values()]
    parts = [
        memory.total_bytes / plan.cluster.device(name).memory_bytes for name, memory in plan.memory.items()
    ]
    return MemorySpread(
        mean_part=mean(parts),
        range_part=max(parts) - min(parts),
        std_part=pstdev(parts),
        range_bytes=max(used) - min(used),
        std_bytes=pstdev(used),
    )
