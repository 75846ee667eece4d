"""Numbers that are none do not pass for weights or logits."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity.tiny_models import make_checkpoint
from plans import hand_plan
from safetensors.torch import load_file, save_file

from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.model.sampling import NotFiniteError, sample
from apportion.model.weights.checkpoint import PIECE_BYTES, Checkpoint
from apportion.types.errors import EngineError, ModelError, UsageError
from apportion.types.request import Draw, Request, SamplingParams

WRONG = st.sampled_from([math.nan, math.inf, -math.inf])
FIXTURES = [HealthCheck.function_scoped_fixture]


@given(
    wrong=WRONG,
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
    columns=st.integers(0, 300),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
def test_a_tensor_with_a_wrong_number_is_named_where_that_is_read(
    tmp_path: Path,
    wrong: float,
    stored: torch.dtype,
    wanted: torch.dtype,
    columns: int,
    data: st.DataObject,
):
    """Where it is not, the rest is read as ever; also a part of the columns, and tensors of several pieces."""
    rows, width = PIECE_BYTES // 4 // 400 + 100, 400
    weights = torch.full((rows, width), 6e4).to(stored)  # whose sum would overflow in half precision
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    weights[row, column] = wrong
    save_file({"w": weights}, tmp_path / "model.safetensors")
    ranges = ((0, rows), (columns, width))
    target = torch.empty(rows, width - columns, dtype=wanted)
    if column >= columns:
        with pytest.raises(ModelError, match="tensor 'w' holds numbers that are not finite"):
            Checkpoint(tmp_path).read_into(target, "w", ranges)
    else:
        Checkpoint(tmp_path).read_into(target, "w", ranges)
        assert torch.equal(target, weights[:, columns:].to(wanted))


@given(wrong=st.sampled_from([math.nan, math.inf]), temperature=st.sampled_from([0.0, 1e-300, 1.0, 1e300]))
@settings(max_examples=20, deadline=None)
def test_nothing_is_drawn_by_wrong_logits(wrong: float, temperature: float):
    """Of the row alone that has them."""
    logits = torch.randn(2, 50)
    logits[1, 7] = wrong
    draws = [
        (row, Draw(row, SamplingParams(max_tokens=1, temperature=temperature, seed=3)), 5) for row in range(2)
    ]
    assert 0 <= sample(logits, draws[:1])[0] < 50
    with pytest.raises(NotFiniteError):
        sample(logits, draws)


def test_the_device_that_computes_wrong_numbers_is_named(tmp_path: Path):
    """A layer of the second of three stages overflows."""
    make_checkpoint("qwen3", tmp_path, num_layers=3)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    plan = hand_plan(read_model_spec(tmp_path), [[1], [1], [1]], [1, 1, 1])
    request = Request(id=0, prompt_ids=(5, 6), sampling=SamplingParams(max_tokens=3))
    with (
        pytest.raises(EngineError, match=r"was handed by stage 1 \(d1\) numbers that are not finite"),
        Engine(plan, tmp_path, []) as engine,
    ):
        list(engine.generate([request]))


@pytest.mark.parametrize("prompt", [(), (5, -1), (5, 10**6)], ids=["empty", "negative", "too large"])
def test_prompts_are_of_the_vocabulary(tmp_path: Path, prompt: tuple[int, ...]):
    make_checkpoint("qwen3", tmp_path, num_layers=2)
    plan = hand_plan(read_model_spec(tmp_path), [[1]], [2])
    engine = Engine(plan, tmp_path, [])
    with pytest.raises(UsageError, match="prompt 0 has"):
        engine.submit(Request(id=0, prompt_ids=prompt, sampling=SamplingParams(max_tokens=3)))


def test_tensors_that_share_bytes_are_refused(tmp_path: Path):
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(28))
    with pytest.raises(ModelError, match="'a' and 'b' overlap"):
        Checkpoint(tmp_path)
