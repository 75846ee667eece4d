"""Of any cards and models of the catalogue every exported command fits by the export's own bytes, or there is none."""

from functools import cache
from random import Random

import pytest
from exported import export
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apportion.asked.engine_planner import EnginePlanner
from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.gpus import gpus
from apportion.catalog.known_models import known_config, known_models
from apportion.catalog.model_config import read_model_spec
from apportion.export.engines import ENGINES
from apportion.export.limits import ABILITIES, group_sizes
from apportion.export.within import fitted
from apportion.planner.build import make_plan
from apportion.types.errors import ApportionError, InfeasibleError, PlanError
from apportion.types.workload import Workload

CARDS = sorted(gpus())
MODELS = sorted(known_models())
BEYOND = 40
"""GB of weights in 4 bits: larger models take long to plan, and fit few of these devices."""


@cache
def spec(name):
    return read_model_spec(known_config(name))


@cache
def plan_for(seed):
    """A plan of ours for one to three cards, a CPU beside them or not; None where there is none."""
    random = Random(seed)
    model = spec(random.choice([name for name in MODELS if spec(name).num_parameters * 0.5625e-9 < BEYOND]))
    cards = [random.choice(CARDS) for _ in range(random.randint(1, 3))]
    cpu = f" + cpu:{random.choice([16, 64, 128])}GiB" if random.random() < 0.5 else ""
    workload = Workload(
        prompt_tokens=256,
        output_tokens=64,
        concurrency=random.choice([1, 1, 4]),
        max_context_tokens=min(random.choice([2048, 16384]), model.max_context_tokens),
        objective="latency",
    )
    weights = random.choice(["int4", "int4", "int8", "bf16"])
    try:
        cluster = parse_devices("tower: " + " + ".join(cards) + cpu, tuple)
        return make_plan(model, cluster, workload, (weights,))
    except ApportionError:
        return None


def check(seed, engine):
    plan = plan_for(seed)
    if plan is None:
        return
    try:
        exported = export(plan, engine)
    except (InfeasibleError, PlanError):
        return
    assert bool(exported.launches) != (exported.device_map is not None)
    assert not any("does not fit" in note for note in exported.notes)
    devices = {device.id: device for device in plan.cluster.devices}
    assert exported.needed_bytes
    for name, needed in exported.needed_bytes.items():
        assert needed <= devices[name].memory_bytes, name
    if exported.division is not None and engine in ABILITIES:
        check_division(plan, engine, exported.division.stages)


def check_division(plan, engine, stages):
    """As a list of what the engine cannot do."""
    ability, devices = ABILITIES[engine], {device.id: device for device in plan.cluster.devices}
    assert [stages[0].layer_start, stages[-1].layer_stop] == [0, plan.model.num_layers]
    kinds = {devices[name].kind for stage in stages for name in stage.split.device_ids}
    assert len(kinds - {"cpu"}) <= 1 or not ability.one_make
    assert kinds <= {*ability.kinds, *(["cpu"] if ability.cpu else [])}
    assert len({stage.split.size for stage in stages}) == 1
    size = stages[0].split.size
    assert size in group_sizes(ability, plan.model, len(devices)) or engine == "llama.cpp"
    assert not any(stage.streamed_layers for stage in stages)
    if ability.cpu_first:
        assert all(devices[name].kind != "cpu" for stage in stages[1:] for name in stage.split.device_ids)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32), st.sampled_from(ENGINES))
def test_what_is_exported_fits(seed, engine):
    check(seed, engine)


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_exported_fits_at_length(engine):
    for seed in range(60):
        check(seed, engine)


@pytest.mark.nightly
def test_buffers_are_left_free_at_length():
    """What the plan counts as reserved is what was reserved before, and the engine's buffers."""
    for seed in range(30):
        plan = plan_for(seed)
        if plan is None:
            continue
        for engine in ("vllm", "llama.cpp"):
            try:
                made = fitted(plan, engine, EnginePlanner())
            except (InfeasibleError, PlanError):
                continue
            for name, taken in made.constraints.engine.buffer_bytes.items():
                before = plan.cluster.device(name).reserved_bytes
                assert made.cluster.device(name).reserved_bytes == before + taken
                assert taken > 0
