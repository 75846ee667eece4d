"""What is said of a link in words: its bandwidth and its latency in either order, like "1Gbit 0.3ms"."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

from apportion.types.errors import ClusterError
from apportion.types.names import unknown_name
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


def read_link(
    place: str, text: str, hosts: list[str], devices: Sequence[str] = ()
) -> tuple[str, str, LinkFigures]:
    """The two ends of a link, hosts or some `devices`, and its figures. Raises ClusterError, which begins with
    `place`."""
    found = split_link(text, [*hosts, *devices])
    if found is None:
        pairs = [f"{a}-{b}" for a, b in combinations_with_replacement(hosts, 2)]
        asked = re.split(r"[\s=]", text)[0]
        raise ClusterError(f"{place}: {unknown_name('pair of hosts', asked, pairs)}")
    src, dst, said = found
    return src, dst, read_figures(place, said)


def read_figures(place: str, said: str) -> LinkFigures:
    """What is said of a link. Raises ClusterError, which begins with `place`."""
    try:
        return _figures(said)
    except ValueError as error:
        raise ClusterError(f"{place}: {error}") from None


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


def _figures(said: str) -> LinkFigures:
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
