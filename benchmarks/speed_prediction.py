"""Measured against predicted TPOT and throughput on divisions that were not calibrated on. In every round calibration
sees what the host's memory gives to all cores and the model undivided, alone and 16 at once; the others are predicted
from that."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from speed_model import Engines, by_hand, devices, heading, model

from apportion.calibrate.apply import apply
from apportion.calibrate.observation import PHASES, Observation, observe
from apportion.cli.bench_choices import Lengths
from apportion.cli.bench_levels import Bench, Round, level
from apportion.probe.cpu import read_bytes_per_s
from apportion.probe.hardware import hardware_names
from apportion.types.plan import Plan

LENGTHS = Lengths(prompt_tokens=32, output_tokens=12)
CONTEXT = LENGTHS.prompt_tokens + LENGTHS.output_tokens
SEEN = ("whole",)
LEVELS = {"whole": (1, 16), "two stages": (1, 16, 32), "group of two": (1,)}
ROUNDS = 5
Case = tuple[str, int]
Ratios = tuple[float, float]
"""Measured to predicted TPOT and tokens/s."""


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


def as_seen(plan: Plan, seen: Sequence[Observation], host_bytes_per_s: float) -> Plan:
    """Calibrated by these, on a host whose memory gives that much to all."""
    shared = tuple(replace(device, host_bytes_per_s=host_bytes_per_s) for device in plan.cluster.devices)
    cluster = replace(plan.cluster, devices=shared)
    return replace(plan, cluster=apply(cluster, seen, ("fp32",), hardware_names(cluster)).cluster)


def one_round(benches: Mapping[str, Bench], all_plans: Mapping[str, Plan], number: int) -> dict[Case, Ratios]:
    host_bytes_per_s = read_bytes_per_s(2)
    print(f"round {number}: both cores read {host_bytes_per_s / 1e9:.0f} GB/s", flush=True)
    rounds = {(name, num): bench.round(num) for name, bench in benches.items() for num in LEVELS[name]}
    seen = [
        observation
        for (name, num), one in rounds.items()
        if name in SEEN
        for observation in observations(all_plans[name], one, str(num))
    ]
    return {
        (name, num): ratios(as_seen(all_plans[name], seen, host_bytes_per_s), one)
        for (name, num), one in rounds.items()
    }


def ratios(plan: Plan, one: Round) -> Ratios:
    result = level(plan, [one], LENGTHS, dict.fromkeys(plan.device_ids, 1.0))
    measured, predicted = result.measured, result.predicted
    return measured.tpot_s / predicted.tpot_s, measured.tokens_per_s / predicted.tokens_per_s


def main() -> None:
    heading(
        f"Predicted and measured, fp32, prompts of {LENGTHS.prompt_tokens}, model of {model().num_layers} layers"
    )
    all_plans = plans()
    with Engines(all_plans) as engines:
        benches = {name: Bench(engines.engine(name), LENGTHS, lambda: None) for name in all_plans}
        seen = [one_round(benches, all_plans, number) for number in range(ROUNDS)]
    worst = 0.0
    for name, num in seen[0]:
        tpots, rates = zip(*(one[name, num] for one in seen), strict=True)
        tpot, rate = median(tpots), median(rates)
        known = name in SEEN
        worst = worst if known else max(worst, abs(tpot - 1), abs(rate - 1))
        print(
            f"{name}, {num} at once{' (calibrated on)' if known else ''}, measured / predicted: "
            f"TPOT {tpot:.2f} ({min(tpots):.2f} to {max(tpots):.2f}), "
            f"tokens/s {rate:.2f} ({min(rates):.2f} to {max(rates):.2f})"
        )
    print(f"=> worst deviation where not calibrated on: {worst:.0%} (target 15%)")


if __name__ == "__main__":
    main()
