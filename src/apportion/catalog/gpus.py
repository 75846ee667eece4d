"""Devices by name: the datasheet facts of gpus.toml and processors.toml, found however people write them.

A name is read as a core ("4070tisuper"), and qualifiers that may be left out where they decide nothing: a memory size
("12gb"), a form factor ("pcie", "sxm", "nvl"), a core count ("30-core"). Brand words in front and filler ("GPU",
"Generation") are ignored; a Mac is called by its chip ("MacBook Pro M3 Max 64GB"). What several entries answer to is
refused with all of them named, never guessed; but an alias of one entry decides ("a100-80gb" is the PCIe card, the
slower of two).
"""

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from apportion.catalog.processors import Processor, processors
from apportion.types.errors import ClusterError
from apportion.types.names import names_with, one_of, unknown_name
from apportion.types.pcie import LANE_BYTES_PER_S
from apportion.types.units import parse_bytes

GpuKind = Literal["cuda", "rocm", "metal", "xpu", "npu"]

_BRANDS = frozenset(
    (
        "nvidia",
        "amd",
        "intel",
        "apple",
        "geforce",
        "radeon",
        "instinct",
        "tesla",
        "jetson",
        "rtx",
        "gtx",
        "rx",
        "arc",
        "huawei",
        "valve",
    )
)
_FILLER = frozenset(("gpu", "graphics", "generation", "edition", "r", "tm"))
_FORM = re.compile(r"(pcie|sxm|nvl)\d?|(\d+core)")
_SIZE = re.compile(r"\d+gb")
_MAC = re.compile(r"\b(mac\W?book(\W(pro|air))?|mac\W?(mini|studio|pro)|imac)\b(\W\d\d(\W?inch)?\b)?")


COMPUTE_CAPABILITIES = {
    "kepler": 3.5,
    "maxwell": 5.0,
    "pascal-gp100": 6.0,
    "pascal-gp10x": 6.1,
    "volta": 7.0,
    "turing": 7.5,
    "turing-tu11x": 7.5,
    "ampere-ga100": 8.0,
    "ampere-ga10x": 8.6,
    "ampere-orin": 8.7,
    "ada": 8.9,
    "hopper": 9.0,
    "blackwell-gb100": 10.0,
    "blackwell-gb20x": 11.0,
}
"""By architecture, of the card with the least (developer.nvidia.com/cuda-gpus and /cuda-legacy-gpus)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One entry of gpus.toml, whose head says what each figure means."""

    key: str
    name: str
    vendor: str
    kind: GpuKind
    architecture: str
    memory_bytes: int
    memory_options_bytes: tuple[int, ...]
    """Every size sold, where one entry stands for several; empty otherwise."""
    mem_bytes_per_s: float
    flops_per_s: dict[str, float]
    """Dense peak by format ("fp32", "fp16", "bf16", "int8"); a format without a fast path is missing."""
    pcie_generation: int | None
    pcie_lanes: int | None
    aliases: tuple[str, ...]
    source: tuple[str, ...]

    @property
    def pcie_bytes_per_s(self) -> float | None:
        """Peak of the card's own connector in one direction, None where the memory is the system's."""
        if self.pcie_generation is None or self.pcie_lanes is None:
            return None
        return self.pcie_lanes * LANE_BYTES_PER_S[self.pcie_generation]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spelling:
    core: str
    size_gb: int | None
    forms: frozenset[str]


def gpus() -> dict[str, Gpu]:
    """The whole catalogue, by key."""
    return dict(_catalogue())


def find_gpu(text: str) -> Gpu:
    """The GPU that is written as `text`. Raises ClusterError, as `find_device` does, and for a computer's CPU."""
    found = find_device(text)
    if isinstance(found, Processor):
        raise ClusterError(f"'{text}' is no GPU but a computer, {found.name}, which computes on its CPU")
    return found


def find_device(text: str) -> Gpu | Processor:
    """What is written as `text`; "m2-max-64gb" picks one of `memory_options_bytes`.

    Raises ClusterError where nothing, or more than one, is called that.
    """
    wanted = _read(text)
    exact = {entry.key for spelling, entry in _spellings() if spelling == wanted}
    matches = exact or {entry.key for spelling, entry in _spellings() if _answers(entry, spelling, wanted)}
    if len(matches) > 1:
        raise ClusterError(f"'{text}' can be {one_of(sorted(matches))}; write which")
    if not matches:
        raise ClusterError(_unknown(text, wanted))
    entry = next(one for one in _entries() if one.key in matches)
    if wanted.size_gb is None or not entry.memory_options_bytes:
        return entry
    return replace(entry, memory_bytes=wanted.size_gb * 2**30)


