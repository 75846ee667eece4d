"""Which cores workers get, and what the processes of a run import."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.launcher import own_cores, worker_modules


@pytest.mark.parametrize(
    ("num_threads", "cores"),
    [
        ([1, 1], {"d0": {4}, "d1": {6}}),
        ([2, 1], {"d0": {4, 6}, "d1": {7}}),
        ([2, 2], {}),
    ],
    ids=["one each", "by threads", "too few"],
)
def test_devices_that_fit_have_cores_of_their_own(num_threads: list[int], cores: dict[str, set[int]]):
    devices = [replace(cpu_device(f"d{i}"), num_threads=num) for i, num in enumerate(num_threads)]
    plan = hand_plan(
        read_model_spec(resolve_model("demo", weights=False)), [[1], [1]], [4, 4], devices=devices
    )
    assert own_cores(plan, [4, 6, 7]) == cores


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("apportion.cli.main", "numpy scipy pydantic torch"),
        ("apportion.cli.generate", "torch transformers scipy"),
        ("apportion.calibrate.here", "scipy torch"),
        ("apportion.engine.worker", "transformers pydantic"),
    ],
)
def test_what_starts_first_imports_little(module: str, unwanted: str):
    program = f"import sys, {module}; print(*(set({unwanted.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


_STAGE = """
import sys
from plans import hand_plan
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.model.backends.choose import backend_of
from apportion.model.build import build_stage, import_layers
from apportion.model.weights.load_memory import Unmetered
from apportion.model.weights.random_weights import RandomWeights

folder = resolve_model("demo", weights=False)
model = read_model_spec(folder)
(stage,) = hand_plan(model, [[1]], [8]).stages
import_layers(folder, model, stage, RandomWeights())
backend = backend_of("cpu", "fp32", block_tokens=4, gather_tokens=0)
build_stage(folder, model, stage, 0, weights=RandomWeights(), num_kv_blocks=1, all_reduce=abs, backend=backend,
    memory=Unmetered())
print("transformers" in sys.modules)
"""


def test_a_stage_of_lean_layers_imports_no_transformers():
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _STAGE], capture_output=True, text=True, check=True, env=path
    )
    assert done.stdout.split() == ["False"]


def test_transformers_is_imported_before_workers_that_need_it_fork(tmp_path: Path):
    folder = resolve_model("demo", weights=False)
    model = read_model_spec(folder)
    lean = worker_modules(folder, model)
    assert "apportion.model.hf.build" not in lean
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert worker_modules(tmp_path, model) == [*lean, "apportion.model.hf.build"]
