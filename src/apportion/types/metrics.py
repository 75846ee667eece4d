"""What the scheduler counts."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class PreemptionCounts:
    """Seconds are the cost model's, bytes those of all devices together."""

    num_swaps: int = 0
    num_recomputes: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    swapped_bytes: int = 0
    swap_s: float = 0.0
    recomputed_tokens: int = 0
    """Computed before, dropped, and not found in the prefix cache when the sequence came back."""
    recompute_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerMetrics:
    """The first six are of now, the others since the start."""

    num_waiting: int
    num_running: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int
    """Neither used nor cached."""
    saved_blocks: int
    """What the tables would need more without sharing."""
    wasted_tokens: int
    """Positions in the blocks of running sequences that hold nothing, less than a block each."""
    peak_used_blocks: int
    peak_saved_blocks: int
    copied_blocks: int
    """Written to while shared, and so copied first."""
    evicted_blocks: int
    cached_tokens: int
    """Of prompts, found in the prefix cache."""
    preemptions: PreemptionCounts
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of the drafted ones, those that were drawn."""
