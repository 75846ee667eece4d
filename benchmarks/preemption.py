"""Seconds of swapping and of computing anew, measured against the cost model that chooses between them.

Two emulated devices, a stage each, and too few KV blocks for all sequences. Swapping: what the device that is slowest
at it books. Computing anew: what the busiest stage computes for longer than when it swaps. Rounds are interleaved.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from apportion.catalog.cluster_text import parse_devices
from apportion.catalog.model_config import read_model_spec
from apportion.cost.memory import plan_memory, with_swap_space
from apportion.engine.engine import Engine
from apportion.probe.local import all_local_devices
from apportion.types.metrics import PreemptionCounts
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams
from apportion.types.step_costs import PreemptMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from contract import Case
from plans import hand_plan

CASE = Case(hidden_size=512, weight_format="fp32", layers=(4, 4), groups=((1,), (1,)), vocab_rows=8000)
SEQUENCES, PROMPT, OUTPUT = 8, 160, 96
BLOCK_TOKENS, NUM_BLOCKS = 16, 64
ROUNDS = 5


def make_plan(config: Path) -> Plan:
    """With half the blocks that all sequences take."""
    devices = parse_devices("d0=cpu:400MiB, d1=cpu:400MiB", all_local_devices).devices
    plan = hand_plan(
        read_model_spec(config),
        CASE.groups,
        CASE.layers,
        concurrency=SEQUENCES,
        max_context_tokens=PROMPT + OUTPUT,
        chunk_tokens=64,
        devices=[replace(device, num_threads=1) for device in devices],
    )
    plan = replace(plan, block_tokens=BLOCK_TOKENS, num_kv_blocks=NUM_BLOCKS)
    return with_swap_space(replace(plan, memory=plan_memory(plan)), 2**26)


def run(plan: Plan, config: Path, mode: PreemptMode) -> tuple[PreemptionCounts, float, float]:
    """Counts, the most seconds that any worker swapped, and the most that any computed."""
    sampling = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    requests = [
        Request(id=i, prompt_ids=tuple((i * 37 + j * 11) % 7000 for j in range(PROMPT)), sampling=sampling)
        for i in range(SEQUENCES)
    ]
    with Engine(plan, config, [], random_weights=True, preempt=mode) as engine:
        for _ in engine.generate(requests):
            pass
        reports = engine.collect().values()
        counts = engine.scheduler.metrics().preemptions
    return counts, max(r.use_s["swap"] for r in reports), max(r.use_s["compute"] for r in reports)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CASE.config()))
        plan = make_plan(config)
        swaps, anew = [], []
        for _ in range(ROUNDS):
            counts, swap_s, least_s = run(plan, config, "swap")
            swaps.append((counts.num_swaps, counts.swapped_bytes, counts.swap_s, swap_s))
            counts, _, computed_s = run(plan, config, "recompute")
            row = (counts.num_recomputes, counts.recomputed_tokens, counts.recompute_s, computed_s - least_s)
            anew.append(row)
    for name, rows in (("swapped", swaps), ("computed anew", anew)):
        number, amount, predicted_s, measured_s = (median(column) for column in zip(*rows, strict=True))
        print(
            f"{name}: {number} sequences, {amount} {'bytes' if name == 'swapped' else 'tokens'}, predicted"
            f" {predicted_s * 1e3:.1f} ms, measured {measured_s * 1e3:.1f} ms, ratio {measured_s / predicted_s:.2f}"
        )


if __name__ == "__main__":
    main()
