"""Typed reading of one TOML table, naming the place of whatever is wrong."""

from collections.abc import Mapping
from math import isfinite
from typing import cast

from apportion.catalog.quantities import parse_bandwidth
from apportion.types.errors import ClusterError
from apportion.types.units import parse_bytes


class TomlTable:
    """Keys are taken one by one; `finish` refuses those that were not. Every method raises ClusterError."""

    def __init__(self, place: str, content: object) -> None:
        if not isinstance(content, Mapping):
            raise ClusterError(f"{place}: a table is expected")
        self.place = place
        self._left = dict(cast(Mapping[str, object], content))

    def has(self, key: str) -> bool:
        return key in self._left

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
            raise ClusterError(f"{self.place}: {key}: '{value}' is none of {', '.join(choices)}")
        return value

    def number(self, key: str, default: float | None = None, *, zero_allowed: bool = False) -> float:
        value = self._left.pop(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ClusterError(f"{self.place}: {key}: a number is needed, not {_shown(value)}")
        if not isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            limit = "≥ 0" if zero_allowed else "> 0"
            raise ClusterError(f"{self.place}: {key}: {value} is not a finite number {limit}")
        return float(value)

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
        if "bandwidth" not in self._left:
            return self.number("bytes_per_s")
        return self.rate("bandwidth")

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
        return {name: inner.number(name) for name in tuple(inner._left)}

    def tables(self, key: str, singular: str) -> list["TomlTable"]:
        content = self._left.pop(key, [])
        if not isinstance(content, list):
            raise ClusterError(f"{self.place}: {key}: write it as [[{key}]]")
        return [
            TomlTable(f"{self.place}: {singular} {number}", one)
            for number, one in enumerate(cast(list[object], content), start=1)
        ]

    def finish(self) -> None:
        if self._left:
            raise ClusterError(f"{self.place}: unknown key '{next(iter(self._left))}'")


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)
