"""--kv-tokens: how many tokens of KV cache all sequences share."""

from dataclasses import replace
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError
from apportion.types.units import check_point, parse_count, parse_share

if TYPE_CHECKING:
    from apportion.types.workload import Workload

MOST = "max"


def with_kv_choice(workload: "Workload", given: str | None) -> "Workload":
    """`given` is a number of tokens, a percentage of concurrency × context, or "max", which is planned for what the
    workload takes at least and filled up afterwards. Raises UsageError."""
    from apportion.cost.service import least_kv_tokens

    if given is None:
        return workload
    if given == MOST:
        return replace(workload, kv_tokens=least_kv_tokens(workload))
    number, is_share = _number(given)
    if not is_share:
        return replace(workload, kv_tokens=int(number))
    if workload.arrival_rate is not None:
        raise UsageError(
            f"--kv-tokens {given} is of --concurrency × --context, and --arrival-rate leaves the concurrency open;"
            f" give a number of tokens, or {MOST}"
        )
    return replace(workload, kv_tokens=_part(workload.concurrency * workload.max_context_tokens, number))


def typical_tokens(given: str | None, concurrency: int, context: int) -> int:
    """Most tokens that a typical request can have by default, where so few are shared."""
    if given is None or given == MOST:
        return context
    number, is_share = _number(given)
    share = _part(context, number) if is_share else int(number) // concurrency
    return max(2, min(context, share))


def _part(tokens: int, share: float) -> int:
    """Whole percentages of whole tokens come out whole."""
    return int(tokens * share + 1e-6)


def _number(given: str) -> tuple[float, bool]:
    """And whether it is a share. Raises UsageError."""
    is_share = given.strip().endswith("%")
    try:
        check_point(given)
    except ValueError as error:
        raise UsageError(f"--kv-tokens: {error}") from None
    try:
        number = parse_share(given) if is_share else parse_count(given)
    except ValueError:
        number = 0
    if number == 0:
        raise UsageError(
            f"--kv-tokens '{given}' is not a number of tokens, a percentage or {MOST}, like 8192, 8k or 50%"
        )
    return number, is_share
