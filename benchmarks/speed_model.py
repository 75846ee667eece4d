"""What the speed scripts share: the model that is timed, devices of one core, engines kept running side by side, and
ratios of medians over interleaved rounds.

The model has a llama's shape: hidden 1024, 24 layers, 16 query and 8 KV heads, FFN 2816, vocabulary 32000 (0.35 B
parameters), with random weights. A device is one process with one thread on one core.
"""

import json
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import median

from apportion.catalog.cluster_rules import emulate, make_cluster
from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.engine.timing import Timing
from apportion.planner.build import make_plan
from apportion.probe.cpu import measure_cpu, read_bytes_per_s
from apportion.probe.processor import cpu_model
from apportion.types.cluster import Device
from apportion.types.model import ModelSpec
from apportion.types.plan import Plan
from apportion.types.request import Request, SamplingParams
from apportion.types.workload import Objective, Workload

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plans import hand_plan

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
DEVICE_BYTES = 6 * 2**30


@cache
def config_file() -> Path:
    file = Path(tempfile.mkdtemp(prefix="apportion-speed-")) / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


@cache
def model() -> ModelSpec:
    return read_model_spec(config_file())


@cache
def _core() -> Device:
    return replace(measure_cpu(2), memory_bytes=DEVICE_BYTES, num_threads=1)


def devices(*speeds: float) -> list[Device]:
    return [emulate(replace(_core(), id=f"d{i}"), speed) for i, speed in enumerate(speeds)]


def planned(
    members: Sequence[Device],
    *,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    objective: Objective = "throughput",
    weight_format: str = "fp32",
) -> Plan:
    """The planner's own division."""
    workload = Workload(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        max_context_tokens=prompt_tokens + output_tokens,
        objective=objective,
    )
    return make_plan(model(), make_cluster(members, []), workload, (weight_format,))


def by_hand(
    groups: Sequence[Sequence[int]],
    layers: Sequence[int],
    members: Sequence[Device],
    *,
    concurrency: int,
    context: int,
    microbatches: int | None = None,
    chunk_tokens: int = 128,
    weight_format: str = "fp32",
) -> Plan:
    plan = hand_plan(
        model(),
        groups,
        layers,
        concurrency=concurrency,
        max_context_tokens=context,
        chunk_tokens=chunk_tokens,
        microbatches=microbatches,
        weight_format=weight_format,
        activation_format="fp32",
        kv_format="fp32",
        devices=members,
    )
    return replace(plan, cluster=make_cluster(members, []))


class Engines:
    """Engines of several plans at once: those that are not asked for anything wait without computing."""

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self._plans = plans
        self._exit = ExitStack()
        self._next_id = 0

    def __enter__(self) -> "Engines":
        self._engines = {
            name: self._exit.enter_context(Engine(plan, config_file(), [], random_weights=True))
            for name, plan in self._plans.items()
        }
        for name, engine in self._engines.items():
            self.run(name, 1, 4, 2)
            print(f"{name}: {division(engine.plan)}", flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.__exit__(None, None, None)

    def engine(self, name: str) -> Engine:
        return self._engines[name]

    def run(self, name: str, num: int, prompt_tokens: int, output_tokens: int) -> Timing:
        requests = []
        for _ in range(num):
            draw = random.Random(self._next_id)
            prompt = tuple(draw.randrange(model().vocab_rows) for _ in range(prompt_tokens))
            sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
            requests.append(Request(id=self._next_id, prompt_ids=prompt, sampling=sampling))
            self._next_id += 1
        timing = Timing()
        for event in self._engines[name].generate(requests):
            timing.record(event)
        return timing

    def decode(self, name: str, num: int, output_tokens: int, prompt_tokens: int = 8) -> float:
        """Tokens per second of all `num` sequences together, while all of them draw."""
        return self.run(name, num, prompt_tokens, output_tokens).decode_tokens_per_s

    def prefill(self, name: str, prompt_tokens: int) -> float:
        """Tokens per second of one prompt, until its first token."""
        return prompt_tokens / self.run(name, 1, prompt_tokens, 1).ttft_s


def division(plan: Plan) -> str:
    stages = [f"{stage.num_layers} layers on " + "+".join(stage.split.device_ids) for stage in plan.stages]
    return (
        f"{', '.join(stages)}; {plan.stages[0].weight_format}, {plan.microbatches} microbatches,"
        f" chunks of {plan.chunk_tokens}"
    )


def medians(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of every case, over interleaved rounds, so that a drift of the machine's speed falls on all alike."""
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, measure in cases.items():
            seen[name].append(measure())
    for name, values in seen.items():
        print(f"{name}: {median(values):.1f} ({min(values):.1f} to {max(values):.1f})", flush=True)
    return {name: median(values) for name, values in seen.items()}


def ratio(label: str, value: float, target: float) -> None:
    print(f"=> {label}: {value:.2f} (target {target:g})", flush=True)


def memory_ceiling() -> None:
    """The most that a second device can add where reading weights is all the work."""
    one, two = (median(read_bytes_per_s(cores) for _ in range(3)) for cores in (1, 2))
    print(
        f"one core reads {one / 1e9:.0f} GB/s, two together {two / 1e9:.0f}: {two / one:.2f} times",
        flush=True,
    )


def heading(title: str) -> None:
    print(f"{title} · {datetime.now(UTC):%Y-%m-%d} · {cpu_model()}, {platform.system()}", flush=True)
