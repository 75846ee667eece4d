"""Prints, as JSON, the FLOP/s of this CPU in each weight format: of the product that a stage would compute with.

Started by `apportion probe` in a process of its own, whose environment says how many threads take part.
"""

import json
from collections.abc import Callable
from time import perf_counter

import torch

from apportion.model.linear import make_product
from apportion.model.matrix_source import MatrixSource
from apportion.model.random_weights import RandomWeights
from apportion.model.shard import whole_placements

FORMATS = ("fp32", "bf16", "fp16", "int8")
ROWS, COLUMNS, TOKENS = 1024, 2048, 256
"""Of a matrix as large as a small model's, and a prefill chunk."""
MEASURE_S = 0.3


def product_flops_per_s(weight_format: str) -> float:
    reads = tuple(whole_placements("weight", (ROWS, COLUMNS), None))
    source = MatrixSource(weights=RandomWeights(), reads=reads, rows=ROWS, columns=COLUMNS)
    product = make_product(source, weight_format, torch.float32, "cpu")
    x_MK = torch.ones(TOKENS, COLUMNS)
    return 2 * ROWS * COLUMNS * TOKENS / _best_s(lambda: product(x_MK))


def _best_s(work: Callable[[], object]) -> float:
    """The shortest of the runs that fit in `MEASURE_S`, after one to warm up."""
    work()
    times: list[float] = []
    while sum(times) < MEASURE_S:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps({name: product_flops_per_s(name) for name in FORMATS}))
