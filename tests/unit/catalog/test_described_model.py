"""Models that are described by hand, and GGUF files of architectures that are not known."""

from pathlib import Path

import pytest

from apportion.catalog.described import described
from apportion.catalog.model_config import read_model_spec
from apportion.cli.main import exit_code
from apportion.cost.formats import stored_bytes
from apportion.types.model import ModelSpec

QWEN_32B = "layers=64 hidden=5120 heads=40 kv_heads=8 ffn=27648 vocab=152064"
QWEN_235B = "layers=94, hidden=4096, heads=64, kv_heads=4, head_dim=128, vocab=151936, experts=128"


def spec(text: str) -> ModelSpec:
    description = described(text)
    assert description is not None
    return read_model_spec(description)


def test_a_dense_model():
    """Qwen2.5-32B: 32.76 B parameters (biases apart), 8 KV heads of 128."""
    model = spec(QWEN_32B)
    layer = 5120 * 128 * (40 + 8 + 8 + 40) + 3 * 5120 * 27648
    assert model.num_parameters == 64 * (layer + 2 * 5120) + 2 * 152064 * 5120 + 5120
    assert model.kv_elements(model.layers[0], model.kv_heads) == 2 * 8 * 128
    assert any("described by hand" in note for note in model.notes)


def test_experts_from_the_size():
    """Qwen3-235B-A22B: experts of 1536 columns, 8 of 128 for a token."""
    model = spec(f"{QWEN_235B} params=235.09B active=22.2B")
    assert model.num_parameters == pytest.approx(235.09e9, rel=0.001)
    assert model.ffn_columns == 1536
    assert model.layers[0].experts_per_token == 8


def test_the_width_from_the_size():
    assert spec(
        "layers=64 hidden=5120 heads=40 kv_heads=8 vocab=152064 params=32.76B"
    ).ffn_columns == pytest.approx(27648, rel=0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=64 hidden=5120", "lacks heads, vocab"),
        ("layers=64 hidden=5120 heds=40", "unknown field 'heds'; did you mean heads"),
        ("layers=64 hidden=5120 heads=40 vocab=152064", "lacks ffn; give ffn=… or params=…"),
        (f"{QWEN_235B} experts_per_token=8", "lacks expert_ffn"),
        (f"{QWEN_32B} params=70B", "makes 32.8 B parameters in all, but says params=70.0B"),
        ("layers=64 hidden=5120 heads=40 vocab=152064 params=1B", "less than its attention and tables alone"),
        ("layers=2 layers=3", "gives layers twice"),
        ("layers=0 hidden=5120", "layers in the description is 0"),
        ("layers=many", "'layers=many' in the description is not a name and a number"),
        ("layers=99999 hidden=64 heads=4 vocab=100 ffn=64", "at most 1024"),
    ],
)
def test_descriptions_that_are_wrong(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(["plan", text, "--devices", "rtx-3090", "--no-calibration"]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())


def test_names_are_no_descriptions():
    assert [described(name) for name in ("demo", "org/model", "./a=b/c d", "llama-3.1-8b")] == [None] * 4


def test_a_gguf_file_of_an_unknown_architecture(tmp_path: Path):
    """Exact sizes from its header: two layers of 2 KV heads of 32, whatever the architecture is called."""
    hidden, ffn, vocab = 128, 256, 300
    layer = {
        "attn_q.weight": (128, hidden), "attn_k.weight": (64, hidden), "attn_v.weight": (64, hidden),
        "attn_output.weight": (hidden, 128), "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (ffn, hidden), "ffn_up.weight": (ffn, hidden), "ffn_down.weight": (hidden, ffn),
    }  # fmt: skip
    tensors = {f"blk.{number}.{name}": shape for number in range(2) for name, shape in layer.items()}
    tensors |= {
        "token_embd.weight": (vocab, hidden),
        "output.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    path = write_shapes(tmp_path / "model.gguf", tensors)
    model = read_model_spec(path)
    assert model.family == "brand-new"
    assert model.num_parameters == sum(
        shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tensors.values()
    )
    assert (model.kv_heads, model.kv_elements(model.layers[0], 2)) == (2, 2 * 64)
    assert model.stored is None
    assert stored_bytes(model) == 0


def write_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "brand-new")
    writer.add_block_count(2)
    writer.add_embedding_length(128)
    writer.add_head_count(4)
    writer.add_context_length(4096)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
