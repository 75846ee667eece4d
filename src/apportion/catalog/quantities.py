"""Bandwidths and durations as people write them: "1Gbit", "25GB/s", "0.3ms". Decimal prefixes, as on datasheets."""

import re
from math import isfinite

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(bit(?:/s|ps)?|B/s)", re.IGNORECASE)
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|ms|us|µs|ns)")


def parse_bandwidth(text: str) -> float:
    """Bytes per second. Raises ValueError for anything that is not a positive bandwidth."""
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not like 1Gbit or 25GB/s")
    per_s = float(match[1]) * _PREFIXES[match[2].lower()]
    bytes_per_s = per_s / 8 if match[3].lower().startswith("bit") else per_s
    if not isfinite(bytes_per_s) or bytes_per_s <= 0:
        raise ValueError(f"'{text}' is not > 0")
    return bytes_per_s


def parse_seconds(text: str) -> float:
    """Raises ValueError for anything that is not a duration ≥ 0."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or not isfinite(float(match[1])):
        raise ValueError(f"'{text}' is not like 0.3ms or 300us")
    return float(match[1]) * _SECONDS[match[2]]
