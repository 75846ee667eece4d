"""Every model of the catalogue on any number of equal cards: planned, or refused with what is missing."""

from dataclasses import replace
from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.catalog.datasheet import gpu_device
from apportion.catalog.gpus import find_gpu
from apportion.catalog.known_models import known_config, known_models
from apportion.catalog.model_config import read_model_spec
from apportion.planner.build import make_plan
from apportion.types.cluster import Cluster, Link
from apportion.types.errors import InfeasibleError
from apportion.types.model import ModelSpec
from apportion.types.workload import Workload


def shallow(known: str) -> ModelSpec:
    """Two layers of each sort that the model has: which groups there are does not depend on more."""
    model = read_model_spec(known_config(known))
    layers = tuple(layer for _, alike in groupby(model.layers) for layer in list(alike)[:2])
    return replace(model, layers=layers[:4])


def check(known: str, cards: int, weights: str = "int4"):
    devices = tuple(gpu_device(find_gpu("h200"), f"card{number}", "box") for number in range(cards))
    cluster = Cluster(devices=devices, links=(Link(src="box", dst="box", latency_s=1e-5, bytes_per_s=5e10),))
    workload = Workload(
        prompt_tokens=512, output_tokens=128, concurrency=1, max_context_tokens=2048, objective="latency"
    )
    try:
        plan = make_plan(shallow(known), cluster, workload, (weights,))
    except InfeasibleError:
        return
    for stage in plan.stages:
        assert sum(stage.split.kv_heads) == plan.model.kv_heads
        assert min(stage.split.kv_heads) >= 1
        assert sum(stage.split.ffn_columns) == plan.model.ffn_columns


@pytest.mark.parametrize("cards", [9, 12, 17])
@pytest.mark.parametrize("known", ["deepseek-v3", "llama-2-13b"])
def test_many_heads_on_many_cards(known: str, cards: int):
    """128 and 40 KV heads: more ways to share them than are listed."""
    check(known, cards)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(known_models())), st.integers(1, 24), st.sampled_from(["bf16", "int4"]))
def test_models_on_equal_cards(known: str, cards: int, weights: str):
    check(known, cards, weights)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("known", known_models())
def test_every_model_on_every_number_of_equal_cards(known: str):
    for cards in range(1, 25):
        check(known, cards)
