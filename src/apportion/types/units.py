"""Quantities as people write them, read and shown in one place: sizes, rates, times, counts and shares.

Sizes and counts have binary prefixes: 1 KiB = 1024 bytes, `K`, `M` and `G` mean the same, and 8k tokens are 8192. Rates
of links have decimal ones, as on datasheets. Every parser raises ValueError, in one line that says how to write it.
"""

import re
from math import floor, log10

from apportion.types.names import near_names, one_of

BYTE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
MAX_COUNT = 2**40
_MOST = 1e30
"""Beyond it a number is a slip, and its product with a unit may not be finite."""
_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_WORDS = {"kilo": "k", "mega": "m", "giga": "g", "tera": "t"}
_SECONDS = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "\u00b5s", "\u03bcs", "usec", "microsecond", "microseconds"), 1e-6),
    **dict.fromkeys(("ns", "nsec", "nanosecond", "nanoseconds"), 1e-9),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hour", "hours"), 3600.0),
}
"""The micro sign and the Greek letter look alike."""
_NUMBER = r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
_WITH_COMMA = re.compile(r"(?<![\w.,-])\d+(?:,\d+)+(?:\.\d+)?\s?[a-zA-Z\u00b5\u03bc%/]*", re.ASCII)
"""Where it begins nothing but a number: not in "rtx-3090,4090"."""
_QUANTITY = re.compile(_NUMBER + r"\s*(?P<unit>.*)", re.ASCII)
_SIZE_UNIT = re.compile(r"(?P<prefix>[kmgt]?)(?:i?b|i)?|bytes?|(?P<word>kilo|mega|giga|tera)bytes?")
_RATE_UNIT = re.compile(
    r"(?:(?P<prefix>[kKmMgGtT]?)(?P<binary>i?)|(?P<word>[kK]ilo|[mM]ega|[gG]iga|[tT]era))"
    r"(?P<unit>[bB]its?|[bB]ytes?|[bB])?(?P<per>/s|/sec|/second|ps| per second)?(?P<ethernet>[eE]|\s*[eE]thernet)?"
)
THUNDERBOLT_BYTES_PER_S = 16.4e9 / 8
"""TCP over USB4 at 20 Gbit/s each way (iperf3, jiribrejcha.net/2024/05, a Mac to a PC)."""
_NAMED_LINKS = {
    **dict.fromkeys(("thunderbolt 3", "thunderbolt 4", "tb3", "tb4", "usb4"), THUNDERBOLT_BYTES_PER_S),
    **dict.fromkeys(("ethernet", "gigabit", "gigabit ethernet", "1000base-t"), 1e9 / 8),
    "2.5gbase-t": 2.5e9 / 8,
    "10gbase-t": 10e9 / 8,
}
RATE_EXAMPLES = "1Gbit/s, 2.5GbE or 25GB/s"

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
    number, unit = _split(text, "a size", "600MiB or 12GiB")
    match = _SIZE_UNIT.fullmatch(unit.lower())
    if match is None:
        raise ValueError(
            _bad_unit(text, unit, ("B", "KiB", "MiB", "GiB", "TiB", "GB", "MB"), "600MiB or 12GiB")
        )
    size_bytes = round(number * BYTE_UNITS[match["prefix"] or _WORDS.get(match["word"] or "", "")])
    if size_bytes <= 0:
        raise ValueError(f"'{text}' is not a positive size")
    return size_bytes


def parse_count(text: str) -> int:
    """`"8k"` -> 8192, `"131072"` -> 131072. Raises ValueError for anything that is not a whole number ≥ 1."""
    number, unit = _split(text, "a whole number", "8192 or 8k")
    prefix = unit.lower().removesuffix("tokens").strip().removesuffix("i")
    if prefix not in BYTE_UNITS:
        raise ValueError(_bad_unit(text, unit, ("k", "M"), "8192 or 8k"))
    count = number * BYTE_UNITS[prefix]
    if not 1 <= count <= MAX_COUNT or count != int(count):
        raise ValueError(f"'{text}' is not a whole number from 1 to {MAX_COUNT}, like 8192 or 8k")
    return int(count)


def parse_bandwidth(text: str) -> float:
    """Bytes per second. Raises ValueError for anything that is not a positive bandwidth, and for what may be bits or
    bytes ("1gb/s")."""
    named = _NAMED_LINKS.get(" ".join(text.lower().split()))
    if named is not None:
        return named
    number, unit = _split(text, "a bandwidth", RATE_EXAMPLES)
    match = _RATE_UNIT.fullmatch(unit)
    if match is None or not (match["unit"] or match["ethernet"]):
        raise ValueError(
            _bad_unit(text, unit, ("Mbit/s", "Gbit/s", "Gbps", "MB/s", "GB/s", "GbE"), RATE_EXAMPLES)
        )
    prefix = (match["prefix"] or _WORDS.get((match["word"] or "").lower(), "")).lower()
    if _may_be_either(match):
        shown = f"{number:g}{prefix.upper()}"
        raise ValueError(f"'{text}' may be bits or bytes; write {shown}bit/s or {shown}B/s")
    scale = BYTE_UNITS[prefix] if match["binary"] else _DECIMAL[prefix]
    return _positive(text, number * scale / (1 if _is_bytes(match) else 8))