def listed_devices(text: str) -> list[Gpu | Processor]:
    """Those that hold `text` in any of their spellings. Raises ClusterError where none does."""
    keys = names_with(
        text, {name: entry.key for entry in _entries() for name in (entry.key, entry.name, *entry.aliases)}
    )
    found = [entry for entry in _entries() if entry.key in keys]
    if not found:
        raise ClusterError(_unknown(text, _read(text)))
    return found


@cache
def _catalogue() -> dict[str, Gpu]:
    text = files("apportion.catalog").joinpath("gpus.toml").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = tomllib.loads(text)["gpu"]
    return {key: _gpu(key, table) for key, table in tables.items()}


def _gpu(key: str, table: dict[str, Any]) -> Gpu:
    pcie: dict[str, int] = table.get("pcie", {})
    return Gpu(
        key=key,
        name=table["name"],
        vendor=table["vendor"],
        kind=table["kind"],
        architecture=table["architecture"],
        memory_bytes=parse_bytes(table["memory_bytes"]),
        memory_options_bytes=tuple(parse_bytes(size) for size in table.get("memory_options_bytes", ())),
        mem_bytes_per_s=float(table["mem_bytes_per_s"]),
        flops_per_s={name: float(rate) for name, rate in table["flops_per_s"].items()},
        pcie_generation=pcie.get("generation"),
        pcie_lanes=pcie.get("lanes"),
        aliases=tuple(table.get("aliases", ())),
        source=tuple(table["source"]),
    )


@cache
def _entries() -> list[Gpu | Processor]:
    return [*_catalogue().values(), *processors().values()]


@cache
def _spellings() -> list[tuple[_Spelling, Gpu | Processor]]:
    return [(_read(text), entry) for entry in _entries() for text in (entry.key, entry.name, *entry.aliases)]


def _read(text: str) -> _Spelling:
    """Splits a name into its core and its qualifiers: "GeForce RTX 3060 12 GB" -> ("3060", 12, {})."""
    words = [word for word in re.split(r"[^a-z0-9]+", _spaced(text.lower())) if word and word not in _FILLER]
    while len(words) > 1 and words[0] in _BRANDS:
        words = words[1:]
    sizes_gb = [int(word[:-2]) for word in words if _SIZE.fullmatch(word)]
    forms = [match[1] or match[2] for word in words if (match := _FORM.fullmatch(word))]
    core = [word for word in words if not _SIZE.fullmatch(word) and not _FORM.fullmatch(word)]
    return _Spelling(
        core="".join(core).replace("mobile", "laptop"),
        size_gb=sizes_gb[0] if sizes_gb else None,
        forms=frozenset(forms),
    )


def _spaced(text: str) -> str:
    """Joins numbers to their units ("12 GB", "30-core") and parts brands from their numbers ("rtx4090")."""
    text = re.sub(r"(\d+)[\s-]*gi?b\b", r" \1gb ", text)
    text = _MAC.sub(" ", text) if re.search(r"\bm\d\b", text) else text
    text = re.sub(r"(\d+)[\s-]*core\b", r" \1core ", text)
    return re.sub(r"\b(rtx|gtx|rx|arc)(?=[ab]?\d)", r"\1 ", text)


def _answers(gpu: Gpu | Processor, spelling: _Spelling, wanted: _Spelling) -> bool:
    """Whether what was left out of `wanted` is all that parts it from this spelling of `gpu`."""
    sizes_gb = {size_bytes // 2**30 for size_bytes in gpu.memory_options_bytes or (gpu.memory_bytes,)}
    sizes_gb |= {spelling.size_gb}
    return (
        spelling.core == wanted.core
        and (wanted.size_gb is None or wanted.size_gb in sizes_gb)
        and wanted.forms <= spelling.forms
    )


def _unknown(text: str, wanted: _Spelling) -> str:
    """With sizes sold where only the size is wrong, else with near names."""
    sizes = {
        size_bytes: entry.key
        for spelling, entry in _spellings()
        if spelling.core == wanted.core
        for size_bytes in entry.memory_options_bytes or (entry.memory_bytes,)
    }
    if sizes and wanted.size_gb is not None:
        sold = one_of([f"{size_bytes / 2**30:g} GiB ({sizes[size_bytes]})" for size_bytes in sorted(sizes)])
        return f"'{text}' is not sold with {wanted.size_gb} GiB, but with {sold}"
    names = {
        spelling: entry.key for entry in _entries() for spelling in (entry.key, entry.name, *entry.aliases)
    }
    return unknown_name("device", text, names, spelt=lambda name: _read(name).core)
