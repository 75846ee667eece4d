"""Packed weights: every family, whole and in a group, beside transformers' own model of the weights as they are held;
and greedy text through real workers, the same however the model is divided."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import is_within
from parity.test_stage_inprocess import SEQUENCES, STEPS, build, make_stages, scheduled
from parity.tiny_models import FAMILIES, make_checkpoint
from plans import hand_plan
from torch import Tensor
from transformers import AutoModelForCausalLM

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import parameters, read_bytes, shard_weights_bytes
from apportion.cost.shard import stage_shards
from apportion.engine.engine import Engine
from apportion.engine.text import Text
from apportion.types.errors import ModelError
from apportion.types.request import Request, SamplingParams

FORMATS = ("bf16", "fp16", "int8")
PACKED_FAMILIES = tuple(family for family in FAMILIES if family != "gpt_oss")
NUM_LAYERS = 4
DIVISIONS = {"whole": [(4, [1])], "one, then 2:1:1": [(1, [1]), (3, [2, 1, 1])]}


def round_as_held(weight: Tensor, weight_format: str) -> None:
    if weight_format == "int8":
        scales = weight.abs().amax(-1, keepdim=True) / 127
        weight.copy_((weight / scales).round() * scales)
    else:
        weight.copy_(weight.to({"bf16": torch.bfloat16, "fp16": torch.float16}[weight_format]))


def rounded(model: Any, weight_format: str) -> Any:
    """A tied table is one tensor, which is rounded once."""
    for name, parameter in model.named_parameters():
        is_router = name.endswith("mlp.gate.weight")
        if parameter.dim() > 1 and not is_router:
            round_as_held(parameter.data, weight_format)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    @cache
    def checkpoint(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_checkpoint(family, folder, NUM_LAYERS)
        return folder

    return checkpoint


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_family_is_the_model_of_the_weights_it_holds(family: str, weight_format: str, checkpoints):
    folder = checkpoints(family)
    spec = read_model_spec(folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 509, (length,), generator=generator) for length, _ in SEQUENCES]
    with torch.no_grad():
        whole = rounded(oracle.eval(), weight_format)
        expected = [whole(ids_T[None], use_cache=False).logits[0] for ids_T in ids]
    for division in DIVISIONS.values():
        stages = [build(folder, spec, stage) for stage in make_stages(spec, division, weight_format, "fp32")]
        for step in range(len(STEPS)):
            batch = scheduled(step, [ids_T.tolist() for ids_T in ids])
            flat = stages[0].backend.prepare(batch)
            values = flat.rows.token_ids_T
            for running in stages:
                values = running.forward(values, flat)
            sampled = [chunk for chunk in batch.chunks if chunk.sampling is not None]
            for logits_V, chunk in zip(values, sampled, strict=True):
                wanted = expected[chunk.sequence_id][chunk.stop - 1]
                torch.testing.assert_close(logits_V, wanted, atol=1e-4, rtol=0)
        for running in stages:
            for rank, member in enumerate(running.members):
                shard = stage_shards(spec, running.stage)[rank]
                assert member.weights_bytes == shard_weights_bytes(spec, shard)
                assert member.parameters == parameters(spec, running.stage, rank)
                assert member.read_bytes == read_bytes(spec, running.stage, rank)


def test_experts_in_one_tensor_are_refused(checkpoints):
    folder = checkpoints("gpt_oss")
    spec = read_model_spec(folder)
    (stage,) = make_stages(spec, DIVISIONS["whole"], "int8", "fp32")
    with pytest.raises(ModelError, match="holds all experts in one tensor, which cannot be packed as int8"):
        build(folder, spec, stage)


SHAPES = {"alone": ([[1]], [8]), "pipeline": ([[1], [1]], [3, 5]), "3:1 group": ([[3, 1]], [8])}


@pytest.mark.parametrize(
    ("weight_format", "kv_format"),
    [(name, "fp32") for name in FORMATS] + [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "fp16")],
)
def test_greedy_text_does_not_depend_on_the_division(weight_format: str, kv_format: str):
    folder = resolve_model("demo", weights=True)
    spec = read_model_spec(folder)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [Text(folder).encode(text) for text in ("ROMEO:\n", "KING HENRY:\nMy lord, what", "A")]
    written: dict[str, dict[int, list[int]]] = {}
    for shape, (groups, layers) in SHAPES.items():
        formats = {"weight_format": weight_format, "activation_format": "fp32", "kv_format": kv_format}
        plan = hand_plan(spec, groups, layers, **formats)
        tokens: dict[int, list[int]] = {i: [] for i in range(len(prompts))}
        with Engine(plan, folder, []) as engine:
            requests = [Request(id=i, prompt_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
            for event in engine.generate(requests):
                tokens[event.request_id].append(event.token_id)
        for report in engine.reports.values():
            assert is_within(report.peak_bytes, plan.memory[report.device_id].engine_bytes)
        written[shape] = tokens
    assert written["pipeline"] == written["alone"]
    assert written["3:1 group"] == written["alone"]
