"""Bytes a device holds: weights, KV cache and waiting messages, and what a step allocates.

A plan states all of it exactly (`plan_memory`). What the planner searches with (`shard_memory`) is affine in a shard's
KV heads, FFN columns and vocabulary rows, and no less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from apportion.cost.formats import beside_embedding_bytes, kv_bytes, outside_bytes, vocab_row_bytes
from apportion.cost.host_room import host_rooms
from apportion.cost.shard import Shard, stage_shards
from apportion.cost.streaming import largest_streamed_bytes, streamed_bytes
from apportion.cost.workspace import workspace_bytes
from apportion.types.cluster import Cluster, Device
from apportion.types.errors import UsageError
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import DeviceMemory, Plan, Stage, most_step_tokens
from apportion.types.units import FORMAT_BYTES, format_bytes
from apportion.types.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What memory is planned for: `concurrency` sequences of `max_context_tokens` at most, prompts in chunks of
    `chunk_tokens`."""

    num_kv_blocks: int
    block_tokens: int
    chunk_tokens: int
    concurrency: int
    max_context_tokens: int
    messages_in_flight: int
    num_swap_blocks: int = 0
    window_extra_tokens: int | None = None
    """As in Workload."""
    embedding_on_host: bool = False
    """As in EngineLimits."""

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step."""
        return most_step_tokens(self.chunk_tokens, self.concurrency)


MESSAGE_TOKEN_BYTES = 8
"""Of each token's id and place in a message."""
MESSAGE_BYTES = 2 * 2**12
"""Of each message's other fields, and what is left of its last page."""


def messages_in_flight(concurrency: int, num_devices: int) -> int:
    """Most batches on their way at once, and so the most that can wait before the slowest stage: one more than there
    are stages, or as many as there are microbatches (at most two for each device)."""
    return max(num_devices + 1, min(concurrency, 2 * num_devices))


