"""Drafts that are right at random, verified by the last stage: the same bits as without them, in fewer steps."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contract import is_within
from parity.tiny_models import make_checkpoint
from plans import hand_plan

from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.types.request import Request, SamplingParams

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, return_logits=True)
DRAWING = replace(GREEDY, temperature=1.0, seed=7)
REQUESTS = [
    Request(id=i, prompt_ids=tuple(4 + (i * 5 + j * 7) % 60 for j in range(3 + 5 * i)), sampling=sampling)
    for i, sampling in enumerate((GREEDY, DRAWING, GREEDY))
]
Drawn = dict[int, list[tuple[int, bytes | None]]]


class Remembered:
    """Guesses what was drawn before, each token right with a probability of `right`."""

    def __init__(self, drawn: Drawn, right: float) -> None:
        self._texts = [
            (*REQUESTS[i].prompt_ids, *(token_id for token_id, _ in tokens)) for i, tokens in drawn.items()
        ]
        self._right, self._random = right, random.Random(3)

    def propose(self, token_ids: Sequence[int], most: int) -> list[int]:
        text = next(one for one in self._texts if one[: len(token_ids)] == tuple(token_ids))
        coming = text[len(token_ids) : len(token_ids) + most]
        return [one if self._random.random() < self._right else 3 for one in coming]


def tokens_of(drawn: Drawn) -> dict[int, list[int]]:
    return {i: [token_id for token_id, _ in tokens] for i, tokens in drawn.items()}


def logits_of(tokens: list[tuple[int, bytes | None]]) -> torch.Tensor:
    return torch.stack([torch.frombuffer(bytearray(data or b""), dtype=torch.float32) for _, data in tokens])


def drive(engine: Engine) -> tuple[Drawn, int]:
    drawn: Drawn = {one.id: [] for one in REQUESTS}
    for request in REQUESTS:
        engine.submit(request)
    steps = 0
    while engine.num_unfinished:
        for event in engine.step():
            drawn[event.request_id].append((event.token_id, event.logits))
        steps += 1
    return drawn, steps


@pytest.mark.parametrize("kv_format", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("family", "groups", "layers"),
    [("llama", [[1], [3, 1]], [1, 3]), ("gemma2", [[1], [1]], [2, 2]), ("olmo2", [[2, 1]], [4])],
    ids=["llama", "gemma2", "olmo2"],
)
def test_outputs_and_logits_are_those_without_drafts(
    family: str, groups: list[list[int]], layers: list[int], kv_format: str, tmp_path: Path
):
    make_checkpoint(family, tmp_path, num_layers=4)
    plan = hand_plan(
        read_model_spec(tmp_path), groups, layers, concurrency=8, kv_format=kv_format, microbatches=1
    )
    with Engine(plan, tmp_path, []) as engine:
        wanted, num_steps = drive(engine)
    with Engine(plan, tmp_path, [], drafts=Remembered(wanted, 0.7)) as engine:
        drawn, fewer_steps = drive(engine)
        metrics = engine.scheduler.metrics()
        engine.collect()
        for device_id, report in engine.reports.items():
            assert is_within(report.peak_bytes, plan.memory[device_id].engine_bytes)
    if family == "olmo2":  # transformers' layers: torch's bits depend on how many rows there are
        assert tokens_of(drawn) == tokens_of(wanted)
        for i, tokens in drawn.items():
            torch.testing.assert_close(logits_of(tokens), logits_of(wanted[i]), atol=1e-4, rtol=0)
    else:
        assert drawn == wanted
    assert 0 < metrics.accepted_tokens < metrics.drafted_tokens
    assert fewer_steps < num_steps
