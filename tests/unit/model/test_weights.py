import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apportion.model.weights import checkpoint as weights
from apportion.model.weights.checkpoint import Checkpoint
from apportion.types.errors import ModelError

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_reads_and_converts_the_wanted_slice(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path):
    whole = random(7, 11, 13).to(stored)
    save(tmp_path, before=random(3), whole=whole)
    checkpoint = Checkpoint(tmp_path)
    target = torch.empty(3, 11, 4, dtype=wanted)
    checkpoint.read_into(target, "whole", ((2, 5), (0, 11), (9, 13)))
    assert torch.equal(target, whole[2:5, :, 9:13].to(wanted))
    assert checkpoint.read_bytes == 3 * 11 * 4 * stored.itemsize


@pytest.mark.parametrize("piece_bytes", [4, 40, 52, 400, 2**20])
def test_pieces_of_any_size_give_the_same(piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights, "PIECE_BYTES", piece_bytes)
    whole = random(5, 4, 13)
    save(tmp_path, whole=whole)
    checkpoint = Checkpoint(tmp_path)
    target = torch.empty(4, 4, 12)
    checkpoint.read_into(target, "whole", ((1, 5), (0, 4), (1, 13)))
    assert torch.equal(target, whole[1:5, :, 1:13])
    assert checkpoint.read_bytes == target.nbytes


def test_fills_part_of_a_larger_tensor(tmp_path: Path):
    whole = random(6, 4)
    save(tmp_path, whole=whole)
    target = torch.zeros(2, 5, 4)
    Checkpoint(tmp_path).read_into(target[1, 3:], "whole", ((2, 4), (0, 4)))
    assert torch.equal(target[1, 3:], whole[2:4])
    assert target[0].count_nonzero() == 0


def test_loading_holds_the_weights_and_one_piece(tmp_path: Path):
    """In a process of its own, whose data segment may grow by the weights and 2 MiB."""
    size_bytes = 64 * 2**20
    save(tmp_path, whole=torch.zeros(size_bytes // 4096, 1024))
    script = f"""
import re, resource, torch
from pathlib import Path
from apportion.model.weights.checkpoint import Checkpoint
target = torch.empty({size_bytes // 4096}, 512)
target.zero_()
data_bytes = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + 2 * 2**20, resource.RLIM_INFINITY))
checkpoint = Checkpoint(Path({str(tmp_path)!r}))
checkpoint.read_into(target, "whole", ((0, {size_bytes // 4096}), (512, 1024)))
print(checkpoint.read_bytes)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == size_bytes // 2


def test_several_files(tmp_path: Path):
    first, second = random(2, 3), random(4)
    save_file({"first": first}, tmp_path / "a.safetensors")
    save_file({"second": second}, tmp_path / "b.safetensors")
    index = {"weight_map": {"first": "a.safetensors", "second": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    target = torch.empty(4)
    checkpoint.read_into(target, "second", ((0, 4),))
    assert torch.equal(target, second)
    assert "first" in checkpoint
    assert "third" not in checkpoint

    index["weight_map"]["third"] = "b.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"b\.safetensors lacks tensor 'third'"):
        Checkpoint(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ModelError, match=r"b\.safetensors is missing"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a safetensors index"):
        Checkpoint(tmp_path)


def test_truncated_files_name_expected_and_actual_bytes(tmp_path: Path):
    file = save(tmp_path, whole=random(10, 10))
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(
        ModelError, match=f"has {len(content) - 100} bytes, its header expects {len(content)}"
    ):
        Checkpoint(tmp_path)
    file.write_bytes(content[:20])
    with pytest.raises(ModelError, match="has 20 bytes, its header alone expects"):
        Checkpoint(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="has 0 bytes"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        (b"not json", 0),
        (b"[]", 0),
        (b'{"whole": {"dtype": "F32", "shape": [2]}}', 8),
        (b'{"whole": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', 8),
        (b'{"whole": {"dtype": "F32", "shape": [2], "data_offsets": ["0", 8]}}', 8),
        (b'{"whole": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}', 8),
        (b'{"whole": 3}', 0),
    ],
)
def test_corrupt_headers(header: bytes, data_bytes: int, tmp_path: Path):
    content = len(header).to_bytes(8, "little") + header + bytes(data_bytes)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: the safetensors header is corrupt") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_or_unfitting_tensors(tmp_path: Path):
    save(tmp_path, whole=random(2, 3), quantised=torch.zeros(4, dtype=torch.uint8))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_shape("whole", (2, 3))
    with pytest.raises(ModelError, match=r"'whole' has shape \[2, 3\], config.json asks for \[3, 2\]"):
        checkpoint.check_shape("whole", (3, 2))
    with pytest.raises(ModelError, match="no tensor 'absent' in the checkpoint"):
        checkpoint.check_shape("absent", (1,))
    with pytest.raises(ModelError, match="'quantised' is stored as U8; use a checkpoint in F32, F16, BF16"):
        checkpoint.check_shape("quantised", (4,))


def test_folders_without_safetensors(tmp_path: Path):
    with pytest.raises(ModelError, match="has no weights but neither"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"has pytorch_model\.bin but neither model\.safetensors nor"):
        Checkpoint(tmp_path)
