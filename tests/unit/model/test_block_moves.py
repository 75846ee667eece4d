"""Blocks that are moved together arrive as if moved one by one."""

import random

import pytest
import torch

from apportion.model.backends.cpu.block_moves import CpuBlockMover
from apportion.model.backends.torch.block_moves import TorchBlockMover, runs
from apportion.types.request import BlockMove

NUM_BLOCKS, NUM_SLOTS = 12, 8


def pool() -> list[torch.Tensor]:
    """Two layers' keys, blocks not side by side in memory: block b of layer i holds 100·i + b."""
    heads, block_tokens, head_dim = 2, 3, 4
    tensors = [torch.zeros(heads, NUM_BLOCKS * block_tokens, head_dim) for _ in range(2)]
    views = [one.unflatten(1, (NUM_BLOCKS, block_tokens)).transpose(0, 1) for one in tensors]
    for layer, view in enumerate(views):
        view.copy_(100.0 * layer + torch.arange(NUM_BLOCKS)[:, None, None, None])
    return views


def test_neighbours_that_go_to_neighbours_are_one_move():
    out = [BlockMove("swap out", 3, 0), BlockMove("swap out", 4, 1), BlockMove("swap out", 6, 2)]
    back = [BlockMove("swap in", 2, 7), BlockMove("swap in", 3, 8), BlockMove("swap in", 4, 10)]
    copies = [BlockMove("copy", 1, 2), BlockMove("copy", 2, 3)]
    assert list(runs([*out, *back, *copies])) == [
        (out[0], 2),
        (out[2], 1),
        (back[0], 2),
        (back[2], 1),
        (copies[0], 1),
        (copies[1], 1),
    ]
    assert list(runs([])) == []


@pytest.mark.parametrize("mover", [CpuBlockMover, TorchBlockMover])
def test_contents_are_those_of_moves_one_by_one(mover: type[CpuBlockMover] | type[TorchBlockMover]):
    draw = random.Random(1)
    for _ in range(50):
        moves: list[BlockMove] = []
        while len(moves) < 20:
            kind = draw.choice(["copy", "swap out", "swap in"])
            src = draw.randrange(NUM_SLOTS if kind == "swap in" else NUM_BLOCKS)
            dst = draw.randrange(NUM_SLOTS if kind == "swap out" else NUM_BLOCKS)
            for step in range(draw.randint(1, 4)):
                if max(src, dst) + step < NUM_SLOTS:
                    moves.append(BlockMove(kind, src + step, dst + step))
        views = pool()
        mover(views, NUM_SLOTS).apply(moves)
        device, host = list(range(NUM_BLOCKS)), [None] * NUM_SLOTS
        for kind, src, dst in moves:
            source, target = (host if kind == "swap in" else device), (host if kind == "swap out" else device)
            target[dst] = source[src]
        for layer, view in enumerate(views):
            for block, origin in enumerate(device):
                assert bool((view[block] == (0.0 if origin is None else 100.0 * layer + origin)).all())