def _is_bytes(match: re.Match[str]) -> bool:
    return not match["ethernet"] and (match["unit"] == "B" or "yte" in match["unit"])


def _may_be_either(match: re.Match[str]) -> bool:
    """A small prefix before a small "b" says nothing of its case, but that "bps" is of bits; a capital "B" without a
    time is a size."""
    if match["ethernet"] or len(match["unit"]) > 1:
        return False
    if match["unit"] == "B":
        return not match["per"]
    return match["prefix"] in ("m", "g", "t") and match["per"] != "ps"


def parse_seconds(text: str, *, bare: bool = False) -> float:
    """`"0.3ms"` -> 0.0003; a number alone is of seconds where `bare` allows it. Raises ValueError for anything that is
    not a duration ≥ 0."""
    number, unit = _split(text, "a time", "0.3ms, 300us or 2s")
    if not unit and (bare or number == 0):
        return number
    if unit not in _SECONDS:
        raise ValueError(_bad_unit(text, unit, ("ns", "us", "ms", "s", "min"), "0.3ms, 300us or 2s"))
    return number * _SECONDS[unit]


def parse_per_second(text: str) -> float:
    """`"2/s"`, `"2"` and `"120/min"` -> 2.0; what comes so often may be named ("2 requests/s", "2rps")."""
    number, unit = _split(text, "a rate", "2/s or 30/min")
    match = re.fullmatch(r"(?:r|req|reqs|requests?)?(?:\s*(?:/|per|p)\s*(?P<time>[a-z]+))?", unit)
    time = match and (match["time"] or "s")
    if time not in _SECONDS:
        raise ValueError(_bad_unit(text, unit, ("/s", "/min", "/h"), "2/s or 30/min"))
    return _positive(text, number / _SECONDS[time])


def parse_flops_per_s(text: str) -> float:
    """`"12 TFLOPS"` -> 1.2e13. Raises ValueError for anything that is not a positive rate."""
    number, unit = _split(text, "a rate of arithmetic", "12 TFLOPS")
    match = re.fullmatch(r"(?P<prefix>[kmgtp]?)(?P<unit>flops?/s|flops|ops|ops/s)", unit.lower())
    if match is None:
        raise ValueError(_bad_unit(text, unit, ("GFLOPS", "TFLOPS", "TOPS"), "12 TFLOPS"))
    return _positive(text, number * _DECIMAL[match["prefix"]])


def parse_share(text: str) -> float:
    """`"5%"` -> 0.05. Raises ValueError for anything that is not a percentage ≥ 0."""
    number, unit = _split(text, "a percentage", "5%")
    if unit != "%":
        raise ValueError(f"'{text}' is not a percentage; write it like 5%")
    return number / 100


def check_point(text: str) -> None:
    """Raises ValueError for a number with a comma in it, whether that stands for a point or parts thousands."""
    found = _WITH_COMMA.search(text)
    if found is None:
        return
    pointed, joined = found[0].replace(",", "."), found[0].replace(",", "")
    thousands = re.match(r"\d{1,3}(,\d{3})+(?![\d.])", found[0]) is not None
    write = joined if pointed.count(".") > 1 else f"{joined} or {pointed}" if thousands else pointed
    raise ValueError(f"'{found[0]}' has a comma; write {write}")


def _split(text: str, what: str, examples: str) -> tuple[float, str]:
    """The number and its unit."""
    check_point(text)
    match = _QUANTITY.fullmatch(text.strip())
    if match is None or float(match["number"]) > _MOST:
        raise ValueError(f"'{text}' is not {what}; write it like {examples}")
    return float(match["number"]), match["unit"].strip()


def _positive(text: str, figure: float) -> float:
    if figure <= 0:
        raise ValueError(f"'{text}' is not > 0")
    return figure


def _bad_unit(text: str, unit: str, known: tuple[str, ...], examples: str) -> str:
    near = near_names(unit, known)
    if not unit:
        return f"'{text}' lacks a unit; write it like {examples}"
    advice = f"did you mean {one_of(near)}?" if near else f"write it like {examples}"
    return f"'{text}': unknown unit '{unit}'; {advice}"


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
