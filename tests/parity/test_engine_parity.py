"""Split == whole, through real worker processes and sockets: every family in every shape of division.

Four prompts of different lengths arrive at different steps and are prefilled in chunks; logits stand beside
transformers' own forward, greedy tokens beside its `generate`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from parity.tiny_models import FAMILIES, make_checkpoint
from plans import hand_plan
from transformers import AutoModelForCausalLM

from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import parameters, read_bytes
from apportion.cost.traffic import run_link_bytes
from apportion.engine.engine import Engine
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

NUM_NEW = 32
PROMPT_LENGTHS = (3, 17, 9, 26)
ARRIVAL_STEPS = (0, 0, 4, 7)
NUM_LAYERS = 4
SHAPES = {
    "whole": ([[1]], [4]),
    "three uneven stages": ([[1], [1], [1]], [1, 2, 1]),
    "3:1 group": ([[3, 1]], [4]),
    "device and 2:1:1 group": ([[1], [2, 1, 1]], [1, 3]),
}


@dataclass(frozen=True, kw_only=True)
class Reference:
    folder: Path
    prompts: list[tuple[int, ...]]
    outputs: list[list[int]]
    logits: list[torch.Tensor]
    """One [NUM_NEW, vocabulary] per prompt."""


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def reference(family: str) -> Reference:
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(family, folder, num_layers=NUM_LAYERS)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        generator = torch.Generator().manual_seed(1)
        vocab_rows = model.config.get_text_config().vocab_size
        prompts = [torch.randint(3, vocab_rows, (n,), generator=generator) for n in PROMPT_LENGTHS]
        outputs, logits = [], []
        with torch.no_grad():
            for prompt in prompts:
                whole = model.generate(
                    prompt[None],
                    attention_mask=torch.ones_like(prompt[None]),
                    max_new_tokens=NUM_NEW,
                    min_new_tokens=NUM_NEW,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
                outputs.append(whole[0, len(prompt) :].tolist())
                logits.append(model(whole, use_cache=False).logits[0, len(prompt) - 1 : -1].float())
        return Reference(
            folder=folder, prompts=[tuple(p.tolist()) for p in prompts], outputs=outputs, logits=logits
        )

    return reference


def run_arriving(engine: Engine, prompts: list[tuple[int, ...]]) -> dict[int, list[tuple[int, bytes]]]:
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, return_logits=True)
    drawn: dict[int, list[tuple[int, bytes]]] = {i: [] for i in range(len(prompts))}
    step = 0
    while step <= max(ARRIVAL_STEPS) or engine.scheduler.num_unfinished:
        for i, arrival in enumerate(ARRIVAL_STEPS):
            if arrival == step:
                engine.submit(Request(id=i, prompt_ids=prompts[i], sampling=sampling))
        for event in engine.step():
            assert event.logits is not None
            drawn[event.request_id].append((event.token_id, event.logits))
        step += 1
    return drawn


def check_shares(engine: Engine, plan: Plan) -> None:
    """Each worker held and read exactly its share, and the links carried exactly what was predicted."""
    for stage in plan.stages:
        for rank, device_id in enumerate(stage.split.device_ids):
            report = engine.reports[device_id]
            assert report.parameters == parameters(plan.model, stage, rank)
            assert report.read_bytes == read_bytes(plan.model, stage, rank)
    predicted = run_link_bytes(plan, PROMPT_LENGTHS, [NUM_NEW] * len(PROMPT_LENGTHS))
    assert engine.sent_bytes() == predicted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_split_equals_whole(family: str, shape: str, references):
    reference = references(family)
    groups, layers = SHAPES[shape]
    plan = hand_plan(read_model_spec(reference.folder), groups, layers)
    with Engine(plan, reference.folder, eos_token_ids=[]) as engine:
        drawn = run_arriving(engine, reference.prompts)
    for i, pairs in drawn.items():
        assert [token_id for token_id, _ in pairs] == reference.outputs[i]
        logits = torch.stack([torch.frombuffer(bytearray(data), dtype=torch.float32) for _, data in pairs])
        torch.testing.assert_close(logits, reference.logits[i], atol=1e-4, rtol=0)
    check_shares(engine, plan)
