"""--kv-tokens: how many tokens of KV cache all sequences share."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.types.workload import Workload

MOST = "max"
_NUMBER = re.compile(r"(\d{1,12})(%?)")


def with_kv_choice(workload: "Workload", given: str | None) -> "Workload":
    """`given` is a number of tokens, a percentage of concurrency × context, or "max", which is planned for what the
    workload takes at least and filled up afterwards. Raises UsageError."""
    from apportion.cost.service import least_kv_tokens

    if given is None:
        return workload
    if given == MOST:
        return replace(workload, kv_tokens=least_kv_tokens(workload))
    number = _NUMBER.fullmatch(given)
    if number is None or int(number[1]) == 0:
        raise UsageError(
            f"--kv-tokens '{given}' is not a number of tokens, a percentage or {MOST}, like 8192 or 50%"
        )
    if not number[2]:
        return replace(workload, kv_tokens=int(number[1]))
    if workload.arrival_rate is not None:
        raise UsageError(
            f"--kv-tokens {given} is of --concurrency × --context, and --arrival-rate leaves the concurrency open;"
            f" give a number of tokens, or {MOST}"
        )
    return replace(
        workload, kv_tokens=workload.concurrency * workload.max_context_tokens * int(number[1]) // 100
    )


def typical_tokens(given: str | None, concurrency: int, context: int) -> int:
    """Most tokens that a typical request can have by default, where so few are shared."""
    number = _NUMBER.fullmatch(given or "")
    if number is None:
        return context
    share = context * int(number[1]) // 100 if number[2] else int(number[1]) // concurrency
    return max(2, min(context, share))
