"""What the scheduler weighs its choices by, and how it may preempt."""

from dataclasses import dataclass
from typing import Literal

PreemptMode = Literal["auto", "swap", "recompute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds, each on the stage that takes longest over it; only their ratios matter for balance."""

    decode_token_s: float
    """One sequence more in a decode step, but for its context."""
    context_token_s: float
    """One position more that a decoding sequence attends to."""
    prefill_token_s: float
    """One token of a full chunk."""
    swap_block_s: float
    """One block between device and host, one way."""
    block_bytes: int
    """KV of a block, added up over all devices."""
    prefill_depth: int
    """Chunks in flight that keep the slowest stage busy: all stages' times over the slowest one's, rounded up."""

    def recompute_s(self, num_tokens: int) -> float:
        """A sequence's first `num_tokens` anew; each attends to those before it."""
        return num_tokens * self.prefill_token_s + num_tokens**2 / 2 * self.context_token_s

    def decode_s(self, num_tokens: int) -> float:
        """What a sequence of that length adds to a decode step."""
        return self.decode_token_s + num_tokens * self.context_token_s


def even_costs(num_stages: int) -> StepCosts:
    """Where nothing is known: every sequence weighs the same, equal stages, and nothing speaks for swapping."""
    return StepCosts(
        decode_token_s=1.0,
        context_token_s=0.0,
        prefill_token_s=1.0,
        swap_block_s=float("inf"),
        block_bytes=0,
        prefill_depth=num_stages,
    )
