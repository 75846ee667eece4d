"""Calibrates on the bundled model undivided, then predicts other divisions of it: measured against predicted time per
output token, before and after. Rounds are interleaved, so that a drift of the machine's speed falls on all alike.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from apportion.calibrate.apply import apply
from apportion.calibrate.observation import PHASES, Observation, observe
from apportion.catalog.cluster_rules import make_cluster
from apportion.catalog.hub import resolve_model
from apportion.catalog.model_config import read_model_spec
from apportion.cli.prediction import predicted_speed
from apportion.engine.engine import Engine
from apportion.engine.timing import Timing
from apportion.probe.cpu import measure_cpu
from apportion.probe.hardware import hardware_names
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

ROUNDS = 4
PROMPT_IDS = tuple(range(20, 84))
OUTPUT_TOKENS = 64
WHOLE, GROUP = "whole", "group of two"
SHAPES = {
    WHOLE: ([[1]], [8]),
    "two stages": ([[1], [1]], [4, 4]),
    "three stages": ([[1], [1], [1]], [3, 3, 2]),
    GROUP: ([[1, 1]], [8]),
    "group of 3:1": ([[3, 1]], [8]),
}
REQUEST = Request(
    id=0, prompt_ids=PROMPT_IDS, sampling=SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
)


def measure(plan: Plan, folder: Path, run: str) -> tuple[float, float, tuple[Observation, ...]]:
    """(TPOT, TTFT, what the run tells)."""
    with Engine(plan, folder, []) as engine:
        timing = Timing()
        for event in engine.generate([REQUEST]):
            timing.record(event)
    work = {name: {phase: report.phase(phase) for phase in PHASES} for name, report in engine.reports.items()}
    seen = observe(plan, work, hardware_names(plan.cluster), run=run, alone_tpot_s=timing.tpot_s)
    return timing.tpot_s, timing.ttft_s, seen


def predicted(plan: Plan, seen: list[Observation]) -> tuple[float, float]:
    cluster = apply(plan.cluster, seen, ("fp32",), hardware_names(plan.cluster)).cluster
    speed = predicted_speed(replace(plan, cluster=cluster), [REQUEST])
    return speed.tpot_s, speed.ttft_s


def main() -> None:
    folder = resolve_model("demo", weights=True)
    model, core = read_model_spec(folder), replace(measure_cpu(2), memory_bytes=2**30)
    plans = {
        name: hand_plan(
            model,
            groups,
            layers,
            max_context_tokens=160,
            chunk_tokens=64,
            devices=[replace(core, id=f"d{i}") for i in range(sum(map(len, groups)))],
        )
        for name, (groups, layers) in SHAPES.items()
    }
    plans = {
        name: replace(plan, cluster=make_cluster(plan.cluster.devices, [])) for name, plan in plans.items()
    }
    tpot_s: dict[str, list[float]] = {name: [] for name in plans}
    ttft_s: dict[str, list[float]] = {name: [] for name in plans}
    seen: dict[str, list[Observation]] = {name: [] for name in plans}
    for i in range(ROUNDS):
        for name, plan in plans.items():
            token_s, first_s, observations = measure(plan, folder, str(i))
            tpot_s[name].append(token_s)
            ttft_s[name].append(first_s)
            seen[name] += observations
    rows = []
    fits = {"before": [], "whole": seen[WHOLE], "whole and group": seen[WHOLE] + seen[GROUP]}
    for name, plan in plans.items():
        row: dict[str, object] = {"shape": name, "measured_tpot_s": median(tpot_s[name])}
        line = f"{name:14} {median(tpot_s[name]) * 1e3:6.2f} ms a token, {median(ttft_s[name]) * 1e3:6.2f} to the first"
        for fit, observations in fits.items():
            token_s, first_s = predicted(plan, observations)
            row[fit] = {"tpot": median(tpot_s[name]) / token_s, "ttft": median(ttft_s[name]) / first_s}
            line += f" | {fit}: {median(tpot_s[name]) / token_s:.2f} {median(ttft_s[name]) / first_s:.2f}"
        print(line)
        rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
