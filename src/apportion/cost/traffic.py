"""Payload bytes on every link, and the time they take.

The protocol that is counted: rank `i mod G_k` of stage k sends the hidden states to rank i of stage k+1; inside
a group every rank sends its partial sums to every other (direct exchange), twice a layer and once after a split
embedding; in a split head the logits are gathered on rank 0. Headers, in which token ids travel, are not counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, permutations

from apportion.types.cluster import Cluster, Link
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan, Stage
from apportion.types.units import FORMAT_BYTES

ID_BYTES = 4
LOGIT_BYTES = 4
NORM_BYTES = 4
WIDE_QK_NORM_FAMILIES = frozenset({"olmo2"})
"""Families that normalise q and k over all heads: a split one reduces a sum of squares for each, in fp32."""

LinkBytes = dict[tuple[str, str], int]


def layer_reductions(model: ModelSpec, element_bytes: int) -> tuple[int, ...]:
    """Bytes per token of each reduction in a group's layer: after attention, after the FFN, q/k norms."""
    hidden = model.hidden_size * element_bytes
    norms = (NORM_BYTES, NORM_BYTES) if model.family in WIDE_QK_NORM_FAMILIES else ()
    return (hidden, hidden, *norms)


def reduction_s(link: Link, group_size: int, message_bytes: float) -> float:
    """Direct exchange: one latency, then each member's link carries `group_size − 1` messages."""
    return link.latency_s + (group_size - 1) * message_bytes / link.bytes_per_s


def hop_bytes(model: ModelSpec, next_group_size: int, tokens: int, element_bytes: int) -> int:
    """Hidden states of a step to every rank of the next stage."""
    return next_group_size * tokens * model.hidden_size * element_bytes


def group_link(cluster: Cluster, device_ids: Sequence[str]) -> Link | None:
    """The link inside a group's host; None where there is none."""
    return cluster.link(device_ids[0], device_ids[-1])


def coordinator_host(cluster: Cluster) -> str:
    return cluster.coordinator or cluster.devices[0].host


def with_each_coordinator(cluster: Cluster) -> tuple[Cluster, ...]:
    """The cluster with its coordinator on each of the devices' hosts."""
    hosts = dict.fromkeys(device.host for device in cluster.devices)
    return tuple(replace(cluster, coordinator=host) for host in hosts)


def joins_all(cluster: Cluster, stages: Sequence[Stage]) -> bool:
    """Whether there are links from the coordinator to the first stage and from the last one back."""
    ends = (cluster.device(stage.split.device_ids[0]).host for stage in (stages[0], stages[-1]))
    home = coordinator_host(cluster)
    return all(host_link(cluster, home, host) is not None for host in ends)


def not_joined(cluster: Cluster, stages: Sequence[Stage]) -> tuple[str, ...]:
    """Devices on hosts that no link joins to a host of the stages' devices."""
    in_use = {stage.split.device_ids[0] for stage in stages}
    used = {device.host for device in cluster.devices if device.id in in_use}
    known = used | {link.dst for link in cluster.links if link.src in used}
    known |= {link.src for link in cluster.links if link.dst in used}
    return tuple(device.id for device in cluster.devices if device.host not in known)


def host_link(cluster: Cluster, src_host: str, dst_host: str) -> Link | None:
    return next((link for link in cluster.links if {link.src, link.dst} == {src_host, dst_host}), None)


def run_link_bytes(
    plan: Plan, prompt_tokens: Sequence[int], output_tokens: Sequence[int], *, further_samples: int = 0
) -> LinkBytes:
    """Payload bytes on each directed (src, dst) link for prompts and outputs of these lengths.

    A prompt passes through the stages once, less what the prefix cache has of it, and so do all tokens of an
    output but the last. `further_samples` of the outputs draw their first token from the logits of a prompt's first
    sample.
    """
    processed = sum(prompt_tokens) + sum(output_tokens) - len(output_tokens)
    sampled = sum(output_tokens) - further_samples
    carried: Counter[tuple[str, str]] = Counter()
    for stage, following in pairwise(plan.stages):
        carried.update(_hop_link_bytes(plan.model, stage, following, processed))
    for stage in plan.stages:
        carried.update(_group_link_bytes(plan.model, stage, processed, sampled))
    return dict(carried)


def _hop_link_bytes(model: ModelSpec, stage: Stage, following: Stage, processed: int) -> LinkBytes:
    sources = stage.split.device_ids
    return {
        (sources[rank % len(sources)], device_id): hop_bytes(
            model, 1, processed, FORMAT_BYTES[stage.activation_format]
        )
        for rank, device_id in enumerate(following.split.device_ids)
    }


def _group_link_bytes(model: ModelSpec, stage: Stage, processed: int, sampled: int) -> LinkBytes:
    element_bytes = FORMAT_BYTES[stage.activation_format]
    per_token = stage.num_layers * sum(layer_reductions(model, element_bytes))
    if stage.has_embedding:
        per_token += model.hidden_size * element_bytes
    carried = Counter(dict.fromkeys(permutations(stage.split.device_ids, 2), per_token * processed))
    if stage.has_head:
        root, *others = stage.split.device_ids
        for device_id, rows in zip(others, stage.split.vocab_rows[1:], strict=True):
            carried[device_id, root] += rows * LOGIT_BYTES * sampled
    return dict(carried)
