"""How much better the plan is than the usual rules, over random problems: `python benchmarks/baselines.py 500`.

The objective of a rule's division over the plan's, for those of its divisions that are feasible. A rule takes the
prefill chunk that is best for it; `beaten` counts where that makes it better than the plan.
"""

import json
import sys
from pathlib import Path
from statistics import geometric_mean, quantiles

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_problems import random_problem

from apportion.planner.baselines import RULES, baselines
from apportion.planner.build import find_division

DEFAULT_PROBLEMS = 300
LEVELS = {"median": 49, "p90": 89, "p99": 98}
"""Percentiles, as indices into the 99 cuts of a hundred."""


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PROBLEMS
    gains: dict[str, list[float]] = {rule: [] for rule in RULES}
    best_gains: list[float] = []
    feasible = 0
    for seed in range(number):
        problem = random_problem(seed)
        ours = find_division(*problem.parts)
        if ours is None:
            continue
        feasible += 1
        found = {one.rule: one.division.value / ours.value for one in baselines(ours.problem) if one.division}
        for rule, gain in found.items():
            gains[rule].append(gain)
        if found:
            best_gains.append(min(found.values()))
    rows = {rule: summary(of_rule, feasible) for rule, of_rule in gains.items()}
    rows["best of them"] = summary(best_gains, feasible)
    print(f"{number} random problems, {feasible} of them feasible: seeds 0 to {number - 1}")
    print(f"{'rule':14}{'feasible':>9}{'mean':>8}{'median':>8}{'p90':>8}{'p99':>8}{'beaten':>8}")
    for rule, row in rows.items():
        figures = "".join(f"{row[key]:7.2f}×" for key in ("mean", *LEVELS))
        print(f"{rule:14}{row['feasible']:9.1%}{figures}{row['beaten']:8}")
    print(json.dumps({"problems": number, "feasible": feasible, "rules": rows}))


def summary(gains: list[float], problems: int) -> dict[str, float]:
    cuts = quantiles(gains, n=100)
    return {
        "feasible": len(gains) / problems,
        "mean": geometric_mean(gains),
        **{name: cuts[index] for name, index in LEVELS.items()},
        "beaten": sum(gain < 1 - 1e-9 for gain in gains),
    }


if __name__ == "__main__":
    main()
