"""Measured against predicted TPOT and throughput on divisions that were not calibrated on: calibration sees the model
undivided, alone and 16 at once; the others are predicted from that."""

from dataclasses import replace

from speed_model import Engines, by_hand, devices, heading, model

from apportion.calibrate.apply import apply
from apportion.calibrate.observation import PHASES, Observation, observe
from apportion.cli.bench_choices import Lengths
from apportion.cli.bench_levels import Bench, Round, level
from apportion.probe.hardware import hardware_names
from apportion.types.plan import Plan

LENGTHS = Lengths(prompt_tokens=32, output_tokens=12)
CONTEXT = LENGTHS.prompt_tokens + LENGTHS.output_tokens
SEEN = ("whole",)
LEVELS = {"whole": (1, 16), "two stages": (1, 16, 32), "group of two": (1,)}
ROUNDS = 3


def plans() -> dict[str, Plan]:
    shape = {"context": CONTEXT, "chunk_tokens": 64}
    return {
        "whole": by_hand([[1]], [24], devices(1), concurrency=16, **shape),
        "two stages": by_hand([[1], [1]], [13, 11], devices(1, 1), concurrency=32, **shape),
        "group of two": by_hand([[1, 1]], [24], devices(1, 1), concurrency=1, **shape),
    }


def observations(plan: Plan, one: Round, run: str) -> tuple[Observation, ...]:
    work = {name: {phase: report.phase(phase) for phase in PHASES} for name, report in one.reports.items()}
    alone_tpot_s = one.timing.tpot_s if one.concurrency == 1 else None
    return observe(plan, work, hardware_names(plan.cluster), run=run, alone_tpot_s=alone_tpot_s)


def main() -> None:
    heading(f"Predicted and measured, fp32, prompts of {LENGTHS.prompt_tokens}")
    all_plans = plans()
    rounds: dict[tuple[str, int], list[Round]] = {}
    with Engines(all_plans) as engines:
        benches = {name: Bench(engines.engine(name), LENGTHS, lambda: None) for name in all_plans}
        for _ in range(ROUNDS):
            for name, bench in benches.items():
                for num in LEVELS[name]:
                    rounds.setdefault((name, num), []).append(bench.round(num))
    seen = [
        observation
        for (name, _), measured in rounds.items()
        if name in SEEN
        for index, one in enumerate(measured)
        for observation in observations(all_plans[name], one, str(index))
    ]
    worst = 0.0
    for (name, num), measured in rounds.items():
        plan = all_plans[name]
        names = hardware_names(plan.cluster)
        calibrated = replace(plan, cluster=apply(plan.cluster, seen, ("fp32",), names).cluster)
        result = level(calibrated, measured, LENGTHS, dict.fromkeys(plan.device_ids, 1.0))
        tpot = result.measured.tpot_s / result.predicted.tpot_s
        rate = result.measured.tokens_per_s / result.predicted.tokens_per_s
        known = name in SEEN
        worst = worst if known else max(worst, abs(tpot - 1), abs(rate - 1))
        print(
            f"{name}, {num} at once{' (calibrated on)' if known else ''}: TPOT {result.measured.tpot_s * 1e3:.1f} ms,"
            f" ×{tpot:.2f} of the prediction; {result.measured.tokens_per_s:.1f} tokens/s, ×{rate:.2f}"
        )
    print(
        f"=> worst deviation where not calibrated on: {worst:.0%} (target 15%), model of {model().num_layers} layers"
    )


if __name__ == "__main__":
    main()
