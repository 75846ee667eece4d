"""Bytes and seconds as people write them. Binary prefixes: 1 KiB = 1024 bytes, and `K`, `M`, `G` mean the same."""

import re

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
    """0.00213 -> `"2.13 ms"`."""
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} µs"
