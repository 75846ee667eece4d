"""Causal attention of a flat ragged batch over the paged KV pool, by torch's own operations.

As many sequences with one new token as a full context has room for attend together, their keys and values gathered side
by side. For several new tokens each sequence's queries are taken in tiles, so that no temporary grows with the number
of new tokens. The query heads of a KV head are a dimension of their own: neither keys nor values are ever repeated.

Shapes: T = tokens of the batch, Q = tokens of one tile, C = keys a tile can see, K = local KV heads, G = query
heads per KV head, N = K·G, E = G·Q, D = head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.backends.torch.batch import DecodeGroup, SequenceSpan, TorchBatch
from apportion.model.kv_pool import PoolTensors
from apportion.types.layout import QUERY_TILE


class TorchPool:
    """See `KVPool`."""

    def __init__(self, tensors: PoolTensors) -> None:
        self.tensors = tensors

    def attend(
        self,
        query_TND: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        *,
        layer: int,
        batch: TorchBatch,
        scale: float,
        window_tokens: int | None,
        softcap: float | None,
        sinks_N: Tensor | None,
        out_TND: Tensor | None = None,
    ) -> Tensor:
        num_tokens, kv_heads, head_dim = key_TKD.shape
        query_TKGD = query_TND.reshape(num_tokens, kv_heads, -1, head_dim)
        if out_TND is None:
            out_TND = torch.empty(query_TND.shape, dtype=query_TND.dtype, device=query_TND.device)
        out_TKGD = out_TND.view(query_TKGD.shape)
        options = (scale, window_tokens, softcap, sinks_N)
        self.tensors.write(layer, batch.slots_T, key_TKD, value_TKD)
        for group in batch.decode_groups:
            query_BKGD = query_TKGD[group.rows_B]
            out_TKGD[group.rows_B] = _attend_together(query_BKGD, group, layer, self.tensors, *options)
        for span in batch.alone_spans:
            _attend_span(query_TKGD, out_TKGD, layer, span, self.tensors, *options)
        return out_TND


def _attend_together(
    query_BKGD: Tensor,
    group: DecodeGroup,
    layer: int,
    tensors: PoolTensors,
    scale: float,
    window_tokens: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """The sequences' KV heads become KV heads of one query; returns out_BKGD."""
    num, kv_heads, heads_each, head_dim = query_BKGD.shape
    key_KSD, value_KSD = tensors.read(layer, group.slots_BC.flatten(), query_BKGD.dtype)
    if sinks_N is not None:
        sinks_N = sinks_N.view(kv_heads, 1, heads_each).expand(-1, num, -1).flatten()
    out_1HGD = _attend(
        query_BKGD.transpose(0, 1).reshape(1, kv_heads * num, heads_each, head_dim),
        key_KSD.view(kv_heads * num, -1, head_dim),
        value_KSD.view(kv_heads * num, -1, head_dim),
        scale,
        group.visible_BC(window_tokens).repeat(kv_heads, 1)[:, None, None],
        softcap,
        sinks_N,
    )
    return out_1HGD.view(kv_heads, num, heads_each, head_dim).transpose(0, 1)


