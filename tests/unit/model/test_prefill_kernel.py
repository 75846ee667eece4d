"""Attention of several new tokens of a sequence, compiled and by torch, against plain softmax in fp64, on scattered
blocks."""

import pytest
import torch
from torch import Tensor

from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.kv_pool import PoolTensors
from apportion.types.request import Chunk, ScheduledBatch

KV_HEADS, GROUP, BLOCK_TOKENS, BLOCKS = 2, 3, 4, 80
CONTEXT = 203
"""Several of the kernel's blocks of keys, the last of them not full."""
TABLE = tuple(torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(5)).tolist())


def sequence(head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """query_TND, key_TKD and value_TKD of all positions."""
    generator = torch.Generator().manual_seed(head_dim)
    query_TND = torch.randn(CONTEXT, KV_HEADS * GROUP, head_dim, generator=generator)
    key_TKD, value_TKD = torch.randn(2, CONTEXT, KV_HEADS, head_dim, generator=generator)
    return query_TND * 2, key_TKD, value_TKD


def prefill(
    cuts: list[int],
    head_dim: int = 24,
    dtype: torch.dtype = torch.float32,
    *,
    kv_dtype: torch.dtype | None = None,
    rounded_to: torch.dtype = torch.float64,
    window_tokens: int | None = None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """out_TND of all positions, in chunks that end at `cuts`."""
    backend = (
        CpuBackend(block_tokens=BLOCK_TOKENS)
        if dtype == torch.float32
        else TorchBackend("cpu", dtype, block_tokens=BLOCK_TOKENS, gather_tokens=0)
    )
    tensors = PoolTensors(
        layer_start=3,
        num_layers=1,
        num_blocks=BLOCKS,
        block_tokens=BLOCK_TOKENS,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        dtype=kv_dtype or dtype,
        torch_device=backend.torch_device,
    )
    for tensor in (*tensors.keys_KSD, *tensors.values_KSD):
        tensor.fill_(1e4)  # what no one may see
    query_TND, *new = sequence(head_dim)
    parts = [query_TND.to(dtype), *(part.to(rounded_to).to(dtype) for part in new)]
    outs = []
    for start, stop in zip([0, *cuts], [*cuts, CONTEXT], strict=True):
        chunk = Chunk(
            sequence_id=0, start=start, token_ids=(5,) * (stop - start), block_ids=TABLE, sampling=None
        )
        batch = backend.prepare(ScheduledBatch(step_id=0, chunks=(chunk,)))
        out_TND = backend.kv_pool(tensors).attend(
            *(part[start:stop] for part in parts),
            layer=3,
            batch=batch,
            scale=1.5 * head_dim**-0.5,
            window_tokens=window_tokens,
            softcap=softcap,
            sinks_N=sinks_N,
        )
        outs.append(out_TND)
    return torch.cat(outs)


def expected(
    head_dim: int, window_tokens: int | None, softcap: float | None, sinks_N: Tensor | None
) -> Tensor:
    query_NTD, key_NTD, value_NTD = (
        part.double().transpose(0, 1).repeat_interleave(repeats, 0)
        for part, repeats in zip(sequence(head_dim), (1, GROUP, GROUP), strict=True)
    )
    scores_NTC = query_NTD @ key_NTD.transpose(1, 2) * 1.5 * head_dim**-0.5
    if softcap is not None:
        scores_NTC = softcap * torch.tanh(scores_NTC / softcap)
    seen_TC = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril()
    if window_tokens is not None:
        seen_TC = seen_TC.triu(1 - window_tokens)
    scores_NTC = scores_NTC.masked_fill(~seen_TC, -torch.inf)
    if sinks_N is not None:
        scores_NTC = torch.cat([scores_NTC, sinks_N.double()[:, None, None].expand(-1, CONTEXT, 1)], -1)
    return (scores_NTC.softmax(-1)[..., :CONTEXT] @ value_NTD).transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window_tokens", [None, 2, 7, 100, 300])
def test_it_is_attention(
    window_tokens: int | None, softcap: float | None, with_sinks: bool, dtype: torch.dtype
):
    """In fp64 as on a GPU: no compiled kernel."""
    sinks_N = torch.linspace(-2, 9, KV_HEADS * GROUP, dtype=dtype) if with_sinks else None
    options = {"window_tokens": window_tokens, "softcap": softcap, "sinks_N": sinks_N}
    out_TND = prefill([5, 130, 195], dtype=dtype, **options)
    torch.testing.assert_close(out_TND.double(), expected(24, **options), atol=4e-6, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 80, 96, 128, 256])
def test_of_any_head_dim(head_dim: int):
    out_TND = prefill([2], head_dim)
    torch.testing.assert_close(out_TND.double(), expected(head_dim, None, None, None), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window_tokens", [None, 50])
def test_keys_and_values_of_16_bits_are_widened_exactly(kv_dtype: torch.dtype, window_tokens: int | None):
    """As fp32 ones that have been rounded."""
    out_TND = prefill([70], kv_dtype=kv_dtype, window_tokens=window_tokens)
    rounded_TND = prefill([70], rounded_to=kv_dtype, window_tokens=window_tokens)
    assert torch.equal(out_TND, rounded_TND)


@pytest.mark.parametrize("window_tokens", [None, 50])
@pytest.mark.parametrize("cuts", [[3], [64, 128], [96, 192], [100, 110, 121, 201]])
def test_a_token_gets_the_same_bits_however_the_prompt_is_cut(cuts: list[int], window_tokens: int | None):
    whole_TND = prefill([], window_tokens=window_tokens)
    assert torch.equal(prefill(cuts, window_tokens=window_tokens), whole_TND)


def test_the_threads_of_a_device_change_nothing():
    one_TND = prefill([70])
    torch.set_num_threads(2)
    try:
        assert torch.equal(prefill([70]), one_TND)
    finally:
        torch.set_num_threads(1)
