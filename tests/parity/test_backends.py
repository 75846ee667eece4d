"""What every backend has to do. To test another, add it to `BACKENDS`."""

from collections.abc import Callable

import pytest
import torch
from parity.test_stage_inprocess import (
    BLOCK_TOKENS,
    DIVISIONS,
    SAMPLING,
    SEQUENCES,
    STEPS,
    Reference,
    build,
    make_references,
    make_stages,
    scheduled,
)
from torch import Tensor

from apportion.catalog.model_config import read_model_spec
from apportion.model.backend import Backend
from apportion.model.backends.cpu.backend import CpuBackend
from apportion.model.backends.torch.backend import TorchBackend
from apportion.model.weights.formats import WEIGHT_FORMATS
from apportion.model.weights.random_weights import random_matrix
from apportion.types.request import Chunk, ScheduledBatch

BACKENDS: dict[str, Callable[[], Backend]] = {
    "compiled": lambda: CpuBackend(block_tokens=BLOCK_TOKENS),
    "torch": lambda: TorchBackend("cpu", torch.float32, block_tokens=BLOCK_TOKENS, gather_tokens=0),
    "torch, gathered": lambda: TorchBackend(
        "cpu", torch.float32, block_tokens=BLOCK_TOKENS, gather_tokens=96
    ),
}
FAMILIES = ("llama", "gemma2", "qwen3_moe", "gpt_oss", "olmo2")
"""Plain; windows and softcap; experts; sinks, in transformers' layers; norms that are reduced."""


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_references(tmp_path_factory)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_divided_model_is_the_whole_one(family: str, backend: Backend, references: Reference):
    folder, ids, expected = references(family)
    model = read_model_spec(folder)
    stages = [
        build(folder, model, stage, backend=backend)
        for stage in make_stages(model, DIVISIONS["one, then 2:1:1"])
    ]
    for step in range(len(STEPS)):
        batch = scheduled(step, ids)
        flat = backend.prepare(batch)
        values = flat.rows.token_ids_T
        for running in stages:
            values = running.forward(values, flat)
        sampled = [chunk for chunk in batch.chunks if chunk.sampling is not None]
        for logits_V, chunk in zip(values, sampled, strict=True):
            right_V = expected[chunk.sequence_id][chunk.stop - 1]
            torch.testing.assert_close(logits_V, right_V, atol=1e-4, rtol=0)


def test_a_batch_says_where_its_tokens_are(backend: Backend):
    chunks = (
        Chunk(sequence_id=0, start=3, token_ids=(7, 8, 9), block_ids=(5, 2), sampling=SAMPLING),
        Chunk(sequence_id=1, start=4, token_ids=(1,), block_ids=(0, 1), sampling=None),
        Chunk(sequence_id=2, start=0, token_ids=(4,), block_ids=(9,), sampling=SAMPLING),
    )
    rows = backend.prepare(ScheduledBatch(step_id=0, chunks=chunks)).rows
    assert rows.token_ids_T.tolist() == [7, 8, 9, 1, 4]
    assert rows.positions_T.tolist() == [3, 4, 5, 4, 0]
    assert rows.sample_rows_N.tolist() == [2, 4]


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_product_is_that_of_the_weights_as_held(name: str, backend: Backend):
    """And takes the memory that the format says, but for what fills vectors."""
    weight_format, source = WEIGHT_FORMATS[name], random_matrix(96, 256)
    taken: list[int] = []

    def allocate(num_bytes: int) -> Tensor:
        taken.append(num_bytes)
        return backend.allocate(num_bytes)

    product = backend.product(source, weight_format, allocate)
    held_NK, scales_N = torch.empty(96, 256, dtype=weight_format.dtype), torch.ones(96)
    weight_format.read_into(source, 0, held_NK, scales_N if weight_format.scaled else None)
    x_MK = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    right_MN = x_MK.double() @ (held_NK.double() * scales_N.double()[:, None]).T
    torch.testing.assert_close(product(x_MK).double(), right_MN, atol=1e-5, rtol=1e-5)
    assert sum(taken) == weight_format.matrix_bytes(96, 256)


def test_a_row_does_not_depend_on_those_beside_it(references: Reference):
    """Of the compiled kernels, bit by bit: torch's products are of other shapes in another batch."""
    backend = BACKENDS["compiled"]()
    folder, ids, _ = references("llama")
    model = read_model_spec(folder)
    (stage,) = make_stages(model, DIVISIONS["whole"])

    def logits(*sequences: int) -> list[Tensor]:
        running = build(folder, model, stage, backend=backend)
        chunks = tuple(
            Chunk(
                sequence_id=sequence,
                start=0,
                token_ids=tuple(ids[sequence]),
                block_ids=SEQUENCES[sequence][1],
                sampling=SAMPLING,
            )
            for sequence in sequences
        )
        flat = backend.prepare(ScheduledBatch(step_id=0, chunks=chunks))
        return list(running.forward(flat.rows.token_ids_T, flat))

    together = logits(0, 1, 2)
    for sequence, beside_V in enumerate(together):
        assert torch.equal(logits(sequence)[0], beside_V)
