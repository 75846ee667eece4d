"""Weights as stored, whose members may hold a block more than the first: the planner against every division."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_planner_brute_force import check_against_brute_force, problems

from apportion.planner.problem import make_problem
from apportion.types.model import LayerSpec, ModelSpec, Parameters, StoredWeights


def stored_part(draw: st.DrawFn, part: Parameters) -> Parameters:
    """In 4 to 16 bits a parameter."""
    return replace(part, stored_bytes=part.count * draw(st.integers(4, 16)) // 8)


def stored_layer(draw: st.DrawFn, layer: LayerSpec) -> LayerSpec:
    return replace(
        layer,
        per_kv_head=stored_part(draw, layer.per_kv_head),
        per_ffn_column=stored_part(draw, layer.per_ffn_column),
        replicated=stored_part(draw, layer.replicated),
        stored_block_bytes=draw(st.sampled_from([0, 2000, 20_000])),
    )


def stored_model(draw: st.DrawFn, model: ModelSpec) -> ModelSpec:
    kinds = {layer: [stored_layer(draw, layer) for _ in range(2)] for layer in dict.fromkeys(model.layers)}
    row_bytes = draw(st.integers(20, 128))
    return replace(
        model,
        layers=tuple(draw(st.sampled_from(kinds[layer])) for layer in model.layers),
        stored=StoredWeights(
            format="q4_k_m",
            container="gguf",
            embedding_row_bytes=row_bytes,
            head_row_bytes=row_bytes if model.tied_embeddings else draw(st.integers(20, 128)),
            outside_bytes=256,
            ffn_block_columns=1,
        ),
    )


@st.composite
def stored_problems(draw: st.DrawFn):
    """Some devices have no rate that such weights could be widened to."""
    problem = draw(problems())
    model = stored_model(draw, problem.model)
    formats = (*problem.weight_formats, "q4_k_m")
    made = make_problem(model, problem.cluster, problem.workload, formats, problem.capacity.chunk_tokens)
    lacking = any(device.rate("q4_k_m") is None for device in problem.cluster.devices)
    return made if lacking or draw(st.booleans()) else made.in_format("q4_k_m")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(stored_problems())
def test_planner_equals_brute_force(problem):
    check_against_brute_force(problem)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(stored_problems())
def test_planner_equals_brute_force_at_length(problem):
    check_against_brute_force(problem)
