"""The operations of a lean layer against fp64; a row's bits depend neither on the rows beside it nor on how many
threads share an operation out."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model.backends.cpu.compile import look_up
from apportion.model.kernels import layer as lean_kernels
from apportion.model.kernels.op_code import ROW_WORDS, Op, meeting_words, run
from apportion.model.kernels.team import Team
from apportion.model.lean.ops import ACTIVATIONS, Norm, gate_coefficients, split_heads
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.random_weights import random_matrix
from apportion.model.weights.vocabulary import LookupTable

TOKENS, EPS = 5, 1e-5
Runner = Callable[[np.ndarray], None]


def alone(table_OW: np.ndarray) -> None:
    run(table_OW, 0, len(table_OW), meeting_words(), 0, 1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(op: Op, rows: int, runner: Runner = alone, **operands: float | Tensor) -> None:
    row_1W = np.zeros((1, ROW_WORDS), np.int64)
    values = {
        name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in operands.items()
    }
    op.fill(row_1W[0], rows=rows, **values)
    runner(row_1W)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x.double(), weight.shape, weight.double(), EPS)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [1, 37, 64, 1000])
def test_norms_and_sums(width: int):
    weight, x, total = randn(width, seed=9), 3 * randn(TOKENS, width), randn(TOKENS, width, seed=1)
    out, expected_sum = torch.empty_like(x), x.double() + total.double()
    call(lean_kernels.norm, TOKENS, x=x, out=out, weight=weight, width=width, eps=EPS)
    close(out, normed(x, weight))
    call(lean_kernels.add_norm, TOKENS, x=x, y=total, out=out, weight=weight, width=width, eps=EPS)
    close(out, normed(expected_sum, weight))
    close(total, expected_sum)
    call(lean_kernels.add, TOKENS, x=x, y=total, width=width)
    close(total, expected_sum + x)
    call(lean_kernels.add_bias, TOKENS, y=total, width=width, bias=weight)
    close(total, expected_sum + x + weight)
    expected = normed(x, weight)
    call(lean_kernels.norm, TOKENS, x=x, out=x, weight=weight, width=width, eps=EPS)
    close(x, expected)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("columns", [1, 19, 256])
def test_gates(name: str, columns: int):
    coefficients = gate_coefficients(ACTIVATIONS[name])
    assert coefficients is not None
    linear, cubic = coefficients
    gate_up, out = (
        torch.cat((8 * randn(TOKENS, columns), randn(TOKENS, columns, seed=2)), -1),
        randn(TOKENS, columns),
    )
    gate_up[0, 0], gate_up[1, 0], gate_up[2, 0] = -300.0, 300.0, 0.0
    call(lean_kernels.gate, TOKENS, x=gate_up, out=out, columns=columns, linear=linear, cubic=cubic)
    gate, up = gate_up.double().chunk(2, -1)
    close(out, ACTIVATIONS[name](gate) * up)


def test_other_gates_are_left_to_torch():
    assert gate_coefficients(ACTIVATIONS["gelu"]) is None


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 24), (8, 8, 64)])
def test_heads(heads: int, kv_heads: int, head_dim: int, with_norms: bool):
    projected = randn(TOKENS, heads + 2 * kv_heads, head_dim)
    angles = randn(1, TOKENS, head_dim // 2, seed=3).repeat(1, 1, 2)
    rotation = angles.cos(), angles.sin()
    query_weight, key_weight = randn(head_dim, seed=4), randn(head_dim, seed=5)
    norms = (Norm(weight=query_weight, eps=EPS), Norm(weight=key_weight, eps=EPS)) if with_norms else None
    expected = split_heads(projected, kv_heads, rotation, norms)
    out = torch.empty(projected.numel())
    operands = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    weights = {"query_weight": query_weight, "key_weight": key_weight, "eps": EPS} if with_norms else {}
    turned = {"y": rotation[0], "z": rotation[1]}
    call(lean_kernels.split, TOKENS, x=projected.clone(), out=out, **turned, **operands, **weights)
    close(out, torch.cat([part.flatten() for part in expected]))


def test_turns_and_what_a_step_is_given():
    positions_T, frequencies_F, given = torch.tensor([0, 3, 90_000]), randn(8).abs(), randn(3, 7)
    cos, sin, out = torch.empty(3, 16), torch.empty(3, 16), torch.empty(3, 7)
    addresses = torch.tensor([positions_T.data_ptr(), given.data_ptr()])
    rope = {"frequencies": frequencies_F, "head_dim": 16, "amplitude": 1.5}
    call(lean_kernels.turns, 3, positions=addresses, **rope, x=cos, y=sin)
    angles = (positions_T[:, None].float() * frequencies_F).double().repeat(1, 2)
    close(cos, 1.5 * angles.cos())
    close(sin, 1.5 * angles.sin())
    call(lean_kernels.take, 3, source=addresses[1:], width=7, out=out)
    assert torch.equal(out, given)


@pytest.mark.parametrize("weight_format", ["fp32", "fp16", "bf16", "int8"])
def test_rows_are_looked_up(weight_format: str):
    """As the table itself gives them; ids of other members' rows give zeros."""
    source = random_matrix(9, 21)
    table = LookupTable(
        source, WEIGHT_FORMATS[weight_format], torch.float32, torch.device("cpu"), multiplier=1.7
    )
    ids_T = torch.tensor([3, 11, 8, 12, 2])
    out = torch.empty(5, 21)
    where = np.array([ids_T.data_ptr()])
    op, operands = look_up(table, 3)
    call(op, 5, out=out, source=where.ctypes.data, width=21, **operands)
    expected = torch.zeros(5, 21)
    expected[:3] = table(ids_T[:3] - 3)
    torch.testing.assert_close(out, expected, rtol=2e-7, atol=0)


