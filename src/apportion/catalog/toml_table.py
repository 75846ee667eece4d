"""Typed reading of one TOML table, naming the place of whatever is wrong."""

from collections.abc import Callable, Collection, Iterable, Mapping
from math import isfinite
from typing import cast

from apportion.types.errors import ClusterError
from apportion.types.names import unknown_name
from apportion.types.units import parse_bandwidth, parse_bytes, parse_flops_per_s, parse_seconds

MEANT = {
    "vram": "memory",
    "ram": "memory",
    "name": "id",
    "type": "kind",
    "model": "gpu",
    "card": "gpu",
    "number": "count",
    "from": "src",
    "to": "dst",
    "speed": "bandwidth",
    "latency_ms": "latency",
    "rtt": "latency",
    "gpus": "device",
    "cards": "device",
    "nodes": "host",
}
"""Keys that people write, and what they mean by them, where a table has that."""


class TomlTable:
    """Only `keys` may be in it; they are taken one by one, and `finish` refuses those that were not.

    Every method raises ClusterError."""

    def __init__(self, place: str, content: object, keys: Collection[str] | None = None) -> None:
        if not isinstance(content, Mapping):
            raise ClusterError(f"{place}: a table is expected")
        self.place = place
        self.parse: Callable[[str], float] | None = None
        """Of numbers that are written as texts; None where their keys say what they are of."""
        self._left = dict(cast(Mapping[str, object], content))
        if keys is not None:
            self.check_keys("key", self._left, keys)

    def check_keys(self, what: str, given: Iterable[str], keys: Collection[str]) -> None:
        meant = {asked: key for asked, key in MEANT.items() if key in keys}
        for one in given:
            if one not in keys:
                raise ClusterError(f"{self.place}: {unknown_name(what, one, tuple(keys), meant=meant)}")

    def has(self, key: str) -> bool:
        return key in self._left

    def peek(self, key: str, default: object = None) -> object:
        """What is written, of any type; it is still to be taken."""
        return self._left.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._left.pop(key, default)
        if not isinstance(value, str) or not value:
            raise ClusterError(f"{self.place}: {key}: a text is needed, not {_shown(value)}")
        if not value.isprintable():
            raise ClusterError(f"{self.place}: {key}: {value!r} cannot be printed in one line")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.text(key, default)
        if value not in choices:
            raise ClusterError(f"{self.place}: {unknown_name(key, value, choices)}")
        return value

    def number(self, key: str, default: float | None = None, *, zero_allowed: bool = False) -> float:
        value = self._quantity(key, self._left.pop(key, default))
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ClusterError(f"{self.place}: {key}: a number is needed, not {_shown(value)}")
        if not isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            limit = "≥ 0" if zero_allowed else "> 0"
            raise ClusterError(f"{self.place}: {key}: {value} is not a finite number {limit}")
        return float(value)

    def _quantity(self, key: str, value: object) -> object:
        """The number that a text like "20 GB/s" or "0.3ms" stands for, by what the key is of."""
        if not isinstance(value, str):
            return value
        parse = self.parse or next((one for ending, one in _BY_ENDING.items() if key.endswith(ending)), None)
        if parse is None:
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise ClusterError(f"{self.place}: {key}: {error}") from None

    def count(self, key: str, default: int) -> int:
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ClusterError(f"{self.place}: {key}: {_shown(value)} is not a whole number ≥ 1")
        return value

    def size_bytes(self, key: str, default_bytes: int | None = None, *, zero_allowed: bool = False) -> int:
        """A size like "6GiB", or a whole number of bytes."""
        value = self._left.pop(key, default_bytes)
        if isinstance(value, str):
            try:
                return parse_bytes(value)
            except (ValueError, OverflowError) as error:
                raise ClusterError(f"{self.place}: {key}: {error}") from None
        least = 0 if zero_allowed else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ClusterError(f"{self.place}: {key}: {_shown(value)} is not a size; write it like 6GiB")
        return value

    def bandwidth(self) -> float:
        """Bytes per second from `bytes_per_s`, or from `bandwidth` like "1Gbit"."""
        if self.has("bandwidth"):
            return self.rate("bandwidth")
        if not self.has("bytes_per_s"):
            raise ClusterError(f'{self.place}: give its bandwidth, like bandwidth = "1Gbit"')
        return self.number("bytes_per_s")

    def latency(self) -> float | None:
        """Seconds from `latency_s`, or from `latency` like "0.3ms"; None where neither is given."""
        for key in ("latency", "latency_s"):
            if self.has(key):
                return self.number(key, zero_allowed=True)
        return None

    def rate(self, key: str) -> float:
        """Bytes per second, like "3 GB/s"."""
        try:
            return parse_bandwidth(self.text(key))
        except ValueError as error:
            raise ClusterError(f"{self.place}: {key}: {error}") from None

    def stream(self, default: float | None) -> float | None:
        """Bytes per second from `stream` like "3 GB/s"; None with "never"."""
        if "stream" not in self._left:
            return default
        text = self.text("stream")
        if text == "never":
            return None
        try:
            return parse_bandwidth(text)
        except ValueError as error:
            raise ClusterError(f"{self.place}: stream: {error}, or never") from None

    def numbers(self, key: str, default: Mapping[str, float] | None) -> dict[str, float]:
        """A table of numbers, like flops_per_s by weight format."""
        if key not in self._left and default is not None:
            return dict(default)
        inner = TomlTable(f"{self.place}: {key}", self._left.pop(key, None))
        inner.parse = _BY_ENDING.get(key)
        return {name: inner.number(name) for name in tuple(inner._left)}

    def tables(self, key: str, singular: str, keys: Collection[str]) -> list["TomlTable"]:
        content = self._left.pop(key, [])
        if not isinstance(content, list):
            raise ClusterError(f"{self.place}: {key}: write it as [[{key}]]")
        return [
            TomlTable(f"{self.place}: {singular} {number}", one, keys)
            for number, one in enumerate(cast(list[object], content), start=1)
        ]

    def finish(self) -> None:
        if self._left:
            raise ClusterError(
                f"{self.place}: '{next(iter(self._left))}' does not go with the other keys; leave it out"
            )


_BY_ENDING: dict[str, Callable[[str], float]] = {
    "bytes_per_s": parse_bandwidth,
    "flops_per_s": parse_flops_per_s,
    "latency": parse_seconds,
    "_s": parse_seconds,
}


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)
