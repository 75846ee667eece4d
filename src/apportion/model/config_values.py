"""The values of a config.json by name; null is absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Default = TypeVar("Default", float, None)


class UnusualConfigError(Exception):
    """A value is of another kind than expected, or one of its kind that is not known."""


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """Methods raise UnusualConfigError."""

    values: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def number(self, name: str, default: Default) -> float | Default:
        """Above 0."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise UnusualConfigError(name)
        return value

    def required(self, name: str) -> float:
        value = self.number(name, None)
        if value is None:
            raise UnusualConfigError(name)
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnusualConfigError(name)
        return value

    def within(self, name: str) -> "ConfigValues":
        """Those of an object; none where it is absent."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, dict):
            raise UnusualConfigError(name)
        return ConfigValues(value or {})
