"""What the devices are asked to do."""

from dataclasses import dataclass, replace
from typing import Literal

Objective = Literal["latency", "throughput", "fewest-devices", "communication"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceLimit:
    """ε in |t − mean(t)| ≤ ε over a plan's stages: a time, or a part of the mean; the other is None."""

    seconds: float | None = None
    of_mean: float | None = None

    def epsilon_s(self, mean_s: float) -> float:
        return self.seconds if self.seconds is not None else (self.of_mean or 0.0) * mean_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`concurrency` sequences at once, each of up to `max_context_tokens`; memory is planned for all of them, or
    for `kv_tokens` at once.

    `prompt_tokens` and `output_tokens` are the typical lengths whose time is minimised. Under "latency" that is
    the time of one request alone; under "throughput" the time per output token with all sequences running;
    "fewest-devices" takes as few devices as will do, and among those the least time per output token; "communication"
    takes the least seconds on links in a decode step of all sequences, with stages that keep within `balance`.

    A plan keeps within the limits, by its own estimate: the mean time to a first token of `concurrency` requests that
    arrive together, and the time per output token while all are running.
    """

    prompt_tokens: int
    output_tokens: int
    concurrency: int
    max_context_tokens: int
    objective: Objective
    kv_tokens: int | None = None
    """Tokens of KV cache that all sequences share, by their actual lengths; None where each has room for its whole
    context."""
    kv_format: str | None = None
    """Of keys and values; None: as the weights and devices have it."""
    most_sequences: int | None = None
    """Where the planner chose the concurrency: from 1 to this."""
    window_extra_tokens: int | None = None
    """For engines whose layers with a sliding window hold the window and so many tokens more of a sequence (what they
    take in at once); None where those layers hold all of it, as here."""
    arrival_rate: float | None = None
    """Requests per second that must be served; None where sequences are given instead."""
    ttft_limit_s: float | None = None
    tpot_limit_s: float | None = None
    balance: BalanceLimit | None = None
    """Of the stages' times in a decode step of all sequences; under "communication" alone."""

    @property
    def for_speed(self) -> "Workload":
        """The same, as fast as can be where as little communication as can be is asked for."""
        if self.objective != "communication":
            return self
        return replace(self, objective="latency" if self.concurrency == 1 else "throughput", balance=None)

    @property
    def limited(self) -> bool:
        return self.ttft_limit_s is not None or self.tpot_limit_s is not None