def _attend_span(
    query_TKGD: Tensor,
    out_TKGD: Tensor,
    layer: int,
    span: SequenceSpan,
    tensors: PoolTensors,
    scale: float,
    window_tokens: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> None:
    for row, stop, first_key in _tiles(span, window_tokens):
        stop_key = span.start + stop - span.row_start
        mask_QC = _causal_mask(stop - row, stop_key - first_key, window_tokens, query_TKGD.device)
        slots = span.slots_between(first_key, stop_key)
        keys_values = tensors.read(layer, slots, query_TKGD.dtype)
        out_TKGD[row:stop] = _attend(query_TKGD[row:stop], *keys_values, scale, mask_QC, softcap, sinks_N)
        del keys_values  # before the next tile's are gathered


def _tiles(span: SequenceSpan, window_tokens: int | None) -> list[tuple[int, int, int]]:
    """Rows `[row, stop)` of each tile, and the first position any of them sees."""
    tiles = []
    for row in range(span.row_start, span.row_stop, QUERY_TILE):
        first = span.start + row - span.row_start
        first_key = 0 if window_tokens is None else max(0, first - window_tokens + 1)
        tiles.append((row, min(row + QUERY_TILE, span.row_stop), first_key))
    return tiles


def _attend(
    query_QKGD: Tensor,
    key_KCD: Tensor,
    value_KCD: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks_N: Tensor | None,
) -> Tensor:
    """`mask` says which keys a query sees: mask_QC, of a single query also mask_K11C; None: all. Returns out_QKGD."""
    if softcap is None and sinks_N is None:
        return _attend_fused(query_QKGD, key_KCD, value_KCD, scale, mask)
    num_queries, kv_heads, group, head_dim = query_QKGD.shape
    # One product per KV head: a broadcast matmul would copy the keys for every query head.
    query_KED = query_QKGD.permute(1, 2, 0, 3).reshape(kv_heads, group * num_queries, head_dim)
    scores_KEC = torch.bmm(query_KED, key_KCD.transpose(1, 2)).float().mul_(scale)
    if softcap is not None:
        scores_KEC.div_(softcap).tanh_().mul_(softcap)
    scores_KGQC = scores_KEC.view(kv_heads, group, num_queries, -1)
    if mask is not None:
        scores_KGQC.masked_fill_(mask.logical_not(), float("-inf"))
    weights_KEC = _softmax_(scores_KGQC, sinks_N).view_as(scores_KEC).to(value_KCD.dtype)
    out_KED = torch.bmm(weights_KEC, value_KCD)
    return out_KED.view(kv_heads, group, num_queries, head_dim).permute(2, 0, 1, 3)


def _attend_fused(
    query_QKGD: Tensor, key_KCD: Tensor, value_KCD: Tensor, scale: float, mask: Tensor | None
) -> Tensor:
    key_K1CD, value_K1CD = key_KCD[:, None], value_KCD[:, None]
    if len(query_QKGD) == 1:  # the group's heads are the queries: each key is read once for all of them
        out_K1GD = F.scaled_dot_product_attention(
            query_QKGD.transpose(0, 1), key_K1CD, value_K1CD, attn_mask=mask, scale=scale
        )
        return out_K1GD.transpose(0, 1)
    group = query_QKGD.shape[2]
    out_KGQD = F.scaled_dot_product_attention(
        query_QKGD.permute(1, 2, 0, 3),
        key_K1CD.expand(-1, group, -1, -1),
        value_K1CD.expand(-1, group, -1, -1),
        attn_mask=mask,
        scale=scale,
    )
    return out_KGQD.permute(2, 0, 1, 3)


def _causal_mask(
    num_queries: int, num_keys: int, window_tokens: int | None, device: torch.device
) -> Tensor | None:
    """mask_QC, True where a query sees a key; None for a single query, which sees every key it is given."""
    if num_queries == 1:
        return None
    first_query = num_keys - num_queries
    mask_QC = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril_(first_query)
    return mask_QC if window_tokens is None else mask_QC.triu_(first_query - window_tokens + 1)


def _softmax_(scores_KGQC: Tensor, sinks_N: Tensor | None) -> Tensor:
    """Softmax in place over the keys and, where there are sinks, each head's sink."""
    highest_KGQ1 = scores_KGQC.amax(-1, keepdim=True)
    if sinks_N is None:
        weights_KGQC = scores_KGQC.sub_(highest_KGQ1).exp_()
        return weights_KGQC.div_(weights_KGQC.sum(-1, keepdim=True))
    sinks_KG11 = sinks_N.float().view(*scores_KGQC.shape[:2], 1, 1)
    highest_KGQ1 = torch.maximum(highest_KGQ1, sinks_KG11)
    weights_KGQC = scores_KGQC.sub_(highest_KGQ1).exp_()
    return weights_KGQC.div_(weights_KGQC.sum(-1, keepdim=True) + (sinks_KG11 - highest_KGQ1).exp_())
