"""The device map, taken by accelerate itself: every parameter is placed, and the placed model computes the same."""

import json
from dataclasses import replace

import pytest
import torch
from exported import export
from parity.tiny_models import FAMILIES, make_checkpoint
from plans import cpu_device, hand_plan
from transformers import AutoModelForCausalLM

from apportion.catalog.model_config import read_model_spec

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def plan(folder):
    model = read_model_spec(folder)
    gpu = replace(cpu_device("gpu"), kind="cuda", torch_device="cuda:0")
    devices = [cpu_device("laptop"), gpu]
    return hand_plan(model, [[1], [1]], [1, model.num_layers - 1], devices=devices)


def test_every_parameter_is_placed_where_the_plan_has_it(folder, plan):
    placed = export(plan, "accelerate").device_map
    assert placed == json.loads(json.dumps(placed))
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_pretrained(folder)
    accelerate.utils.check_device_map(model, placed)
    for name, _ in model.named_parameters():
        over = [module for module in placed if name.startswith(module + ".")]
        assert len(over) == 1, name
    assert placed["model.embed_tokens"] == placed["model.layers.0"] == "cpu"
    assert placed["model.layers.1"] == placed["model.norm"] == 0
    assert placed["lm_head"] == ("cpu" if plan.model.tied_embeddings else 0)


def test_accelerate_loads_the_map_and_computes_the_same(folder, plan, tmp_path):
    """This machine's stand-in for the GPU is accelerate's "disk"."""
    placed = {
        name: "disk" if device == 0 else device
        for name, device in export(plan, "accelerate").device_map.items()
    }
    whole = AutoModelForCausalLM.from_pretrained(folder)
    divided = AutoModelForCausalLM.from_pretrained(folder, device_map=placed, offload_folder=tmp_path)
    assert divided.hf_device_map == placed
    token_ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(divided(token_ids).logits, whole(token_ids).logits)
