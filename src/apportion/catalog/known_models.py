"""Well-known models by name, planned without a network: the fields of their config.json, as facts in models/*.json.

A file is named as people name the model; under "catalogue" it also holds the hub ids that share the config, further
names, the published parameter count that a test compares, and where the figures were read.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from apportion.types.errors import ModelError
from apportion.types.names import names_with, near_names, unknown_name

CATALOGUE = Path(__file__).parent / "models"


def known_models() -> dict[str, dict[str, Any]]:
    """The "catalogue" table of every model, by name."""
    return dict(_tables())


def find_known_model(name: str) -> str | None:
    """The catalogue's name of what is called `name` in any spelling, or of a hub id; None where there is none."""
    return _names().get(_spelt(name))


def listed_models(text: str) -> list[str]:
    """The catalogue's names that hold `text` in any of their spellings. Raises ModelError where none does."""
    found = names_with(text, _names())
    if not found:
        raise ModelError(unknown_name("model", text, _names(), spelt=_spelt))
    return sorted(found)


def several_models(name: str) -> str | None:
    """In words, what may be meant by a name that stands for different models; None for any other."""
    return _SEVERAL.get(_spelt(name))


def known_config(known: str) -> Path:
    return CATALOGUE / f"{known}.json"


def near_models(name: str) -> list[str]:
    """The catalogue's names that are spelt like `name`, nearest first."""
    return near_names(name.rsplit("/", 1)[-1], _names(), spelt=_spelt)


_SEVERAL = {
    "deepseek-r1-8b": "qwen3-8b (DeepSeek-R1-0528-Qwen3-8B, which Ollama calls so since May 2025) or llama-3.1-8b "
    "(DeepSeek-R1-Distill-Llama-8B, before that)"
}


@cache
def _tables() -> dict[str, dict[str, Any]]:
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))["catalogue"]
        for file in sorted(CATALOGUE.glob("*.json"))
    }


@cache
def _names() -> dict[str, str]:
    """Every spelling: names, further names, hub ids, and hub ids without their organisation."""
    return {
        _spelt(spelling): known
        for known, table in _tables().items()
        for hub_id in table["hub_ids"]
        for spelling in (known, *table["aliases"], hub_id, hub_id.rsplit("/", 1)[-1])
    }


def _spelt(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-").replace(":", "-")
