"""Products of fp32 activations with weights packed for an x86 CPU, rounded like those of fp32.

Each takes the rows of its matrix in pieces, so that packing needs one piece beside what is packed. A row's result
does not depend on the rows of activations beside it.

Shapes: M = rows of activations, N = output rows, K = input columns, F = folds.
"""

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_COLUMNS = 512
"""Of fbgemm's blocks: shorter ones are filled up with zeros."""
MOST_FOLDS = 4
"""More would save fewer bytes of weights than they add to activations."""
NUM_ROWS = (1, 4, 8, 16, 24, 32, 64, 128, 256)
FIXED_POINT_BYTES = 3
BYTE_ZERO = 0x40
FIXED_POINT_ZERO = 0x404040
"""Zero of the fixed-point activations; each of its bytes is `BYTE_ZERO`."""
FIXED_POINT_MAX = float(0x7FFFFF - FIXED_POINT_ZERO)
SMALLEST_PEAK = 1e-30
TILE_ROWS = 16
"""fbgemm writes code for every number of rows it is given: it stays at about 1 MiB up to here, and more rows than this
at once are not faster."""

_ZERO = torch.tensor(float(2**23 + FIXED_POINT_ZERO))
_MAX = torch.tensor(FIXED_POINT_MAX)
_BYTE_ZERO = torch.tensor(float(BYTE_ZERO))
_BYTE_WEIGHTS = torch.tensor([[1.0, 2.0**8, 2.0**16]])


class BlockedProduct:
    """fp32 weights in oneDNN's blocks: where MKL has no code for the CPU (AMD's), twice as fast as a plain product.

    oneDNN writes code for every number of rows, so those are filled up to a few `NUM_ROWS`.
    """

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self._pieces = [torch.ops.mkldnn._reorder_linear_weight(weight_NK) for weight_NK in pieces]

    @staticmethod
    def prepare(rows: int, columns: int) -> None:
        """Has the code written that a piece of this shape will need, whatever the number of rows of activations."""
        product = BlockedProduct(iter([torch.ones(rows, columns)]))
        for num in NUM_ROWS:
            product(torch.ones(num, columns))

    def __call__(self, x_MK: Tensor) -> Tensor:
        tiles = [self._product(tile_MK) for tile_MK in x_MK.split(NUM_ROWS[-1])]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def _product(self, x_MK: Tensor) -> Tensor:
        rows = len(x_MK)
        filled_MK = F.pad(x_MK, (0, 0, 0, next(num for num in NUM_ROWS if num >= rows) - rows))
        linear = torch.ops.mkldnn._linear_pointwise
        return _joined([linear(filled_MK, piece, None, "none", [], "") for piece in self._pieces])[:rows]


class HalfProduct:
    """fp16 weights in fbgemm's blocks, widened to fp32 as they are multiplied.

    Columns beyond the last full block would take a full one. They are kept folded instead: F groups of rows side
    by side in one block, each multiplied with the activations at its own place and zeros elsewhere.
    """

    def __init__(self, pieces: Iterator[Tensor]) -> None:
        self._pieces = [_HalfPiece(weight_NK) for weight_NK in pieces]

    def __call__(self, x_MK: Tensor) -> Tensor:
        return _joined([piece.product(x_MK) for piece in self._pieces])


