"""What a plan minimises, as a sum and a maximum over its stages and links.

A stage or link j takes p_j for one whole prompt (n chunks) and d_j for one decode microbatch.

latency, one request alone: chunks follow one another through the pipeline, then o − 1 tokens one by one:
    Σ_j (p_j/n + (o−1)·d_j) + max_j (n−1)/n·p_j
throughput, R requests of o tokens in P microbatches, per output token:
    max( max_j (R·p_j + o·P·d_j), Σ_j (p_j/n + o·d_j) ) / (R·o)
No stage can be busy for longer than the whole, and no sequence is done before its first chunk and its tokens
have passed every stage; its later chunks are in the busy times.
Source: makespan of a permutation flow shop with equal jobs, Σ s_j + (n−1)·s_max.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from apportion.types.workload import Objective, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One stage's or link's time for a whole prompt and for one decode microbatch."""

    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """An objective's coefficients: a stage or link adds `path_s` to the sum, `occupied_s` to the maximum."""

    objective: Objective
    path_prefill: float
    path_decode: float
    occupied_prefill: float
    occupied_decode: float
    per: float
    """The value is divided by this many output tokens (1 for latency)."""

    def path_s(self, timing: Timing) -> float:
        return self.path_prefill * timing.prefill_s + self.path_decode * timing.decode_s

    def occupied_s(self, timing: Timing) -> float:
        return self.occupied_prefill * timing.prefill_s + self.occupied_decode * timing.decode_s

    def combine(self, path_s: float, occupied_s: float) -> float:
        if self.objective == "latency":
            return path_s + occupied_s
        return max(path_s, occupied_s) / self.per

    def value(self, timings: Sequence[Timing]) -> float:
        path_s = sum(self.path_s(timing) for timing in timings)
        return self.combine(path_s, max(self.occupied_s(timing) for timing in timings))

    @property
    def stage_weights(self) -> tuple[float, float]:
        """Weights of (prefill, decode) in what one stage contributes where it is alone or the bottleneck."""
        if self.objective == "latency":
            return self.path_prefill + self.occupied_prefill, self.path_decode + self.occupied_decode
        return self.occupied_prefill, self.occupied_decode


def microbatch_sequences(concurrency: int, microbatches: int) -> int:
    return -(-concurrency // microbatches)


def goal(workload: Workload, chunk_tokens: int, microbatches: int) -> Goal:
    num_chunks = -(-workload.prompt_tokens // chunk_tokens)
    output, concurrency = workload.output_tokens, workload.concurrency
    if workload.objective == "latency":
        return Goal(
            objective="latency",
            path_prefill=1 / num_chunks,
            path_decode=output - 1,
            occupied_prefill=(num_chunks - 1) / num_chunks,
            occupied_decode=0.0,
            per=1.0,
        )
    return Goal(
        objective="throughput",
        path_prefill=1 / num_chunks,
        path_decode=output,
        occupied_prefill=concurrency,
        occupied_decode=output * microbatches,
        per=concurrency * output,
    )
