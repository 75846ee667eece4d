"""Every product of every format stands beside a plain one in fp64, of the weights as the format holds them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.weights.checkpoint import Checkpoint
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.linear import PackedLinear
from apportion.model.weights.matrix_source import MatrixSource, stacked
from apportion.model.weights.shard import ShardedDim, Share, whole_placements
from apportion.types.errors import ModelError

FORMATS = ("fp32", "bf16", "fp16", "int8")
SHAPES = [(48, 512), (100, 256), (37, 700), (300, 1024), (3, 5), (2000, 640), (96, 1)]
"""Rows, columns: of whole panels, with a last one of one, two and three vectors, read at once and in several parts."""
ROUNDING = 2e-6
"""Of an fp32 product, relative to the largest of the row's results."""


CPU = CpuBackend(block_tokens=1)


def packed(source: MatrixSource, weight_format: str, bias_N: Tensor | None = None) -> PackedLinear:
    return PackedLinear(source, WEIGHT_FORMATS[weight_format], CPU, bias_N)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def source(folder: Path, weight: Tensor, columns: tuple[int, int] | None = None) -> MatrixSource:
    """`columns` are those of a member of a group."""
    save_file({"w": weight.contiguous()}, folder / "model.safetensors")
    rows, width = weight.shape
    start, stop = columns or (0, width)
    sharded = ShardedDim(dim=1, segments=(width,), share=Share(start=start, stop=stop, units=width))
    reads = tuple(whole_placements("w", (rows, width), sharded if columns else None))
    return MatrixSource(weights=Checkpoint(folder), reads=reads, rows=rows, columns=stop - start)


def as_held(weight: Tensor, weight_format: str) -> Tensor:
    if weight_format == "int8":
        scales = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scales).round().double() * scales.double()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return weight.to(dtypes[weight_format]).double()


def errors(out: Tensor, expected: Tensor) -> Tensor:
    """Of each row, relative to its largest result."""
    return (out - expected).abs().amax(-1) / expected.abs().amax(-1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_products_round_like_fp32(weight_format: str, shape: tuple[int, int], tmp_path: Path):
    weight, bias = random(*shape) / 30, random(shape[0])
    linear = packed(source(tmp_path, weight), weight_format, bias)
    for rows in (1, 2, 7, 33, 270):
        x = random(rows, shape[1])
        expected = x.double() @ as_held(weight, weight_format).T + bias
        assert errors(linear(x), expected).max() < ROUNDING
    assert linear(random(2, 3, shape[1])).shape == (2, 3, shape[0])
    assert linear(random(0, shape[1])).shape == (0, shape[0])
    x = random(shape[1], 3).T
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert linear.weights_bytes == WEIGHT_FORMATS[weight_format].matrix_bytes(*shape)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_row_does_not_depend_on_the_rows_beside_it(weight_format: str, tmp_path: Path):
    linear = packed(source(tmp_path, random(520, 600)), weight_format)
    x = random(16, 600)
    beside_an_outlier = x.clone()
    beside_an_outlier[5] *= 1e6
    others = [row for row in range(16) if row != 5]
    out = linear(x)
    assert torch.equal(out[others], linear(beside_an_outlier)[others])
    for rows in (1, 3, 7, 11):
        assert torch.equal(torch.cat([linear(some) for some in x.split(rows)]), out)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_parts_of_a_matrix_add_up_to_the_whole(weight_format: str, tmp_path: Path):
    """As in a group: the scales of int8 are those of whole rows, the activations' scales those of the parts."""
    weight, x = random(96, 700), random(9, 700)
    weight[:, 650:] *= 4
    x[:, :100] *= 8
    whole = packed(source(tmp_path, weight), weight_format)
    parts = [
        packed(source(tmp_path, weight, part), weight_format)(x[:, part[0] : part[1]])
        for part in ((0, 517), (517, 700))
    ]
    assert errors(parts[0] + parts[1], whole(x)).max() < ROUNDING


def test_rows_of_zeros_and_values_that_are_not_numbers(tmp_path: Path):
    weight = random(64, 64)
    weight[3] = 0
    linear = packed(source(tmp_path, weight), "int8")
    x = random(4, 64)
    x[1], x[2, 7], x[3, 5] = 0, torch.nan, torch.inf
    out = linear(x)
    assert torch.all(out[:2, 3] == 0)
    assert torch.all(out[1] == 0)
    assert not torch.isfinite(out[2:]).any()


def test_weights_beyond_fp16_are_refused_there_alone(tmp_path: Path):
    weight, x = random(64, 64), random(2, 64)
    weight[1, 2] = 70000
    with pytest.raises(ModelError, match="tensor 'w' has a weight of 7e\\+04, beyond the range of fp16"):
        packed(source(tmp_path, weight), "fp16")
    linear = packed(source(tmp_path, weight), "bf16")
    assert errors(linear(x), x.double() @ as_held(weight, "bf16").T).max() < ROUNDING


def test_int8_on_any_device_is_the_same_matrix(tmp_path: Path):
    """What CUDA runs, on CPU tensors."""
    weight, x = random(700, 600), random(5, 600)
    backend = TorchBackend("cpu", torch.float32, block_tokens=1, gather_tokens=0)
    product = backend.product(source(tmp_path, weight), WEIGHT_FORMATS["int8"], backend.allocate)
    assert errors(product(x), x.double() @ as_held(weight, "int8").T).max() < ROUNDING
    assert product(x.half()).dtype == torch.float16
    assert errors(product(x.half()), product(x)).max() < 2e-3


def test_stacked_rows_are_packed_as_one_matrix(tmp_path: Path):
    weight, x = random(90, 128), random(4, 128)
    whole = source(tmp_path, weight)
    shares = (Share(start=0, stop=2, units=3), Share(start=2, stop=3, units=3))
    parts = []
    for share in reversed(shares):
        sharded = ShardedDim(dim=0, segments=(60, 30), share=share)
        reads = tuple(whole_placements("w", (90, 128), sharded))
        parts.append(MatrixSource(weights=whole.weights, reads=reads, rows=30 * share.count, columns=128))
    order = [*range(40, 60), *range(80, 90), *range(40), *range(60, 80)]
    for weight_format in FORMATS:
        out = packed(stacked(tuple(parts)), weight_format)(x)
        assert errors(out, x.double() @ as_held(weight[order], weight_format).T).max() < ROUNDING
