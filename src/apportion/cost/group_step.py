"""Seconds of one step on a tensor-parallel group, of which a single device is the smallest."""

from collections.abc import Sequence

from apportion.cost.host_memory import at_work
from apportion.cost.roofline import AnyStep, attention_s, ffn_column_s, head_row_s
from apportion.cost.shard import Shard, stage_shards
from apportion.cost.streaming import streaming_step_s
from apportion.cost.traffic import LOGIT_BYTES, layer_reductions, reduction_s
from apportion.types.cluster import Cluster, Device, Link
from apportion.types.model import LayerSpec, ModelSpec
from apportion.types.plan import Stage

Members = Sequence[tuple[Device, Shard]]


def group_step_s(model: ModelSpec, members: Members, link: Link | None, step: AnyStep) -> float:
    """Time of one step: members wait for each other after attention and after the FFN, so a layer takes
    max(attention) + max(FFN) + max(overhead) + reductions; the step adds max(overhead) once. Streamed layers' weights
    arrive meanwhile, or add their time."""
    attention = sum(
        count * group_attention_s(model, members, layer, step) for layer, count in members[0][1].layers
    )
    computing_s = attention + group_rest_s(model, members, link, step)
    return streaming_step_s(members, step, computing_s)


def group_attention_s(model: ModelSpec, members: Members, layer: LayerSpec, step: AnyStep) -> float:
    return max(
        attention_s(device, model, layer, shard.kv_heads, step, shard.formats) for device, shard in members
    )


def group_rest_s(model: ModelSpec, members: Members, link: Link | None, step: AnyStep) -> float:
    """All of a step but attention: it depends on the step's tokens alone, not on their context."""
    shards = [shard for _, shard in members]
    ffn_s = sum(
        count * max(_ffn_s(device, shard, layer, step) for device, shard in members)
        for layer, count in shards[0].layers
    )
    overhead_s = shards[0].num_layers * max(device.layer_overhead_s for device, _ in members)
    overhead_s += max(device.step_overhead_s for device, _ in members)
    head_s = max(_head_s(model, device, shard, step) for device, shard in members)
    return ffn_s + overhead_s + head_s + group_exchange_s(model, shards, link, step)


def unsynchronised_step_s(model: ModelSpec, members: Members, step: AnyStep) -> float:
    """The looser form max_g(compute_g): members wait only at the end of the stage, and exchange for free.

    Never more than `group_step_s`."""
    return max(
        sum(
            count
            * (
                attention_s(device, model, layer, shard.kv_heads, step, shard.formats)
                + _ffn_s(device, shard, layer, step)
                + device.layer_overhead_s
            )
            for layer, count in shard.layers
        )
        + _head_s(model, device, shard, step)
        + device.step_overhead_s
        for device, shard in members
    )


def _ffn_s(device: Device, shard: Shard, layer: LayerSpec, step: AnyStep) -> float:
    return shard.ffn_columns * ffn_column_s(device, layer, step.tokens, shard.formats)


def _head_s(model: ModelSpec, device: Device, shard: Shard, step: AnyStep) -> float:
    if not shard.has_head:
        return 0.0
    return shard.vocab_rows * head_row_s(device, model, step.sampled_rows, shard.formats)


def group_exchange_s(model: ModelSpec, shards: Sequence[Shard], link: Link | None, step: AnyStep) -> float:
    """Reductions of a step inside a group, and the gathering of its logits on rank 0."""
    if len(shards) == 1:
        return 0.0
    assert link is not None
    gathered_rows = max(shard.vocab_rows for shard in shards[1:])
    return group_reductions_s(model, shards[0], link, step) + (
        link.seconds(gathered_rows * step.sampled_rows * LOGIT_BYTES)
        if shards[0].has_head and step.sampled_rows
        else 0.0
    )


def group_reductions_s(model: ModelSpec, shard: Shard, link: Link, step: AnyStep) -> float:
    messages = layer_reductions(model, shard.formats.activation_bytes)
    per_layer_s = sum(reduction_s(link, shard.size, step.tokens * size) for size in messages)
    embedding_s = reduction_s(link, shard.size, step.tokens * messages[0]) if shard.has_embedding else 0.0
    return shard.num_layers * per_layer_s + embedding_s


def stage_members(model: ModelSpec, cluster: Cluster, stage: Stage) -> Members:
    devices = [cluster.device(device_id) for device_id in stage.split.device_ids]
    return list(zip(devices, stage_shards(model, stage), strict=True))


def members_at_work(cluster: Cluster, members: Members, *, overlapping: bool) -> Members:
    devices = at_work(cluster, [device for device, _ in members], overlapping=overlapping)
    return list(zip(devices, (shard for _, shard in members), strict=True))