class _HalfPiece:
    def __init__(self, weight_NK: Tensor) -> None:
        self._rows, columns = weight_NK.shape
        rest_columns = columns % BLOCK_COLUMNS
        self._full_columns = columns - rest_columns
        self._full = _packed_half(weight_NK[:, : self._full_columns]) if self._full_columns else None
        self._folds = min(BLOCK_COLUMNS // max(1, rest_columns), MOST_FOLDS)
        self._rest = _packed_half(self._folded(weight_NK)) if rest_columns else None

    def _folded(self, weight_NK: Tensor) -> Tensor:
        rest = weight_NK[:, self._full_columns :]
        fold_rows = -(-self._rows // self._folds)
        padded = F.pad(rest, (0, 0, 0, self._folds * fold_rows - self._rows))
        return padded.view(self._folds, fold_rows, -1).transpose(0, 1).reshape(fold_rows, -1)

    def product(self, x_MK: Tensor) -> Tensor:
        if self._rest is None:
            return _half_product(x_MK, self._full)
        if self._full is None:
            return self._rest_product(x_MK).contiguous()
        out_MN = _half_product(x_MK[:, : self._full_columns].contiguous(), self._full)
        return out_MN.add_(self._rest_product(x_MK[:, self._full_columns :]))

    def _rest_product(self, x_MK: Tensor) -> Tensor:
        (rows, columns), folds = x_MK.shape, self._folds
        spread_FMFK = x_MK.new_zeros(folds, rows, folds, columns)
        spread_FMFK.diagonal(dim1=0, dim2=2).copy_(x_MK[:, :, None])
        out_FMN = _half_product(spread_FMFK.view(folds * rows, -1), self._rest)
        return out_FMN.view(folds, rows, -1).transpose(0, 1).reshape(rows, -1)[:, : self._rows]


def _packed_half(weight_NK: Tensor) -> object:
    return torch.ops.quantized.linear_prepack_fp16(weight_NK.contiguous(), None)


def _half_product(x_MK: Tensor, packed: object) -> Tensor:
    return torch.ops.quantized.linear_dynamic_fp16(x_MK, packed)


class FixedPointProduct:
    """int8 weights times activations in fixed point, by fbgemm's products of bytes, which are exact.

    A row of activations becomes 23-bit integers relative to its own largest magnitude, and each of their three
    bytes a row of the product: the weights are read once. What is lost is what fp32 loses in a sum with that
    magnitude, so the columns that a member of a group holds matter no more than the order of a sum.
    """

    @staticmethod
    @cache
    def exact() -> bool:
        """Not on a processor that adds products of bytes in 16 bits (AVX2 without VNNI), where they overflow."""
        ones = torch.ones(64, 64)
        product = FixedPointProduct(iter([((127 * ones).to(torch.int8), ones[0])]))
        return bool((product(ones) - 127 * 64).abs().max() < 1)

    @staticmethod
    def fills_blocks(columns: int) -> bool:
        """Whether what fills up the last block is less than an eighth."""
        return -columns % BLOCK_COLUMNS * 8 < columns

    def __init__(self, pieces: Iterator[tuple[Tensor, Tensor]]) -> None:
        """`pieces` are integers_NK and scales_N."""
        self._pieces = [
            _packed_int8(integers_NK, scales_N / FIXED_POINT_MAX) for integers_NK, scales_N in pieces
        ]

    def __call__(self, x_MK: Tensor) -> Tensor:
        tiles = [self._product(tile_MK) for tile_MK in x_MK.split(TILE_ROWS)]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    def _product(self, x_MK: Tensor) -> Tensor:
        peaks_M1 = torch.linalg.vector_norm(x_MK, torch.inf, -1, keepdim=True).clamp_min_(SMALLEST_PEAK)
        bytes_3MK = _fixed_point_bytes(x_MK, peaks_M1)
        return _joined([_int8_product(bytes_3MK, piece) for piece in self._pieces]).mul_(peaks_M1)


def _packed_int8(integers_NK: Tensor, scales_N: Tensor) -> object:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # torch is pinned
        quantised = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
            integers_NK, scales_N.double(), torch.zeros(len(scales_N), dtype=torch.int64), 0
        )
    return torch.ops.quantized.linear_prepack(quantised, None)


def _int8_product(bytes_3MK: Tensor, packed: object) -> Tensor:
    _, rows, columns = bytes_3MK.shape
    # Its input is fp32 and quantised within, here by a scale of 1: integers stay what they are.
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    out_3MN = product(bytes_3MK.view(-1, columns), 1.0, BYTE_ZERO, packed)
    return torch.mm(_BYTE_WEIGHTS, out_3MN.view(FIXED_POINT_BYTES, -1)).view(rows, -1)


def _fixed_point_bytes(x_MK: Tensor, peaks_M1: Tensor) -> Tensor:
    """bytes_3MK less `BYTE_ZERO`, in fp32, the least significant first. Floats in [2^23, 2^24) are integers, whose bits
    are the floats' own."""
    rows, columns = x_MK.shape
    fixed_MK = torch.addcmul(_ZERO, x_MK, _MAX / peaks_M1)
    shape = (FIXED_POINT_BYTES, rows, columns)
    strided = fixed_MK.view(torch.uint8).as_strided(shape, (1, 4 * columns, 4))
    return torch.sub(strided, _BYTE_ZERO, out=torch.empty(shape))


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
