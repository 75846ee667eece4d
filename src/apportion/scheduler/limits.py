"""How much the scheduler may have running at once."""

from dataclasses import dataclass

from apportion.types.plan import Plan, most_step_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    num_kv_blocks: int
    block_tokens: int
    max_sequences: int
    max_context_tokens: int
    microbatches: int
    """Into so many batches the running sequences are divided for decoding."""
    max_in_flight: int
    chunk_tokens: int
    """Most prompt tokens in one batch, beside its decode tokens."""
    num_swap_blocks: int = 0

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that can run."""
        return min(self.max_context_tokens, self.num_kv_blocks * self.block_tokens)

    @property
    def step_tokens(self) -> int:
        """Most tokens in one batch."""
        return most_step_tokens(self.chunk_tokens, self.max_sequences)

    @staticmethod
    def of(plan: Plan) -> "SchedulerLimits":
        return SchedulerLimits(
            num_kv_blocks=plan.num_kv_blocks,
            block_tokens=plan.block_tokens,
            max_sequences=plan.workload.concurrency,
            max_context_tokens=plan.workload.max_context_tokens,
            microbatches=plan.microbatches,
            max_in_flight=plan.max_in_flight,
            chunk_tokens=plan.chunk_tokens,
            num_swap_blocks=plan.num_swap_blocks,
        )
