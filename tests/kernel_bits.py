"""What the compiled kernels give, as one hash for each case: to compare machines, settings and compilers.

python tests/kernel_bits.py [layer] [products] [attention]
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np

Named = Iterator[tuple[str, list[np.ndarray]]]


def randn(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def layer() -> Named:
    """Norms, gates and rotations; without torch."""
    from apportion.model.kernels import layer as ops
    from apportion.model.kernels.op_code import ROW_WORDS, Op, meeting_words, run

    def call(op: Op, rows: int, **operands: Any) -> None:
        row_1W = np.zeros((1, ROW_WORDS), np.int64)
        addresses = {
            name: value.ctypes.data if isinstance(value, np.ndarray) else value
            for name, value in operands.items()
        }
        op.fill(row_1W[0], rows=rows, **addresses)
        run(row_1W, 0, 1, meeting_words(), 0, 1)

    for width in (24, 91, 1024):
        x, y, weight = randn(5, width, seed=1), randn(5, width, seed=2), randn(width, seed=3)
        out = np.empty_like(x)
        call(ops.add_norm, 5, x=x, y=y, out=out, weight=weight, width=width, eps=1e-5)
        call(ops.norm, 5, x=x, out=x, weight=weight, width=width, eps=1e-5)
        yield f"norms of {width}", [out, x, y]
    for linear, cubic in ((1.0, 0.0), (1.5957691, 0.0713548)):
        x, out = 6 * randn(5, 2 * 133, seed=4), np.empty((5, 133), np.float32)
        call(ops.gate, 5, x=x, out=out, columns=133, linear=linear, cubic=cubic)
        yield f"gate {linear}", [out]
    positions, frequencies = (
        np.array([0, 1, 77, 4095, 131_071]),
        1e4 ** -np.linspace(0, 1, 18, dtype=np.float32),
    )
    cos, sin = np.empty((2, 5, 36), np.float32)
    where = np.array([positions.ctypes.data])
    call(ops.turns, 5, positions=where, frequencies=frequencies, head_dim=36, amplitude=1.1, x=cos, y=sin)
    x, out, weight = randn(5, 10, 36, seed=5), np.empty(5 * 10 * 36, np.float32), randn(36, seed=6)
    heads = {"heads": 6, "kv_heads": 2, "head_dim": 36, "eps": 1e-5}
    call(ops.split, 5, x=x, y=cos, z=sin, out=out, query_weight=weight, key_weight=weight, **heads)
    yield "heads turned", [cos, sin, out]


def products() -> Named:
    import torch

    from apportion.model.backends.cpu.backend import CpuBackend
    from apportion.model.weights.formats import WEIGHT_FORMATS
    from apportion.model.weights.matrix_source import MatrixSource

    class Held(MatrixSource):
        def read_into(self, weight_RK: torch.Tensor, start: int) -> None:
            weight_RK.copy_(weight[start : start + len(weight_RK)])

        def row_peaks(self, _start: int, _stop: int, weight_RK: torch.Tensor) -> torch.Tensor:
            return weight_RK.abs().amax(1)

    weight = torch.from_numpy(randn(133, 1030, seed=7))
    source: Any = Held(weights=None, reads=(), rows=133, columns=1030)  # pyright: ignore
    backend = CpuBackend(block_tokens=16)
    for weight_format in ("fp32", "fp16", "bf16", "int8"):
        packed = backend.product(source, WEIGHT_FORMATS[weight_format], backend.allocate)
        for rows in (1, 7, 70):
            x = torch.from_numpy(randn(rows, 1030, seed=8))
            yield f"{rows} rows by {weight_format}", [packed(x).numpy()]


def attention() -> Named:
    import torch

    from apportion.model.backends.cpu.backend import CpuBackend
    from apportion.model.kv_pool import PoolTensors
    from apportion.types.request import Chunk, ScheduledBatch

    def attend(stored: torch.dtype, head_dim: int, group: int, cuts: list[int], **options: Any) -> np.ndarray:
        backend = CpuBackend(block_tokens=16)
        tensors = PoolTensors(
            layer_start=0, num_layers=1, num_blocks=20, block_tokens=16, kv_heads=2, head_dim=head_dim,
            dtype=stored, torch_device=backend.torch_device,
        )  # fmt: skip
        pool = backend.kv_pool(tensors)
        query = torch.from_numpy(randn(300, 2 * group, head_dim, seed=9))
        key, value = (torch.from_numpy(randn(300, 2, head_dim, seed=seed)) for seed in (10, 11))
        outs = []
        for start, stop in zip([0, *cuts], [*cuts, 300], strict=True):
            chunk = Chunk(
                sequence_id=0, start=start, token_ids=(1,) * (stop - start),
                block_ids=tuple(reversed(range(19))), sampling=None,
            )  # fmt: skip
            batch = ScheduledBatch(step_id=0, chunks=(chunk,))
            flat = backend.prepare(batch)
            new = (part[start:stop] for part in (query, key, value))
            outs.append(pool.attend(*new, layer=0, batch=flat, scale=head_dim**-0.5, **options))
        return torch.cat(outs).numpy()

    formats = (torch.float32, torch.float16, torch.bfloat16)
    for stored, head_dim, group in product(formats, (24, 64, 80), (1, 3, 6)):
        for softcap, window, sinks in ((None, None, False), (5.0, 50, True)):
            sinks_N = torch.linspace(-2, 2, 2 * group) if sinks else None
            options = {"softcap": softcap, "window_tokens": window, "sinks_N": sinks_N}
            out = attend(stored, head_dim, group, [290, *range(291, 300)], **options)
            yield f"{group} × {head_dim} of {stored}, {'all' if sinks else 'no'} options", [out]


PARTS: dict[str, Callable[[], Named]] = {"layer": layer, "products": products, "attention": attention}


def hashes(*parts: str) -> dict[str, str]:
    return {
        name: hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
        for part in parts
        for name, arrays in PARTS[part]()
    }


if __name__ == "__main__":
    print(json.dumps(hashes(*(sys.argv[1:] or PARTS))))
