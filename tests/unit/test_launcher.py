"""Which cores workers get, and what the coordinator imports."""

import subprocess
import sys
from dataclasses import replace

import pytest
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.runtime.launcher import own_cores


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
    ],
)
def test_what_starts_first_imports_little(module: str, unwanted: str):
    program = f"import sys, {module}; print(*(set({unwanted.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
