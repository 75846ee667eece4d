"""Prints, as JSON, what a stage's own products reach on this CPU: bytes of weights read per second by a single row of
activations, and FLOP/s in each weight format.

Started by `apportion probe` in a process of its own, whose environment says how many threads take part.
"""

import json
from collections.abc import Callable

import torch

from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.random_weights import random_matrix
from apportion.types.stopwatch import best_s, median_s

ROWS, COLUMNS, TOKENS = 1024, 2048, 256
"""Of a matrix as large as a small model's, and a prefill chunk."""
READ_ROWS = 2**14
"""Beyond the caches of the machines meant here: 128 MiB."""
MEASURE_S = 0.3


def product(weight_format: str, rows: int, tokens: int) -> Callable[[], object]:
    backend = CpuBackend(block_tokens=1)
    linear = backend.product(random_matrix(rows, COLUMNS), WEIGHT_FORMATS[weight_format], backend.allocate)
    x_MK = torch.ones(tokens, COLUMNS)
    return lambda: linear(x_MK)


def read_bytes_per_s() -> float:
    return READ_ROWS * COLUMNS * 4 / median_s(product("fp32", READ_ROWS, 1), MEASURE_S)


def product_flops_per_s(weight_format: str) -> float:
    return 2 * ROWS * COLUMNS * TOKENS / best_s(product(weight_format, ROWS, TOKENS), MEASURE_S)


if __name__ == "__main__":
    with torch.inference_mode():
        flops_per_s = {name: product_flops_per_s(name) for name in WEIGHT_FORMATS}
        print(json.dumps({"read_bytes_per_s": read_bytes_per_s(), "flops_per_s": flops_per_s}))