def results(rows: slice, runner: Runner) -> list[Tensor]:
    weight, gate_up = randn(91, seed=3), 5 * randn(7, 2 * 133, seed=2)[rows].clone()
    x, total, projected = (
        made[rows].clone() for made in (randn(7, 91), randn(7, 91, seed=1), randn(7, 10 * 36))
    )
    angles, head_weight = randn(7, 18)[rows].repeat(1, 2), randn(36)
    num = len(x)
    out, gates = torch.empty(num, 91), torch.empty(num, 133)
    heads_out = torch.empty(num * 10 * 36)
    norm = {"weight": weight, "width": 91, "eps": EPS}
    call(lean_kernels.add_norm, num, runner, x=x, y=total, out=out, **norm)
    call(lean_kernels.norm, num, runner, x=x, out=x, **norm)
    call(lean_kernels.gate, num, runner, x=gate_up, out=gates, columns=133, linear=1.0, cubic=0.0)
    heads = {"heads": 6, "kv_heads": 2, "head_dim": 36, "eps": EPS}
    weights = {"query_weight": head_weight, "key_weight": head_weight}
    rotation = {"y": angles.cos(), "z": angles.sin()}
    call(lean_kernels.split, num, runner, x=projected, out=heads_out, **heads, **weights, **rotation)
    parts = heads_out.split([num * size * 36 for size in (6, 2, 2)])
    return [out, total, x, gates, *(part.view(num, -1) for part in parts)]


def test_rows_do_not_depend_on_each_other_nor_on_threads():
    apart = zip(*(results(slice(row, row + 1), alone) for row in range(7)), strict=True)
    team = Team(3)
    shared = results(slice(0, 7), lambda table_OW: team.run_ops(table_OW, 0, len(table_OW)))
    for together, by_threads, rows in zip(results(slice(0, 7), alone), shared, apart, strict=True):
        assert torch.equal(together, torch.cat(rows))
        assert torch.equal(together, by_threads)


def test_threads_wait_for_each_other_between_operations():
    """Each operation doubles what the one before it wrote, in shares of other rows."""
    team, x = Team(3), torch.ones(50_001)
    table_OW = np.zeros((20, ROW_WORDS), np.int64)
    for at in range(20):
        rows, width = ((50_001, 1), (1, 50_001))[at % 2]
        lean_kernels.add.fill(table_OW[at], rows=rows, x=x.data_ptr(), y=x.data_ptr(), width=width)
    team.run_ops(table_OW, 0, 20)
    assert (x == 2.0**20).all()
