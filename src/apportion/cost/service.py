"""Requests per second and Little's law: sequences in flight = rate × time in the system (Little, 1961).

With R sequences always running and v seconds per output token (the throughput objective), R requests of o tokens each
leave every R·o·v seconds. So each is in the system for W = R·o·v, and 1/(o·v) a second are served. An arrival rate of λ
needs R ≥ λ·W sequences, which is the same as λ ≤ 1/(o·v).
"""

from apportion.types.errors import UsageError
from apportion.types.plan import Estimate
from apportion.types.workload import Workload

ROUNDING = 1 + 1e-9


def served_per_s(workload: Workload, value_s: float) -> float:
    """Requests per second; `value_s` is the time per output token with all sequences running."""
    return 1 / (workload.output_tokens * value_s)


def slowest_s(workload: Workload, rate: float) -> float:
    """The most seconds per output token with which so many requests a second are served."""
    return 1 / (workload.output_tokens * rate)


def system_s(workload: Workload, value_s: float) -> float:
    """A request's time in the system with all sequences running."""
    return workload.concurrency / served_per_s(workload, value_s)


def tokens_per_request(workload: Workload) -> int:
    """Most tokens of KV that a typical request holds."""
    return workload.prompt_tokens + workload.output_tokens


def least_kv_tokens(workload: Workload) -> int:
    """One sequence at its full context, and all of them at a typical request's: what is in flight by Little's law."""
    return max(workload.max_context_tokens, workload.concurrency * tokens_per_request(workload))


def holds_requests(workload: Workload) -> bool:
    return workload.kv_tokens is None or workload.kv_tokens >= least_kv_tokens(workload)


def check_kv_tokens(workload: Workload) -> None:
    """Raises UsageError where the KV cache asked for is less than the least."""
    if holds_requests(workload):
        return
    raise UsageError(
        f"--kv-tokens {workload.kv_tokens} is less than {least_kv_tokens(workload)}, which one sequence of --context"
        f" {workload.max_context_tokens}, or typical requests ({workload.concurrency} ×"
        f" {tokens_per_request(workload)} tokens), take; give more, or lower --context, --concurrency, --prompt-tokens"
        " or --output-tokens"
    )


def within_limits(workload: Workload, figures: Estimate) -> bool:
    ttft, tpot = workload.ttft_limit_s, workload.tpot_limit_s
    return (ttft is None or figures.ttft_s <= ttft * ROUNDING) and (
        tpot is None or figures.tpot_s <= tpot * ROUNDING
    )
