"""Split == whole inside one process: the members of a group are threads, the stages run one after another."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from parity.tiny_models import FAMILIES, make_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from apportion.catalog.model_config import read_model_spec
from apportion.model.backend import Backend
from apportion.model.backends.choose import backend_of
from apportion.model.batch import FlatBatch
from apportion.model.build import build_stage
from apportion.model.kernels.op_table import OpTable
from apportion.model.lean.config import LEAN_FAMILIES
from apportion.model.stage import StageModel
from apportion.model.weights.checkpoint import Checkpoint
from apportion.model.weights.load_memory import Unmetered
from apportion.types.model import ModelSpec
from apportion.types.plan import Stage, TensorSplit
from apportion.types.request import Chunk, SamplingParams, ScheduledBatch
from apportion.types.units import FORMAT_BYTES

NUM_LAYERS = 5
BLOCK_TOKENS = 4
NUM_BLOCKS = 40
SAMPLING = SamplingParams(max_tokens=1)
DIVISIONS = {
    "whole": [(5, [1])],
    "three uneven stages": [(1, [1]), (3, [1]), (1, [1])],
    "3:1": [(5, [3, 1])],
    "one, then 2:1:1": [(2, [1]), (3, [2, 1, 1])],
}
SEQUENCES = [(23, (0, 2, 3, 4, 7, 8)), (9, (20, 21, 22)), (31, (39, 1, 17, 18, 30, 6, 5, 9))]
"""Length and blocks of each."""
STEPS = [
    [(0, 0, 7)],
    [(0, 7, 12), (1, 0, 6)],
    [(1, 6, 7), (2, 0, 20), (0, 12, 13)],
    [(0, 13, 14), (1, 7, 8), (2, 20, 31)],
    [(1, 8, 9), (0, 14, 15)],
    [(0, 15, 23)],
]
"""The chunks (sequence, start, stop) of each batch: prefill in pieces, decode beside it and by itself."""


class ThreadGroup:
    """Sums over threads in rank order, and records the shapes summed."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.partials: list[Tensor | None] = [None] * size
        self.shapes: list[list[tuple[int, ...]]] = [[] for _ in range(size)]

    def all_reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(partial: Tensor) -> Tensor:
            self.shapes[rank].append(tuple(partial.shape))
            self.partials[rank] = partial.clone()
            self.barrier.wait(20)
            total = torch.stack([part for part in self.partials if part is not None]).sum(0)
            self.barrier.wait(20)
            return total

        return reduce


@dataclass
class RunningStage:
    stage: Stage
    members: list[StageModel]
    group: ThreadGroup
    backend: Backend

    def forward(self, inputs: Tensor, batch: FlatBatch) -> Tensor:
        with ThreadPoolExecutor(len(self.members)) as pool:
            outputs = list(pool.map(lambda member: member.forward(inputs, batch), self.members))
        return torch.cat(outputs, -1) if self.stage.has_head else outputs[0]


