"""--balance: how far the times of a plan's stages may be from their mean."""

import re
from typing import TYPE_CHECKING

from apportion.types.errors import UsageError

if TYPE_CHECKING:
    from apportion.types.workload import BalanceLimit

_PERCENTAGE = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?)\s*%\s*")


def balance_limit(given: str | None, objective: str) -> "BalanceLimit | None":
    """Raises UsageError for what is no tolerance, and for other objectives than communication."""
    from apportion.types.units import check_point, parse_seconds
    from apportion.types.workload import BalanceLimit

    if given is None:
        return None
    try:
        check_point(given)
    except ValueError as error:
        raise UsageError(f"--balance: {error}") from None
    percentage = _PERCENTAGE.fullmatch(given)
    try:
        number = float(percentage[1]) / 100 if percentage else parse_seconds(given)
    except ValueError:
        raise UsageError(
            f"--balance '{given}' is no percentage of the mean and no time; write 5% or 20ms"
        ) from None
    if number == 0:
        raise UsageError(
            f"--balance {given} leaves no room: stages of whole layers never take exactly as long; write more, like 5%"
        )
    if objective != "communication":
        raise UsageError(
            f"--balance {given} goes with --objective communication, not {objective}: add that, or leave it out"
        )
    return BalanceLimit(of_mean=number) if percentage else BalanceLimit(seconds=number)
