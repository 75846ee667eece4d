"""How much better the plan is than the usual rules, over random problems: `python benchmarks/baselines.py 500`.

One process per core; 10,000 problems take about 20 minutes of processor time. The table is docs/compare.md's.

The objective of a rule's division over the plan's, for those of its divisions that are feasible. A rule takes the
prefill chunk that is best for it; `beaten` counts where that makes it better than the plan.
"""

import json
import os
import sys
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean, quantiles

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process per core

from random_problems import random_problem

from apportion.planner.baselines.compare import RULES, baselines
from apportion.planner.build import find_division

DEFAULT_PROBLEMS = 300
LEVELS = {"median": 49, "p90": 89, "p99": 98}
"""Percentiles, as indices into the 99 cuts of a hundred."""


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_PROBLEMS
    gains: dict[str, list[float]] = {rule: [] for rule in RULES}
    best_gains: list[float] = []
    feasible = 0
    with get_context("spawn").Pool() as pool:
        for found in pool.imap(gains_of, range(number), chunksize=20):
            if found is None:
                continue
            feasible += 1
            for rule, gain in found.items():
                gains[rule].append(gain)
            if found:
                best_gains.append(min(found.values()))
    rows = {rule: summary(of_rule, feasible) for rule, of_rule in gains.items()}
    rows["best of them"] = summary(best_gains, feasible)
    print(f"{number} random problems, {feasible} of them feasible: seeds 0 to {number - 1}")
    print("| rule | feasible | mean | median | p90 | p99 | beats the plan |\n|---|---|---|---|---|---|---|")
    for rule, row in rows.items():
        figures = " | ".join(f"{row[key]:.2f}×" for key in ("mean", *LEVELS))
        print(f"| {rule} | {100 * row['feasible']:.1f} % | {figures} | {row['beaten']} |")
    print(json.dumps({"problems": number, "feasible": feasible, "rules": rows}))


def gains_of(seed: int) -> dict[str, float] | None:
    """By rule that has a division; None where the problem is not feasible."""
    ours = find_division(*random_problem(seed).parts)
    if ours is None:
        return None
    return {one.rule: one.division.value / ours.value for one in baselines(ours.problem) if one.division}


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
