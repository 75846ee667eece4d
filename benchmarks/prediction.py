"""Measured against predicted time per output token of the bundled model, divided by hand in several shapes.

The rounds are interleaved, so that a drift of the machine's speed falls on all shapes alike.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from apportion.catalog.cluster_rules import emulate, make_cluster
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cli.prediction import predicted_speed
from apportion.engine.engine import Engine
from apportion.engine.timing import Timing
from apportion.probe.cpu import measure_cpu
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

ROUNDS = 5
PROMPT_IDS = tuple(range(20, 36))
OUTPUT_TOKENS = 64
SHAPES = {
    "one device": ([[1]], [8], [1.0]),
    "two stages": ([[1], [1]], [4, 4], [1.0, 1.0]),
    "three stages": ([[1], [1], [1]], [3, 3, 2], [1.0, 1.0, 1.0]),
    "group of two": ([[1, 1]], [8], [1.0, 1.0]),
    "one device at 0.5": ([[1]], [8], [0.5]),
    "stages at 1 and 0.5": ([[1], [1]], [5, 3], [1.0, 0.5]),
}


REQUEST = Request(
    id=0, prompt_ids=PROMPT_IDS, sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
)


def measured_tpot_s(plan: Plan, folder: Path) -> float:
    with Engine(plan, folder, []) as engine:
        timing = Timing()
        for event in engine.generate([REQUEST]):
            timing.record(event)
    return timing.tpot_s


def main() -> None:
    folder = resolve_model("demo", weights=True)
    model, core = read_model_spec(folder), replace(measure_cpu(2), memory_bytes=2**30)
    plans = {
        name: hand_plan(
            model,
            groups,
            layers,
            max_context_tokens=128,
            devices=[emulate(replace(core, id=f"d{i}"), speed) for i, speed in enumerate(speeds)],
        )
        for name, (groups, layers, speeds) in SHAPES.items()
    }
    plans = {
        name: replace(plan, cluster=make_cluster(plan.cluster.devices, [])) for name, plan in plans.items()
    }
    times: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(ROUNDS):
        for name, plan in plans.items():
            times[name].append(measured_tpot_s(plan, folder))
    rows = []
    for name, plan in plans.items():
        measured_s = median(times[name])
        predicted_s = predicted_speed(plan, [REQUEST]).tpot_s
        print(
            f"{name:20} measured {measured_s * 1e3:6.2f} ms ({min(times[name]) * 1e3:.2f} to"
            f" {max(times[name]) * 1e3:.2f}), predicted {predicted_s * 1e3:6.2f} ms,"
            f" ratio {measured_s / predicted_s:.2f}"
        )
        rows.append({"shape": name, "measured_tpot_s": measured_s, "predicted_tpot_s": predicted_s})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
