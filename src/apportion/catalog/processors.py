"""Computers that run models on their CPU, by name: the facts of processors.toml, whose head says what each means."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from apportion.types.units import parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """One entry of processors.toml."""

    key: str
    name: str
    memory_bytes: int
    memory_options_bytes: tuple[int, ...]
    """Every size sold, where one entry stands for several; empty otherwise."""
    mem_bytes_per_s: float
    read_share: float
    """Of that, what decoding reads."""
    cores: int
    flops_per_s: float
    """Peak in fp32 of all cores."""
    aliases: tuple[str, ...]
    source: tuple[str, ...]


@cache
def processors() -> dict[str, Processor]:
    """The whole catalogue, by key."""
    text = files("apportion.catalog").joinpath("processors.toml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = tomllib.loads(text)["processor"]
    return {key: _processor(key, table) for key, table in tables.items()}


def _processor(key: str, table: dict[str, Any]) -> Processor:
    return Processor(
        key=key,
        name=table["name"],
        memory_bytes=parse_bytes(table["memory_bytes"]),
        memory_options_bytes=tuple(parse_bytes(size) for size in table.get("memory_options_bytes", ())),
        mem_bytes_per_s=float(table["mem_bytes_per_s"]),
        read_share=float(table["read_share"]),
        cores=int(table["cores"]),
        flops_per_s=float(table["flops_per_s"]),
        aliases=tuple(table.get("aliases", ())),
        source=tuple(table["source"]),
    )
