"""What products with weights in different formats, ours and torch's, take on one core of this CPU.

    python benchmarks/linear_formats.py

Each product goes round over copies of its weights that together exceed the caches; the kinds are interleaved and the
median of the rounds is printed. `*` marks those that the engine uses.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch.products import WidenedProduct
from apportion.model.weights.checkpoint import Weights
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.matrix_source import MatrixSource

SHAPES = [(1024, 2048), (5632, 1024), (1024, 2816), (32000, 1024), (4096, 4096)]
"""Output rows and input columns."""
NUM_TOKENS = [1, 2, 4, 8, 16, 32, 64, 256]
ROUNDS, ROUND_S, COPIES_BYTES = 5, 0.01, 96 * 2**20

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(MatrixSource):
    """A matrix in memory in place of a checkpoint's."""

    weight: Tensor

    def read_into(self, weight_RK: Tensor, start: int) -> None:
        weight_RK.copy_(self.weight[start : start + len(weight_RK)])

    def row_peaks(self, _start: int, _stop: int, weight_RK: Tensor) -> Tensor:
        return weight_RK.abs().amax(1)


def held(weight: Tensor) -> Held:
    rows, columns = weight.shape
    return Held(weights=cast(Weights, None), reads=(), rows=rows, columns=columns, weight=weight)


def ours(weight_format: str) -> Callable[[Tensor], Any]:
    backend = CpuBackend(block_tokens=1)
    return lambda weight: backend.product(held(weight), WEIGHT_FORMATS[weight_format], backend.allocate)


def int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def plain(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def mkl_packed(weight: Tensor) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, 1)
    return lambda x: torch.ops.mkl._mkl_linear(x, packed, weight, None, len(x))


def fp32_packed(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def bf16_activations(weight: Tensor) -> Product:
    half = weight.bfloat16()
    return lambda x: F.linear(x.bfloat16(), half).float()


def bf16_packed(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x.bfloat16(), packed, None, "none", [], "").float()


def fbgemm_fp16(weight: Tensor) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


def fbgemm_int8(weight: Tensor) -> Product:
    integers, scales = int8(weight)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    quantised = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantised, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def onednn_int8(weight: Tensor) -> Product:
    integers, scales = int8(weight)
    packed, zero = torch.ops.onednn.qlinear_prepack(integers, None), torch.zeros(1, dtype=torch.int32)
    linear = torch.ops.onednn.qlinear_pointwise

    def product(x: Tensor) -> Tensor:
        bytes_ = x.mul(30).add_(128).clamp_(0, 255).to(torch.uint8)
        return linear(bytes_, 1.0, 128, packed, scales, zero, None, 1.0, 0, torch.float32, "none", [], "")

    return product


def int_mm(weight: Tensor) -> Product:
    integers, scales = int8(weight)
    return lambda x: torch._int_mm(x.mul(30).to(torch.int8), integers.T).float().mul_(scales)


def weight_int8pack(weight: Tensor) -> Product:
    integers, scales = int8(weight)
    half_scales = scales.bfloat16()
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), integers, half_scales).float()


KINDS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "fp32 compiled *": (4, ours("fp32")),
    "fp32 F.linear": (4, plain),
    "fp32 MKL packed": (4, mkl_packed),
    "fp32 oneDNN packed": (4, fp32_packed),
    "bf16 compiled, fp32 activations *": (2, ours("bf16")),
    "bf16 F.linear, bf16 activations": (2, bf16_activations),
    "bf16 oneDNN packed, bf16 activations": (2, bf16_packed),
    "fp16 compiled, fp32 activations *": (2, ours("fp16")),
    "fp16 fbgemm, fp32 activations": (2, fbgemm_fp16),
    "fp16 widened, fp32 activations": (2, lambda weight: WidenedProduct(weight.half(), None)),
    "int8 compiled, fp32 activations *": (1, ours("int8")),
    "int8 fbgemm dynamic, 8-bit activations": (1, fbgemm_int8),
    "int8 oneDNN, 8-bit activations": (1, onednn_int8),
    "int8 _int_mm, 8-bit activations": (1, int_mm),
    "int8 _weight_int8pack_mm, bf16 activations": (1, weight_int8pack),
    "int8 widened, fp32 activations": (1, lambda weight: WidenedProduct(*int8(weight))),
}
"""Bytes of an element, and what makes a product."""


def measure(products: dict[str, list[Product]], x: Tensor) -> dict[str, float]:
    """Median seconds of each kind."""
    times: dict[str, list[float]] = {kind: [] for kind in products}
    turns = {kind: endless(copies) for kind, copies in products.items()}
    for _ in range(ROUNDS):
        for kind, turn in turns.items():
            next(turn)(x)
            calls, start = 0, time.perf_counter()
            while (taken := time.perf_counter() - start) < ROUND_S:
                next(turn)(x)
                calls += 1
            times[kind].append(taken / calls)
    return {kind: statistics.median(seconds) for kind, seconds in times.items()}


def endless(copies: list[Product]) -> Iterator[Product]:
    while True:
        yield from copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("ROWS", "COLUMNS"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for rows, columns in args.shape or SHAPES:
        weight = torch.randn(rows, columns) / columns**0.5
        copies = {kind: max(2, COPIES_BYTES // (rows * columns * size)) for kind, (size, _) in KINDS.items()}
        products = {
            kind: [make(weight.clone()) for _ in range(copies[kind])] for kind, (_, make) in KINDS.items()
        }
        seconds = [measure(products, torch.randn(tokens, columns)) for tokens in NUM_TOKENS]
        heads = [f"M={tokens}" for tokens in NUM_TOKENS]
        print(f"\n{rows} x {columns}: µs (weights read, GB/s, at M=1; GFLOP/s at M={NUM_TOKENS[-1]})\n")
        print("| product | " + " | ".join([*heads, "GB/s", "GFLOP/s"]) + " |")
        print("|---|" + "--:|" * (len(heads) + 2))
        for kind, (size, _) in KINDS.items():
            cells = [f"{taken[kind] * 1e6:.0f}" for taken in seconds]
            elements = rows * columns
            cells.append(f"{elements * size / seconds[0][kind] / 1e9:.1f}")
            cells.append(f"{2 * elements * NUM_TOKENS[-1] / seconds[-1][kind] / 1e9:.0f}")
            print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
