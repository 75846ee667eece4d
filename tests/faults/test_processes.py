"""Workers are killed, starved and orphaned: the error names the device, and no process is left."""

import os
import signal
from pathlib import Path

import pytest
from faults.processes import assert_gone
from parity.tiny_models import make_checkpoint
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.types.errors import EngineError, InfeasibleError, ModelError
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

LONG = Request(id=0, prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=50, ignore_eos=True))


@pytest.fixture
def demo_plan() -> Plan:
    return hand_plan(read_model_spec(resolve_model("demo", weights=True)), [[1], [3, 1]], [3, 5])


def test_a_killed_worker_is_named_and_the_others_end(demo_plan: Plan):
    engine = Engine(demo_plan, resolve_model("demo", weights=True), [])
    with pytest.raises(EngineError, match=r"worker of device d1 died \(exit code -9\)"), engine:
        pids = {device_id: process.pid for device_id, process in engine._processes.items()}
        for i, _ in enumerate(engine.generate([LONG])):
            if i == 5:
                os.kill(pids["d1"], signal.SIGKILL)
    assert_gone(list(pids.values()))


def test_a_clean_end_leaves_nothing(demo_plan: Plan):
    with Engine(demo_plan, resolve_model("demo", weights=True), []) as engine:
        pids = [process.pid for process in engine._processes.values()]
        assert sum(1 for _ in engine.generate([LONG])) == 50
    assert_gone(pids)


def test_the_budget_is_enforced():
    """A plan whose figures were tampered with cannot take more than its devices have."""
    model = read_model_spec(resolve_model("demo", weights=True))
    plan = hand_plan(model, [[1], [1]], [4, 4], devices=[cpu_device("big"), cpu_device("small", 6 * 2**20)])
    engine = Engine(plan, resolve_model("demo", weights=True), [])
    with pytest.raises(InfeasibleError, match=r"device small ran out of its 6\.0 MiB"), engine:
        pass


def test_a_broken_checkpoint_is_the_users_error(tmp_path: Path):
    make_checkpoint("qwen3", tmp_path, num_layers=4)
    plan = hand_plan(read_model_spec(tmp_path), [[1], [1]], [2, 2])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors") as caught, Engine(plan, tmp_path, []):
        pass
    assert "\n" not in str(caught.value)
