"""Weights without a checkpoint: the same values however they are cut, of a size that keeps activations finite."""

import json
from pathlib import Path

import pytest
import torch
from plans import hand_plan

from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.model.weights.random_weights import RandomWeights
from apportion.types.request import Request, SamplingParams

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 120,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 509,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def whole(name: str, *shape: int) -> torch.Tensor:
    weights, target = RandomWeights(), torch.full(shape, float("nan"))
    weights.check_shape(name, shape)
    weights.read_into(target, name, tuple((0, size) for size in shape))
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "ranges"),
    [
        ((70, 50), ((3, 69), (7, 31))),
        ((4, 9, 50), ((1, 4), (2, 9), (13, 14))),
        ((3, 300_000), ((1, 2), (0, 300_000))),
    ],
)
def test_a_slice_has_the_values_of_the_whole(
    shape: tuple[int, ...], ranges: tuple[tuple[int, int], ...], dtype: torch.dtype
):
    weights = RandomWeights()
    weights.check_shape("w", shape)
    target = torch.empty([stop - start for start, stop in ranges], dtype=dtype)
    weights.read_into(target, "w", ranges)
    assert torch.equal(target, whole("w", *shape)[tuple(slice(*one) for one in ranges)].to(dtype))


def test_pieces_do_not_show(monkeypatch: pytest.MonkeyPatch):
    expected = whole("w", 70, 50)
    monkeypatch.setattr("apportion.model.weights.random_weights.PIECE_BYTES", 4 * 50 * 3)
    assert torch.equal(whole("w", 70, 50), expected)


def test_matrices_are_noise_of_the_size_of_their_fan_in_and_norms_are_ones():
    matrix = whole("a", 400, 1024)
    assert abs(matrix.mean()) < 1e-3
    assert 0.95 < matrix.std() * 1024**0.5 < 1.05
    assert len(matrix.unique(dim=0)) == 400
    assert not torch.equal(matrix, whole("b", 400, 1024))
    assert whole("norm.weight", 8).tolist() == [1] * 8
    assert whole("q_proj.bias", 8).tolist() == [0] * 8


def test_a_config_alone_runs_and_the_division_does_not_show(tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    model = read_model_spec(config)
    divisions = [([[1]], [4]), ([[3, 1], [1]], [1, 3])]
    outputs = []
    for groups, layers in divisions:
        with Engine(hand_plan(model, groups, layers), config, [], random_weights=True) as engine:
            request = Request(
                id=0, prompt_ids=tuple(range(10)), sampling=SamplingParams(max_tokens=16, ignore_eos=True)
            )
            outputs.append([event.token_id for event in engine.generate([request])])
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 8  # noise does not repeat itself
