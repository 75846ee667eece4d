"""Options that are quantities: read by types/units.py, as everywhere else."""

from apportion.types import units


def tokens(text: object) -> int:
    """8192, 8k or 128k."""
    return units.parse_count(str(text))


def seconds(text: object) -> float:
    """500ms, or a number of seconds."""
    found = units.parse_seconds(str(text), bare=True)
    if found == 0:
        raise ValueError(f"'{text}' is not > 0")
    return found


def per_second(text: object) -> float:
    """2/s, 30/min, or a number per second."""
    return units.parse_per_second(str(text))