def kv_blocks(workload: Workload, block_tokens: int) -> int:
    """Blocks that hold every sequence at its full context, or the tokens that are asked for."""
    if workload.kv_tokens is not None:
        return -(-workload.kv_tokens // block_tokens)
    return workload.concurrency * -(-workload.max_context_tokens // block_tokens)


def shard_parameters(model: ModelSpec, shard: Shard) -> int:
    """A tied table counts once in a stage, also where it is kept for looking up and packed for the head."""
    layers = sum(count * shard.layer_parameters(layer) for layer, count in shard.layers)
    num_tables = shard.has_embedding + shard.has_head
    if num_tables == 2 and model.tied_embeddings:
        num_tables = 1
    final_norm = model.hidden_size if shard.has_head else 0
    beside = model.beside_embedding if shard.has_embedding else 0
    return layers + num_tables * shard.vocab_rows * model.hidden_size + beside + final_norm


def shard_weights_bytes(model: ModelSpec, shard: Shard) -> int:
    """Of streamed layers too."""
    formats = shard.formats
    layers = sum(count * shard.layer_bytes(layer) for layer, count in shard.layers)
    row = vocab_row_bytes(model, formats, has_embedding=shard.has_embedding, has_head=shard.has_head)
    outside = outside_bytes(model, formats) if shard.has_head else 0
    beside = beside_embedding_bytes(model, formats) if shard.has_embedding else 0
    return layers + shard.vocab_rows * row + beside + outside


def kv_bytes_per_token(model: ModelSpec, shard: Shard, window_extra_tokens: int | None = None) -> int:
    """Of all layers whose cache grows with every token."""
    return sum(
        count * layer_kv_bytes(model, layer, shard.kv_heads, shard.formats.kv)
        for layer, count in shard.layers
        if layer.window_tokens is None or window_extra_tokens is None
    )


def layer_kv_bytes(model: ModelSpec, layer: LayerSpec, kv_heads: int, kv_format: str) -> int:
    """Of one token in one layer, where so many KV heads are held."""
    whole = model.kv_elements(layer, 0)
    return kv_heads * kv_bytes(model.kv_elements(layer, 1) - whole, kv_format) + kv_bytes(whole, kv_format)


def layer_kv_tokens(layer: LayerSpec, capacity: Capacity) -> int:
    """Tokens that the layer's cache holds, of all sequences: of each no more than a window and what is taken in at
    once, where the engine keeps no more."""
    tokens = capacity.num_kv_blocks * capacity.block_tokens
    if layer.window_tokens is None or capacity.window_extra_tokens is None:
        return tokens
    each = min(layer.window_tokens + capacity.window_extra_tokens, capacity.max_context_tokens)
    return min(tokens, capacity.concurrency * each)


def kv_cache_bytes(model: ModelSpec, shard: Shard, capacity: Capacity) -> int:
    """Of all sequences: keys and values, and the states of layers that have such instead."""
    return sum(
        count
        * (
            layer_kv_tokens(layer, capacity) * layer_kv_bytes(model, layer, shard.kv_heads, shard.formats.kv)
            + (capacity.concurrency * layer.cache.state_bytes if layer.cache else 0)
        )
        for layer, count in shard.layers
    )


def shard_memory(
    model: ModelSpec, shard: Shard, capacity: Capacity, device: Device, *, affine: bool = True
) -> DeviceMemory:
    if capacity.embedding_on_host and device.kind != "cpu":
        shard = replace(shard, has_embedding=False)
    return DeviceMemory(
        weights_bytes=shard_weights_bytes(model, shard) - streamed_bytes(shard),
        kv_bytes=kv_cache_bytes(model, shard, capacity),
        workspace_bytes=workspace_bytes(
            model,
            shard,
            device,
            step_tokens=capacity.step_tokens,
            context_tokens=capacity.max_context_tokens,
            sequences=capacity.concurrency,
            affine=affine,
        ),
        buffer_bytes=capacity.messages_in_flight * _message_bytes(model, shard, capacity.step_tokens),
        reserved_bytes=device.reserved_bytes,
        stream_buffer_bytes=device.stream_buffers * largest_streamed_bytes(shard),
        streamed_bytes=streamed_bytes(shard),
        swap_bytes=capacity.num_swap_blocks * capacity.block_tokens * kv_bytes_per_token(model, shard),
    )


def _message_bytes(model: ModelSpec, shard: Shard, chunk_tokens: int) -> int:
    """Of the largest that waits for a stage: the first one's brings no hidden states."""
    hidden = 0 if shard.has_embedding else model.hidden_size * shard.formats.activation_bytes
    return MESSAGE_BYTES + chunk_tokens * (MESSAGE_TOKEN_BYTES + hidden)


def parameters(model: ModelSpec, stage: Stage, rank: int) -> int:
    """Parameters that rank `rank` of `stage` computes with, exactly."""
    return shard_parameters(model, stage_shards(model, stage)[rank])


def read_bytes(model: ModelSpec, stage: Stage, rank: int) -> int:
    """Checkpoint bytes that the rank reads while it is built; of a tied table twice where its two uses are stored
    apart."""
    shard = stage_shards(model, stage)[rank]
    held = shard_parameters(model, shard)
    if model.tied_embeddings and shard.has_embedding and shard.has_head and shard.formats.packed:
        held += shard.vocab_rows * model.hidden_size
    return held * FORMAT_BYTES[model.checkpoint_format]


def stages_memory(
    model: ModelSpec,
    cluster: Cluster,
    stages: Sequence[Stage],
    capacity: Capacity,
    *,
    affine: bool = True,
) -> dict[str, DeviceMemory]:
    """Memory of every device in use."""
    return {
        device_id: shard_memory(model, shard, capacity, cluster.device(device_id), affine=affine)
        for stage in stages
        for device_id, shard in zip(stage.split.device_ids, stage_shards(model, stage), strict=True)
    }


def plan_capacity(plan: Plan) -> Capacity:
    return Capacity(
        num_kv_blocks=plan.num_kv_blocks,
        block_tokens=plan.block_tokens,
        chunk_tokens=plan.chunk_tokens,
        concurrency=plan.workload.concurrency,
        max_context_tokens=plan.workload.max_context_tokens,
        messages_in_flight=plan.max_in_flight,
        num_swap_blocks=plan.num_swap_blocks,
        window_extra_tokens=plan.workload.window_extra_tokens,
        embedding_on_host=plan.constraints.embedding_on_host,
    )


def plan_memory(plan: Plan) -> dict[str, DeviceMemory]:
    """What every device in use will hold."""
    return stages_memory(plan.model, plan.cluster, plan.stages, plan_capacity(plan), affine=False)


def with_swap_space(plan: Plan, swap_bytes: int) -> Plan:
    """The plan with up to `swap_bytes` of host memory beside each device for blocks that are swapped out.

    Every device swaps the same blocks, so the one whose blocks are largest decides how many.
    Raises UsageError where that is none.
    """
    one = plan_memory(replace(plan, num_swap_blocks=1))
    largest = max(one, key=lambda device_id: one[device_id].swap_bytes)
    num_blocks = swap_bytes // one[largest].swap_bytes
    if num_blocks == 0:
        raise UsageError(
            f"--swap-space {format_bytes(swap_bytes)} is less than a block's {format_bytes(one[largest].swap_bytes)}"
            f" on {largest}; give more"
        )
    swapping = replace(plan, num_swap_blocks=num_blocks)
    memory = plan_memory(swapping)
    for room in host_rooms(plan.cluster, plan.stages, memory):
        if room.crowded:
            raise UsageError(
                f"--swap-space {format_bytes(swap_bytes)} is too much: {room.statement()}; give less"
            )
    return replace(swapping, memory=memory)
