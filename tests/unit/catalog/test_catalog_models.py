"""The catalogue of models: every published parameter count, and names as people write them."""

import json
from dataclasses import replace

import pytest
from planned import cluster, cpu, llama, workload

from apportion.catalog.hub import resolve_model
from apportion.catalog.known_models import find_known_model, known_config, known_models
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.runnable import check_runnable
from apportion.cost.statements import model_parameters
from apportion.planner.build import make_plan
from apportion.types.errors import ClusterError, ModelError

STATED = {
    "gemma-3-4b": 1e-4,  # published without the 64 unused rows of the vocabulary
    "gemma-3-12b": 1e-4,
    "gemma-3-27b": 1e-4,
    "glm-4.5": 1e-2,  # published as 355 B
}
"""Relative error allowed; every other count is exact."""


def test_counts():
    assert len(known_models()) >= 50
    families = {read_model_spec(known_config(known)).family for known in known_models()}
    assert {"llama", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "granite"} <= families


@pytest.mark.parametrize("known", known_models())
def test_parameters_are_those_published(known: str):
    spec = read_model_spec(resolve_model(known, weights=False))
    published = known_models()[known]["parameters"]
    assert abs(model_parameters(spec) / published - 1) <= STATED.get(known, 0)
    assert spec.name == known
    assert spec.checkpoint_format == "bf16"
    assert spec.max_context_tokens >= 2048


@pytest.mark.parametrize("known", known_models())
def test_entries_say_where_they_come_from(known: str):
    table = known_models()[known]
    assert table["sources"]
    assert table.keys() <= {"hub_ids", "aliases", "parameters", "sources", "note"}
    for name in (known, *table["aliases"], *table["hub_ids"]):
        assert find_known_model(name) == known
    assert all(hub_id.count("/") == 1 for hub_id in table["hub_ids"])


def test_a_config_is_the_one_that_transformers_reads():
    config = json.loads(known_config("qwen3-8b").read_text())
    assert config["model_type"] == "qwen3"
    assert config["num_key_value_heads"] == 8


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("qwen2.5 72B", "qwen2.5-72b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("phi_4", "phi-4"),
        ("deepseek-r1:1.5b", "deepseek-r1-distill-qwen-1.5b"),
        ("deepseek-r1:7b", "deepseek-r1-distill-qwen-7b"),
        ("deepseek-r1:14b", "deepseek-r1-distill-qwen-14b"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "deepseek-r1-distill-qwen-32b"),
        ("deepseek-r1:70b", "llama-3.1-70b"),
        ("deepseek-r1:671b", "deepseek-v3"),
        ("deepseek-r1:8b", None),
        ("meta-llama/llama-99", None),
    ],
)
def test_names_as_people_write_them(name: str, known: str | None):
    assert find_known_model(name) == known


def test_names_that_nothing_is_called():
    with pytest.raises(ModelError, match=r"did you mean llama-3\.1-8b") as caught:
        resolve_model("lama-3.1-8b", weights=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="nor in the catalogue; 'demo' is the bundled model"):
        resolve_model("xxxxxxxxxxxxxx", weights=False)


def test_a_name_of_two_models_is_told_with_both():
    with pytest.raises(ModelError, match=r"did you mean qwen3-8b \(.*\) or llama-3\.1-8b \(.*\)\?"):
        resolve_model("deepseek-r1:8b", weights=False)


def test_a_distilled_model_has_the_shape_of_what_it_is_distilled_into():
    """Only the smallest has a head of its own, of 151,936 rows of 1536."""
    for size in ("1.5b", "7b", "14b", "32b"):
        spec, base = (
            read_model_spec(known_config(name.format(size)))
            for name in ("deepseek-r1-distill-qwen-{}", "qwen2.5-{}")
        )
        assert spec.layers == base.layers
        head = 151936 * 1536 if size == "1.5b" else 0
        assert model_parameters(spec) == model_parameters(base) + head
        assert spec.max_context_tokens == 131072


def test_running_needs_the_weights():
    with pytest.raises(ModelError, match="to run it, name its hub id 'Qwen/Qwen3-8B'"):
        resolve_model("qwen3-8b", weights=True)


def test_what_the_engine_has_no_implementation_for_is_refused():
    plan = make_plan(llama(), cluster([cpu("a", 8)]), workload(), ("fp32",))
    check_runnable(plan)
    with pytest.raises(ModelError, match="glm4 can be planned, but not run; those that run are gemma2"):
        check_runnable(replace(plan, model=replace(plan.model, family="glm4")))
    mac = replace(plan.cluster.devices[0], kind="metal")
    with pytest.raises(ClusterError, match="device a is a metal device"):
        check_runnable(replace(plan, cluster=replace(plan.cluster, devices=(mac,))))
