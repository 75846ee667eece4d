"""Workers are killed, starved and orphaned: the error names the device, and no process is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.processes import assert_gone, children
from parity.tiny_models import make_checkpoint
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.runtime.engine import Engine
from apportion.types.errors import EngineError, InfeasibleError, ModelError
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

LONG = Request(id=0, prompt_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=50, ignore_eos=True))
RUN_LONG = [
    sys.executable,
    "-m",
    "apportion",
    "run",
    "demo",
    "ROMEO:",
    "--devices",
    "a=cpu:40MiB@0.2, b=cpu:40MiB@0.2",
    "--max-tokens",
    "900",
    "--ignore-eos",
]


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


def start_long_run() -> tuple[subprocess.Popen[str], list[int]]:
    process = subprocess.Popen(
        RUN_LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while "ROMEO" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    pids = children(process.pid)
    assert len(pids) >= 3  # forkserver (and resource tracker), two workers
    return process, pids


@pytest.mark.parametrize(
    ("signal_number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_no_worker_outlives_the_coordinator(signal_number: signal.Signals, exit_code: int):
    process, pids = start_long_run()
    os.killpg(process.pid, signal_number) if signal_number == signal.SIGINT else process.send_signal(
        signal_number
    )
    _, errors = process.communicate(timeout=15)
    assert process.returncode == exit_code
    assert "Traceback" not in errors
    assert_gone(pids)
