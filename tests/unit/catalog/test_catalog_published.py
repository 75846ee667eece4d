"""Datasheet devices against published 16-bit decode speeds of one card, through the whole planner.

Two constants a vendor were fitted to these same figures, so this shows how far the fit holds, not a prediction.
"""

import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from apportion.catalog.cluster_rules import make_cluster
from apportion.catalog.datasheet import gpu_device
from apportion.catalog.gpus import gpus
from apportion.catalog.known_models import find_known_model, known_config
from apportion.catalog.model_config import read_model_spec
from apportion.planner.build import make_plan
from apportion.types.workload import Workload

FILE = Path(__file__).parents[3] / "benchmarks" / "published" / "decode_speeds.toml"
SAME_SHAPE = {"huggyllama/llama-7b": "llama-2-7b"}
MEASURED: list[dict[str, Any]] = [
    one
    for one in tomllib.loads(FILE.read_text(encoding="utf-8"))["measurement"]
    if one["split"] == "none" and one["bits_per_weight"] > 15
]


def predicted_tokens_per_s(one: dict[str, Any]) -> float:
    known = SAME_SHAPE.get(one["model"]) or find_known_model(one["model"])
    assert known is not None
    device = gpu_device(gpus()[one["gpus"][0]], "card", "local")
    # Some were measured on the larger of the sizes that are sold.
    cluster = make_cluster([replace(device, memory_bytes=256 * 2**30)], [])
    workload = Workload(
        prompt_tokens=8,
        output_tokens=one.get("context_tokens", 512),
        concurrency=1,
        max_context_tokens=2048,
        objective="latency",
    )
    plan = make_plan(read_model_spec(known_config(known)), cluster, workload, ("fp16",))
    return 1 / plan.estimate.tpot_s


def test_published_decode_speeds():
    errors = {
        (one["gpus"][0], one["model"], one["source"]): predicted_tokens_per_s(one) / one["tokens_per_s"] - 1
        for one in MEASURED
    }
    assert len(errors) >= 15
    assert median(abs(error) for error in errors.values()) < 0.06, errors
    outliers = {key for key, error in errors.items() if abs(error) > 0.15}
    assert outliers == {("a100-pcie-80gb", "meta-llama/Llama-2-7b-hf", "llamacpp-6017")}
