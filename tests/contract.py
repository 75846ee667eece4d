"""The memory contract at its limit: every device given just what is planned for it, then all sequences at once, each
to the end of its context, their prompts of random lengths."""

import json
import mmap
import os
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from plans import cpu_device, hand_plan

from apportion.catalog.model_config import read_model_spec
from apportion.engine.engine import Engine
from apportion.types.cluster import StreamSource
from apportion.types.plan import DeviceMemory, Plan
from apportion.types.request import Request, SamplingParams

SHARE = 0.05
"""A peak is at most that much of the plan's figure below it."""
HEAD_DIM = 64
_CPUS = os.cpu_count() or 1
COUNTER_ERROR_BYTES = max(32, 2 * _CPUS) * len(os.sched_getaffinity(0)) * mmap.PAGESIZE
"""How far a measured peak may be off: Linux counts a process' resident pages by CPU, and adds a CPU's to the sum once
they are max(32, 2 · CPUs) (`percpu_counter_batch`). The limit that a worker runs under is exact all the same."""


def is_within(peak_bytes: int, planned_bytes: int) -> bool:
    """Whether a measured peak is no more than planned, as far as it can be measured."""
    return peak_bytes <= planned_bytes + COUNTER_ERROR_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A Llama of random weights, divided by hand: as `hand_plan` takes `groups` and `layers`."""

    hidden_size: int
    weight_format: str
    kv_format: str = "fp32"
    vocab_rows: int = 4000
    groups: tuple[tuple[int, ...], ...] = ((1,), (3, 1))
    layers: tuple[int, ...] = (3, 5)
    concurrency: int = 16
    context_tokens: int = 256
    chunk_tokens: int = 64
    streamed: tuple[int, ...] = ()
    stream_from: StreamSource = "host memory"

    def config(self) -> dict[str, object]:
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": sum(self.layers),
            "num_attention_heads": self.hidden_size // HEAD_DIM,
            "num_key_value_heads": max(4, self.hidden_size // HEAD_DIM // 2),
            "vocab_size": self.vocab_rows,
            "max_position_embeddings": 2**16,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    planned_bytes: int
    peak_bytes: int
    planned_held_bytes: int
    """Of `planned_bytes`, all but the workspace and the buffers of messages."""
    held_bytes: int

    @property
    def ratio(self) -> float:
        return self.peak_bytes / self.planned_bytes

    @property
    def exact(self) -> bool:
        """Whether the worker holds to the byte what is planned, and comes to no more than that and its workspace. How
        much of its workspace it uses depends on the processor's kernels, and on how large steps happen to be."""
        enough = self.held_bytes <= self.peak_bytes + COUNTER_ERROR_BYTES
        return (
            enough
            and is_within(self.peak_bytes, self.planned_bytes)
            and self.held_bytes == self.planned_held_bytes
        )

    @property
    def kept(self) -> bool:
        missing_bytes = self.planned_bytes - self.peak_bytes - COUNTER_ERROR_BYTES
        return is_within(self.peak_bytes, self.planned_bytes) and missing_bytes <= self.planned_bytes * SHARE


def tight_plan(case: Case, config: Path) -> Plan:
    """Its devices have not a byte more than it takes."""
    spec = read_model_spec(config)

    def plan(memory_bytes: dict[str, int]) -> Plan:
        names = [f"d{i}" for i in range(sum(map(len, case.groups)))]
        return hand_plan(
            spec,
            case.groups,
            case.layers,
            concurrency=case.concurrency,
            max_context_tokens=case.context_tokens,
            chunk_tokens=case.chunk_tokens,
            weight_format=case.weight_format,
            activation_format="fp32",
            kv_format=case.kv_format,
            devices=[
                replace(
                    cpu_device(name, memory_bytes.get(name, 2**40)),
                    stream_from=case.stream_from,
                    stream_bytes_per_s=1e9,
                )
                for name in names
            ],
            streamed=case.streamed,
        )

    return plan({name: memory.engine_bytes for name, memory in plan({}).memory.items()})


def drive(case: Case, seed: int = 1, rounds: int = 1) -> dict[str, Held]:
    """What each device planned and came to; raises where one runs out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(case.config()))
        plan = tight_plan(case, config)
        lengths = random.Random(seed)
        with Engine(plan, config, [], random_weights=True) as engine:
            for turn in range(rounds):
                for _ in engine.generate(_requests(case, lengths, turn)):
                    pass
                assert engine.scheduler.metrics().preemptions.num_recomputes == 0
            reports = engine.collect()
    return {
        name: Held(
            planned_bytes=plan.memory[name].engine_bytes,
            peak_bytes=report.peak_bytes,
            planned_held_bytes=_held_bytes(plan.memory[name]),
            held_bytes=report.held_bytes,
        )
        for name, report in reports.items()
    }


def _held_bytes(memory: DeviceMemory) -> int:
    return memory.weights_bytes + memory.stream_buffer_bytes + memory.kv_bytes


def _requests(case: Case, lengths: random.Random, turn: int) -> list[Request]:
    requests: list[Request] = []
    for number in range(case.concurrency):
        num_prompt = lengths.randrange(1, case.context_tokens)
        prompt = tuple(lengths.randrange(case.vocab_rows) for _ in range(num_prompt))
        sampling = SamplingParams(max_tokens=case.context_tokens - num_prompt, ignore_eos=True)
        requests.append(Request(id=turn * case.concurrency + number, prompt_ids=prompt, sampling=sampling))
    return requests
