"""Decode attention, compiled and gathered, against plain softmax in fp64, on scattered blocks."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch import pool as torch_pool
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.kv_pool import PoolTensors
from apportion.types.errors import ModelError
from apportion.types.request import Chunk, ScheduledBatch

KV_HEADS, GROUP, HEAD_DIM, BLOCK_TOKENS = 2, 3, 24, 4
TABLES = {0: (7,), 1: (0, 1, 2, 4, 3), 2: (8, 9, 10, 11, 12, 13, 15, 16)}
LENGTHS = {0: 1, 1: 18, 2: 32}
SCALE = 0.3


def filled_pool(dtype: torch.dtype = torch.float32) -> PoolTensors:
    pool = PoolTensors(
        layer_start=3,
        num_layers=1,
        num_blocks=20,
        block_tokens=BLOCK_TOKENS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
        torch_device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(1)
    for tensor in (*pool.keys_KSD, *pool.values_KSD):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return pool


def new_tokens(sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sequence)
    query = torch.randn(KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    key, value = torch.randn(2, KV_HEADS, HEAD_DIM, generator=generator)
    return query * 3, key, value


def decode(
    pool: PoolTensors,
    sequences: list[int],
    gather_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    **options,
) -> Tensor:
    chunks = tuple(
        Chunk(sequence_id=i, start=LENGTHS[i] - 1, token_ids=(5,), block_ids=TABLES[i], sampling=None)
        for i in sequences
    )
    backend = (
        CpuBackend(block_tokens=BLOCK_TOKENS)
        if dtype == torch.float32
        else TorchBackend("cpu", dtype, block_tokens=BLOCK_TOKENS, gather_tokens=gather_tokens)
    )
    batch = backend.prepare(ScheduledBatch(step_id=0, chunks=chunks))
    new = zip(*map(new_tokens, sequences), strict=True)
    query, key, value = (torch.stack(parts).to(dtype) for parts in new)
    return backend.kv_pool(pool).attend(query, key, value, layer=3, batch=batch, scale=SCALE, **options)


def expected(
    sequence: int,
    window_tokens: int | None,
    softcap: float | None,
    sinks_N: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dtype` is what keys and values are rounded to."""
    pool, (query_ND, *new) = filled_pool(dtype), new_tokens(sequence)
    key_KD, value_KD = (part.to(dtype) for part in new)
    slots = [block * BLOCK_TOKENS + i for block in TABLES[sequence] for i in range(BLOCK_TOKENS)]
    slots = slots[: LENGTHS[sequence]]
    keys_NCD, values_NCD = (
        torch.cat([stored[0][:, slots[:-1]], new[:, None]], 1).double().repeat_interleave(GROUP, 0)
        for stored, new in ((pool.keys_KSD, key_KD), (pool.values_KSD, value_KD))
    )
    scores_NC = (keys_NCD @ query_ND.double()[:, :, None])[..., 0] * SCALE
    if softcap is not None:
        scores_NC = softcap * torch.tanh(scores_NC / softcap)
    if window_tokens is not None:
        scores_NC[:, : max(0, len(slots) - window_tokens)] = -torch.inf
    if sinks_N is not None:
        scores_NC = torch.cat([scores_NC, sinks_N.double()[:, None]], 1)
    weights_NC = scores_NC.softmax(-1)[:, : len(slots)]
    return (weights_NC[:, None] @ values_NCD)[:, 0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window_tokens", [None, 1, 7, 18, 100])
def test_it_is_attention(
    window_tokens: int | None, softcap: float | None, with_sinks: bool, dtype: torch.dtype
):
    sinks_N = torch.linspace(-2, 9, KV_HEADS * GROUP) if with_sinks else None
    options = {"window_tokens": window_tokens, "softcap": softcap, "sinks_N": sinks_N}
    out_BND = decode(filled_pool(dtype), [2, 0, 1], **options)
    for out_ND, sequence in zip(out_BND, [2, 0, 1], strict=True):
        right_ND = expected(sequence, window_tokens, softcap, sinks_N, dtype)
        torch.testing.assert_close(out_ND, right_ND, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("gather_tokens", "num_groups"), [(0, 0), (64, 1), (96, 1), (40, 1), (20, 0)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window_tokens", [None, 1, 7, 100])
def test_gathered_side_by_side_it_is_attention_too(
    window_tokens: int | None, softcap: float | None, with_sinks: bool, gather_tokens: int, num_groups: int
):
    """As on a GPU: by torch's own operations."""
    sinks_N = torch.linspace(-2, 9, KV_HEADS * GROUP).double() if with_sinks else None
    pool = filled_pool(torch.float64)
    options = {"window_tokens": window_tokens, "softcap": softcap, "sinks_N": sinks_N}
    with patch.object(torch_pool, "_attend_together", wraps=torch_pool._attend_together) as together:
        out_BND = decode(pool, [2, 0, 1], gather_tokens, torch.float64, **options)
    assert together.call_count == num_groups
    for out_ND, sequence in zip(out_BND, [2, 0, 1], strict=True):
        right_ND = expected(sequence, window_tokens, softcap, sinks_N)
        torch.testing.assert_close(out_ND.float(), right_ND, atol=2e-6, rtol=1e-5)


def test_a_sequence_gets_the_same_bits_whoever_is_beside_it():
    none = {"window_tokens": None, "softcap": None, "sinks_N": None}
    together_BND = decode(filled_pool(), [0, 1, 2], **none)
    for sequence, out_ND in enumerate(together_BND):
        assert torch.equal(decode(filled_pool(), [sequence], **none)[0], out_ND)


def test_a_sequence_gets_the_same_bits_wherever_its_blocks_lie():
    none = {"window_tokens": 29, "softcap": None, "sinks_N": None}
    scattered, in_order = filled_pool(), filled_pool()
    for tensors in (in_order.keys_KSD, in_order.values_KSD):
        blocks_KBOD = tensors[0].unflatten(1, (-1, BLOCK_TOKENS))
        blocks_KBOD[:, : len(TABLES[2])] = blocks_KBOD[:, list(TABLES[2])]
    with patch.dict(TABLES, {2: tuple(range(len(TABLES[2])))}):
        in_order_ND = decode(in_order, [2], **none)[0]
    assert torch.equal(decode(scattered, [2], **none)[0], in_order_ND)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("new_rows", [1, 2])
def test_keys_and_values_are_rounded_as_torch_does(dtype: torch.dtype, new_rows: int):
    """By the compiled kernel for a single token, and otherwise."""
    pool = filled_pool(dtype)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, new_rows, KV_HEADS, HEAD_DIM, generator=generator) * 10.0 ** torch.arange(
        -8, 4
    ).repeat(2)
    attend_new(pool, key, value)
    for stored, new in ((pool.keys_KSD[0], key), (pool.values_KSD[0], value)):
        assert torch.equal(stored[:, :new_rows], new.transpose(0, 1).to(dtype))
    pool.check_range()


@pytest.mark.parametrize("new_rows", [1, 2])
@pytest.mark.parametrize("number", [65520.0, -1e9, float("inf")])
def test_a_number_beyond_fp16_is_an_error(number: float, new_rows: int):
    key, value = torch.ones(2, new_rows, KV_HEADS, HEAD_DIM)
    value[-1, 1, 3] = 65519.0
    attend_new(pool := filled_pool(torch.float16), key, value)
    pool.check_range()
    value[-1, 1, 3] = number
    attend_new(pool, key, value)
    with pytest.raises(ModelError, match=r"fp16 \(65504\).*--kv-format bf16"):
        pool.check_range()
    attend_new(wide := filled_pool(torch.bfloat16), key, value)
    wide.check_range()


def attend_new(pool: PoolTensors, key_TKD: Tensor, value_TKD: Tensor) -> None:
    """The first tokens of a sequence."""
    chunk = Chunk(sequence_id=0, start=0, token_ids=(5,) * len(key_TKD), block_ids=(0,), sampling=None)
    backend = CpuBackend(block_tokens=BLOCK_TOKENS)
    batch = backend.prepare(ScheduledBatch(step_id=0, chunks=(chunk,)))
    query_TND = torch.ones(len(key_TKD), KV_HEADS * GROUP, HEAD_DIM)
    options = {"window_tokens": None, "softcap": None, "sinks_N": None}
    backend.kv_pool(pool).attend(query_TND, key_TKD, value_TKD, layer=3, batch=batch, scale=SCALE, **options)


def test_only_the_new_slots_are_written():
    pool, untouched = filled_pool(), filled_pool()
    decode(pool, [1, 2], window_tokens=None, softcap=None, sinks_N=None)
    for after, before in zip(
        (pool.keys_KSD, pool.values_KSD), (untouched.keys_KSD, untouched.values_KSD), strict=True
    ):
        changed = (after[0] != before[0]).any(-1).any(0).nonzero().flatten().tolist()
        assert changed == sorted([3 * BLOCK_TOKENS + 1, 16 * BLOCK_TOKENS + 3])


def test_far_apart_scores_stay_finite():
    pool = filled_pool()
    pool.keys_KSD[0].mul_(1e4)
    out_BND = decode(pool, [2], window_tokens=None, softcap=None, sinks_N=None)
    assert out_BND.isfinite().all()
