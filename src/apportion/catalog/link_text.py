"""What is said of a link in words: its bandwidth and its latency in either order, like "1Gbit 0.3ms"."""

import re
from dataclasses import dataclass

from apportion.types.units import check_point, parse_bandwidth, parse_seconds

_JOINED = r"\s*(?:<?-+>?|–|\sto\s|\sand\s)\s*"
_LATENCY = re.compile(r"(?<![\w./-])-?(\d+(\.\d*)?|\.\d+)\s*(ns|us|µs|μs|ms|s)(?![\w/])")
_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")
_FILLER = ("latency", "with", "and")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """None where it is not said."""

    bytes_per_s: float | None
    latency_s: float | None


def split_link(text: str, names: list[str]) -> tuple[str, str, str] | None:
    """The two of `names` that the text begins with, and what is said of them; None where it does not."""
    return next(
        (
            (a, b, match[1] or "")
            for a in names
            for b in names
            if (match := re.fullmatch(re.escape(a) + _JOINED + re.escape(b) + r"(?:[\s:,=]+(.*))?", text))
        ),
        None,
    )


def link_figures(said: str) -> LinkFigures:
    """Raises ValueError in one line."""
    check_point(said)
    latencies = [match[0] for match in _LATENCY.finditer(said)]
    words = [
        word for word in _LATENCY.sub(" ", said).replace(",", " ").split() if word.lower() not in _FILLER
    ]
    if len(latencies) > 1:
        raise ValueError(f"there are two latencies, {latencies[0]} and {latencies[1]}; write one")
    figures = [word for word in words if word[0].isdigit()]
    for word, after in zip(words, [*words[1:], "0"], strict=False):
        if len(figures) > 1 and _NUMBER.fullmatch(word) and after[0].isdigit():
            raise ValueError(f"'{word}' lacks a unit; write a latency like {word}ms")
    if len(figures) > 1:
        raise ValueError(f"there are two bandwidths, {figures[0]} and {figures[1]}; write one")
    return LinkFigures(
        bytes_per_s=parse_bandwidth(" ".join(words)) if words else None,
        latency_s=parse_seconds(latencies[0]) if latencies else None,
    )
