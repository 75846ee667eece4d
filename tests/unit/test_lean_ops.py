"""The compiled passes of a lean layer against fp64, and that a row's bits do not depend on the rows beside it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apportion.model import lean_ops
from apportion.model.lean_ops import ACTIVATIONS, Norm, gated, split_heads

TOKENS, EPS = 5, 1e-5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(width: int, seed: int = 9) -> Norm:
    return Norm(weight=randn(width, seed=seed), eps=EPS)


def normed(x: Tensor, own: Norm) -> Tensor:
    return F.rms_norm(x.double(), own.weight.shape, own.weight.double(), own.eps)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("width", [1, 37, 64, 1000])
def test_norms(width: int):
    own, x_TH, sum_TH = norm(width), 3 * randn(TOKENS, width), randn(TOKENS, width, seed=1)
    expected_sum = x_TH.double() + sum_TH.double()
    close(own(x_TH), normed(x_TH, own))
    close(own.of_sum(x_TH, sum_TH), normed(expected_sum, own))
    close(sum_TH, expected_sum)
    expected = normed(x_TH, own)
    close(own.in_place(x_TH), expected)
    close(x_TH, expected)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("columns", [1, 19, 256])
def test_gates(name: str, columns: int):
    gate_up_TG = torch.cat((8 * randn(TOKENS, columns), randn(TOKENS, columns, seed=2)), -1)
    gate_up_TG[0, 0], gate_up_TG[1, 0], gate_up_TG[2, 0] = -300.0, 300.0, 0.0
    gate_TF, up_TF = gate_up_TG.double().chunk(2, -1)
    close(gated(gate_up_TG, ACTIVATIONS[name]), ACTIVATIONS[name](gate_TF) * up_TF)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 24), (8, 8, 64)])
def test_heads(heads: int, kv_heads: int, head_dim: int, with_norms: bool, monkeypatch: pytest.MonkeyPatch):
    projected_TWD = randn(TOKENS, heads + 2 * kv_heads, head_dim)
    angles_1TD = randn(1, TOKENS, head_dim // 2, seed=3).repeat(1, 1, 2)
    rotation = angles_1TD.cos(), angles_1TD.sin()
    norms = (norm(head_dim), norm(head_dim, seed=10)) if with_norms else None
    compiled = split_heads(projected_TWD.clone(), kv_heads, rotation, norms)
    monkeypatch.setattr(lean_ops, "_compiled", lambda _: False)
    for own, plain in zip(compiled, split_heads(projected_TWD, kv_heads, rotation, norms), strict=True):
        close(own, plain.double())


def test_rows_do_not_depend_on_each_other():
    x_TH, added_TH, gate_up_TG = randn(7, 91), randn(7, 91, seed=1), 5 * randn(7, 2 * 133, seed=2)
    projected_TWD, angles_1TD = randn(7, 10, 36), randn(1, 7, 18).repeat(1, 1, 2)

    def results(rows: slice) -> list[Tensor]:
        angles = angles_1TD[:, rows]
        heads = split_heads(
            projected_TWD[rows].clone(), 2, (angles.cos(), angles.sin()), (norm(36), norm(36))
        )
        added = norm(91).of_sum(x_TH[rows], added_TH[rows].clone())
        return [norm(91)(x_TH[rows]), added, gated(gate_up_TG[rows], ACTIVATIONS["silu"]), *heads]

    alone = zip(*(results(slice(row, row + 1)) for row in range(7)), strict=True)
    for together, rows in zip(results(slice(0, 7)), alone, strict=True):
        assert torch.equal(together, torch.cat(rows))
