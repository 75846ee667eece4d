"""What a plan minimises, as a sum and a maximum over its stages and links.

A stage or link j takes p_j for one whole prompt (n chunks) and d_j for one decode microbatch.

latency, one request alone: chunks follow one another through the pipeline, then o − 1 tokens one by one:
    Σ_j (p_j/n + (o−1)·d_j) + max_j (n−1)/n·p_j
throughput, R requests of o tokens in P microbatches of m = ⌈R/P⌉, per output token, where a chunk goes beside k tokens
of other sequences (p_j counts them), which is k/m of a decode step less:
    max( max_j (R·p_j + (o·P − R·n·k/m)·d_j), Σ_j ((1 + r)·p_j/n + (o − r·k/m)·d_j) ) / (R·o)
No stage can be busy for longer than the whole, and no sequence is done before its first chunk and its o tokens have
passed every stage; with r = min(o, (R−1)·n/(P+1)) of them comes a chunk of another, as P + 1 batches carry the chunks.
Source: makespan of a permutation flow shop with equal jobs, Σ s_j + (n−1)·s_max.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from apportion.types.workload import Objective, Workload

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One stage's or link's time for a whole prompt, with what goes beside its chunks, and for one decode
    microbatch."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Ways to serve a workload under throughput, in any shape of arrays: so many chunks to a prompt, sequences at once,
    and microbatches."""

    output_tokens: int
    num_chunks: IntArray
    sequences: IntArray
    microbatches: IntArray

    @property
    def beside(self) -> IntArray:
        """Sequences that decode in a step with a chunk, k above.

        Of requests that come together none decode beside the first prompt and all others beside the last: half of
        them on average. Chunks go in one batch more than the P that decode, which hides the way of results to the
        coordinator. And beside the n chunks of every prompt go no more tokens than there are to draw.
        """
        half = (self.sequences - 1) // (2 * (self.microbatches + 1))
        return np.minimum(half, self.output_tokens // self.num_chunks)

    @property
    def saved(self) -> FloatArray:
        """Of a decode step, by each chunk."""
        return self.beside / -(-self.sequences // self.microbatches)

    @property
    def others(self) -> FloatArray:
        """Of a sequence's tokens, those that come with another's chunk."""
        chunks = (self.sequences - 1) * self.num_chunks / (self.microbatches + 1)
        return np.minimum(chunks, self.output_tokens)

    @property
    def path(self) -> tuple[FloatArray, FloatArray]:
        """Weights of (prefill, decode) in the time of one sequence."""
        return (1 + self.others) / self.num_chunks, self.output_tokens - self.others * self.saved

    @property
    def occupied(self) -> tuple[FloatArray, FloatArray]:
        """In the time that all sequences occupy a stage."""
        decode = self.output_tokens * self.microbatches - self.sequences * self.num_chunks * self.saved
        return self.sequences.astype(np.float64), decode


def serving(workload: Workload, chunk_tokens: int, microbatches: int) -> Serving:
    return Serving(
        output_tokens=workload.output_tokens,
        num_chunks=np.array(-(-workload.prompt_tokens // chunk_tokens)),
        sequences=np.array(workload.concurrency),
        microbatches=np.array(microbatches),
    )


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
    way = serving(workload, chunk_tokens, microbatches)
    path, occupied = way.path, way.occupied
    return Goal(
        objective="throughput",
        path_prefill=float(path[0]),
        path_decode=float(path[1]),
        occupied_prefill=float(occupied[0]),
        occupied_decode=float(occupied[1]),
        per=concurrency * output,
    )


def least_goal(workload: Workload, chunk_tokens: int, microbatches: tuple[int, int]) -> Goal:
    """With the least coefficients that any number of microbatches from the first to the second has."""
    few, many = microbatches
    if few == many or workload.objective == "latency":
        return goal(workload, chunk_tokens, few)
    every = Serving(
        output_tokens=workload.output_tokens,
        num_chunks=np.array(-(-workload.prompt_tokens // chunk_tokens)),
        sequences=np.array(workload.concurrency),
        microbatches=np.arange(few, many + 1),
    )
    path, occupied = every.path, every.occupied
    return replace(
        goal(workload, chunk_tokens, few),
        path_prefill=float(path[0].min()),
        path_decode=float(path[1].min()),
        occupied_prefill=float(occupied[0].min()),
        occupied_decode=float(occupied[1].min()),
    )
