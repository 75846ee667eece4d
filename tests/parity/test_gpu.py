"""The same path on a CUDA device: alone, and as one end of a pipeline and of a group whose other end is a CPU."""

from dataclasses import replace

import pytest
import torch
from plans import cpu_device, hand_plan

from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.engine.text import Text
from apportion.types.cluster import Device
from apportion.types.request import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = replace(cpu_device("gpu"), kind="cuda", torch_device="cuda:0")
CPU = cpu_device("cpu")


def greedy(devices: list[Device], groups: list[list[int]], layers: list[int]) -> list[int]:
    folder = resolve_model("demo", weights=True)
    plan = hand_plan(read_model_spec(folder), groups, layers, devices=devices)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    request = Request(id=0, prompt_ids=Text(folder).encode("ROMEO:\n"), sampling=sampling)
    with Engine(plan, folder, []) as engine:
        token_ids = [event.token_id for event in engine.generate([request])]
    for report in engine.reports.values():
        assert report.peak_bytes <= plan.memory[report.device_id].engine_bytes
    return token_ids


@pytest.mark.parametrize(
    ("devices", "groups", "layers"),
    [
        ([GPU], [[1]], [8]),
        ([GPU, CPU], [[1], [1]], [5, 3]),
        ([GPU, CPU], [[3, 1]], [8]),
    ],
    ids=["alone", "pipeline with a CPU", "group with a CPU"],
)
def test_a_gpu_gives_the_cpus_text(devices: list[Device], groups: list[list[int]], layers: list[int]):
    assert greedy(devices, groups, layers) == greedy([CPU], [[1]], [8])
