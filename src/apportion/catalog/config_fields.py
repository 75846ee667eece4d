"""Typed access to the fields of a config.json, naming file and field where one cannot be used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from apportion.types.errors import ModelError
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text


class ConfigFields:
    """A config.json laid over a family's defaults. Methods raise ModelError for a value of the wrong kind."""

    def __init__(self, file: Path, values: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self.file = file
        self._values = values
        self._defaults = defaults

    @classmethod
    def read(cls, file: Path) -> "ConfigFields":
        try:
            values = cast(object, parse_json(read_text(file)))
        except OSError as error:
            raise ModelError(f"{file} cannot be read ({error.strerror}); name a model's folder") from error
        except ValueError as error:
            raise ModelError(f"{file} is not JSON ({error}); download it again") from error
        if not isinstance(values, dict):
            raise ModelError(f"{file} is not a JSON object; download it again")
        return cls(file, cast(dict[str, object], values), {})

    def over(self, defaults: Mapping[str, object]) -> "ConfigFields":
        return ConfigFields(self.file, self._values, defaults)

    def get(self, name: str) -> object:
        return self._values.get(name, self._defaults.get(name))

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise self.invalid(name, "a string")
        return value

    def all(self) -> dict[str, object]:
        """What is given, without defaults."""
        return dict(self._values)

    def positive(self, name: str) -> int:
        value = self.optional_positive(name)
        if value is None:
            raise ModelError(f"{self.file} lacks '{name}'")
        return value

    def optional_positive(self, name: str) -> int | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.invalid(name, "a positive whole number")
        return value

    def count(self, name: str) -> int:
        """A whole number that may be 0."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.invalid(name, "a whole number")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.invalid(name, "true or false")
        return value

    def items(self, name: str) -> list[object] | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.invalid(name, "a list")
        return cast(list[object], value)

    def mapping(self, name: str) -> dict[str, object]:
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.invalid(name, "an object")
        return cast(dict[str, object], value)

    def invalid(self, name: str, expected: str) -> ModelError:
        return ModelError(f"{self.file}: '{name}' is {json.dumps(self.get(name))}; it must be {expected}")