def shares(total: int, weights: list[int]) -> tuple[int, ...]:
    """Integer shares of `total` in about the ratio of `weights`."""
    stops = [total * part // sum(weights) for part in accumulate(weights)]
    return tuple(stop - start for start, stop in zip([0, *stops], stops, strict=False))


def make_stages(
    model: ModelSpec,
    division: list[tuple[int, list[int]]],
    weight_format: str = "fp32",
    activation_format: str | None = None,
    kv_format: str | None = None,
) -> list[Stage]:
    stops = list(accumulate(num_layers for num_layers, _ in division))
    return [
        Stage(
            layer_start=stop - num_layers,
            layer_stop=stop,
            split=TensorSplit(
                device_ids=tuple(f"d{rank}" for rank in range(len(weights))),
                q_heads=tuple(h * model.q_heads_per_kv_head for h in shares(model.kv_heads, weights)),
                kv_heads=shares(model.kv_heads, weights),
                ffn_columns=shares(model.ffn_columns, weights),
                vocab_rows=shares(model.vocab_rows, weights),
            ),
            weight_format=weight_format,
            activation_format=activation_format or weight_format,
            kv_format=kv_format or activation_format or weight_format,
            has_embedding=stop == num_layers,
            has_head=stop == model.num_layers,
        )
        for stop, (num_layers, weights) in zip(stops, division, strict=True)
    ]


def stage_backend(stage: Stage) -> Backend:
    return backend_of("cpu", stage.activation_format, block_tokens=BLOCK_TOKENS, gather_tokens=0)


def build(
    folder: Path, model: ModelSpec, stage: Stage, *, lean: bool = True, backend: Backend | None = None
) -> RunningStage:
    group, backend = ThreadGroup(stage.split.size), backend or stage_backend(stage)
    members = [
        build_stage(
            folder,
            model,
            stage,
            rank,
            weights=Checkpoint(folder),
            num_kv_blocks=NUM_BLOCKS,
            all_reduce=group.all_reduce(rank),
            backend=backend,
            memory=Unmetered(),
            lean=lean,
        )
        for rank in range(stage.split.size)
    ]
    return RunningStage(stage, members, group, backend)


Reference = Callable[[str], tuple[Path, list[list[int]], list[Tensor]]]
"""By family the checkpoint, the sequences' token ids, and transformers' logits at each of their positions."""


def make_references(folders: pytest.TempPathFactory) -> Reference:
    """Each family's is made once."""

    @cache
    def reference(family: str) -> tuple[Path, list[list[int]], list[Tensor]]:
        folder = folders.mktemp(family)
        make_checkpoint(family, folder, NUM_LAYERS)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        generator = torch.Generator().manual_seed(5)
        ids = [torch.randint(0, 509, (length,), generator=generator) for length, _ in SEQUENCES]
        with torch.no_grad():
            logits = [whole.eval()(ids_T[None], use_cache=False).logits[0] for ids_T in ids]
        return folder, [ids_T.tolist() for ids_T in ids], logits

    return reference


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_references(tmp_path_factory)


def scheduled(step: int, ids: list[list[int]]) -> ScheduledBatch:
    chunks = tuple(
        Chunk(
            sequence_id=sequence,
            start=start,
            token_ids=tuple(ids[sequence][start:stop]),
            block_ids=SEQUENCES[sequence][1][: -(-stop // BLOCK_TOKENS)],
            sampling=None if step == 0 else SAMPLING,
        )
        for sequence, start, stop in STEPS[step]
    )
    return ScheduledBatch(step_id=step, chunks=chunks)


def expected_params(model: ModelSpec, stage: Stage, rank: int, *, tables: int) -> int:
    split = stage.split
    layers = sum(
        split.kv_heads[rank] * layer.per_kv_head.count
        + split.ffn_columns[rank] * layer.per_ffn_column.count
        + layer.replicated.count
        for layer in model.layers[stage.layer_start : stage.layer_stop]
    )
    return layers + tables * split.vocab_rows[rank] * model.hidden_size + stage.has_head * model.hidden_size


def check_share(model: ModelSpec, running: RunningStage) -> None:
    stage = running.stage
    tables = stage.has_embedding + stage.has_head
    if model.tied_embeddings:
        tables = min(tables, 1)
    for rank, member in enumerate(running.members):
        params = expected_params(model, stage, rank, tables=tables)
        assert member.parameters == params
        assert member.read_bytes == params * FORMAT_BYTES[model.checkpoint_format]
        assert member.weights_bytes == params * FORMAT_BYTES[stage.weight_format]


def check_reductions(model: ModelSpec, running: RunningStage, num_tokens: int) -> None:
    """One for the embedding, two per layer, and two narrow ones per layer of a norm over all heads. One device need not
    call them."""
    for shapes in running.group.shapes:
        if len(running.members) == 1:
            continue
        wide = [shape for shape in shapes if shape == (num_tokens, model.hidden_size)]
        assert len(wide) == running.stage.has_embedding + 2 * running.stage.num_layers
        narrow = [shape for shape in shapes if shape == (num_tokens, 1)]
        assert len(narrow) == (2 * running.stage.num_layers if model.family == "olmo2" else 0)
        assert len(shapes) == len(wide) + len(narrow)
        shapes.clear()


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_equals_whole(family: str, division: str, references):
    folder, ids, expected = references(family)
    model = read_model_spec(folder)
    stages = [build(folder, model, stage) for stage in make_stages(model, DIVISIONS[division])]
    for step in range(len(STEPS)):
        batch = scheduled(step, ids)
        flat = stages[0].backend.prepare(batch)
        values = flat.rows.token_ids_T
        for running in stages:
            values = running.forward(values, flat)
            check_reductions(model, running, batch.num_tokens)
        sampled = [chunk for chunk in batch.chunks if chunk.sampling is not None]
        assert values.shape == (len(sampled), model.vocab_rows)
        for logits_V, chunk in zip(values, sampled, strict=True):
            torch.testing.assert_close(
                logits_V, expected[chunk.sequence_id][chunk.stop - 1], atol=1e-4, rtol=0
            )
    for running in stages:
        check_share(model, running)


def test_a_decode_step_is_one_call(references, monkeypatch: pytest.MonkeyPatch):
    """With all its reductions, of each member."""
    folder, ids, _ = references("llama")
    model = read_model_spec(folder)
    (stage,) = (build(folder, model, stage) for stage in make_stages(model, DIVISIONS["3:1"]))
    runs: list[tuple[int, int]] = []
    run = OpTable.run

    def counted(table: OpTable, first: int, stop: int) -> None:
        runs.append((first, stop))
        run(table, first, stop)

    monkeypatch.setattr(OpTable, "run", counted)
    flat = stage.backend.prepare(scheduled(4, ids))
    stage.forward(flat.rows.token_ids_T, flat)
    assert len(runs) == 2
    check_reductions(model, stage, 2)


@pytest.mark.parametrize("family", sorted(LEAN_FAMILIES))
def test_lean_layers_equal_transformers(family: str, references):
    folder, ids, _ = references(family)
    model = read_model_spec(folder)
    (stage,) = make_stages(model, DIVISIONS["3:1"])
    lean, transformers = (build(folder, model, stage, lean=lean) for lean in (True, False))
    for step in range(len(STEPS)):
        flat = lean.backend.prepare(scheduled(step, ids))
        lean_NV, transformers_NV = (
            running.forward(flat.rows.token_ids_T, flat) for running in (lean, transformers)
        )
        torch.testing.assert_close(lean_NV, transformers_NV, atol=2e-5, rtol=0)
    for running in (lean, transformers):
        check_share(model, running)


@pytest.mark.parametrize("weight_format", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_half_precision_stays_close(family: str, weight_format: str, references):
    folder, ids, expected = references(family)
    model = read_model_spec(folder)
    stages = [build(folder, model, stage) for stage in make_stages(model, DIVISIONS["3:1"], weight_format)]
    batch = ScheduledBatch(
        step_id=0,
        chunks=(
            Chunk(
                sequence_id=0,
                start=0,
                token_ids=tuple(ids[0]),
                block_ids=SEQUENCES[0][1],
                sampling=SAMPLING,
            ),
        ),
    )
    flat = stages[0].backend.prepare(batch)
    logits_V = stages[0].forward(flat.rows.token_ids_T, flat)[0]
    similarity = torch.cosine_similarity(logits_V, expected[0][-1], dim=0)
    assert similarity > 0.999
    check_share(model, stages[0])
