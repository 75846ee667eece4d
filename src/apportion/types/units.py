"""Bytes and seconds as people write them. Binary prefixes: 1 KiB = 1024 bytes, and `K`, `M`, `G` mean the same."""

import re
from math import floor, log10

BYTE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)

FORMAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of one element, by the formats that activations, keys and values can have."""
KV_BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "q8_0": 8.5,
    "fp8": 8.0,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
"""Of one element of a key or value, widest first. Those by blocks of 32 count their scales (ggml's block sizes); fp8
has one scale for a whole cache."""
WEIGHT_BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "int4": 4.5}
"""Of one element, by weight format, widest first; cost/formats.py says what comes beside."""


def parse_bytes(text: str) -> int:
    """`"600MiB"` -> 629145600. Raises ValueError for anything that is not a positive size."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size; write it like 600MiB or 12GiB")
    size_bytes = round(float(match[1]) * BYTE_UNITS[match[2].lower()])
    if size_bytes <= 0:
        raise ValueError(f"'{text}' is not a positive size")
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """629145600 -> `"600.0 MiB"`."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """0.00213 -> `"2.13 ms"`, 3719 -> `"62.0 min"`."""
    if abs(seconds) >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    if abs(seconds) >= 2 * 60:
        return f"{seconds / 60:.1f} min"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} µs"


def spoken_seconds(seconds: float) -> str:
    """Three digits, as many as a prediction deserves: 0.84884 -> `"849 ms"`, 62.04 -> `"62.0 s"`."""
    unit, size = next(
        (
            (unit, size)
            for unit, size, least in (
                ("h", 3600, 7200),
                ("min", 60, 120),
                ("s", 1, 0.9995),
                ("ms", 1e-3, 9.995e-4),
            )
            if seconds >= least
        ),
        ("µs", 1e-6),
    )
    return f"{three_digits(seconds / size)} {unit}"


def three_digits(number: float) -> str:
    """39.666 -> `"39.7"`, 12345 -> `"12,345"`: never as a power of ten."""
    if number == 0:
        return "0"
    decimals = max(0, 2 - floor(log10(abs(number)) + 1e-9))
    return f"{number:,.{decimals}f}"
