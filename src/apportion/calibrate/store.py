"""The user's file of observations: `calibration.json` in `$XDG_CACHE_HOME/apportion`, by default `~/.cache/apportion`.

Losing it costs accuracy and nothing else: a file that cannot be read is replaced, with one line to say so; of two runs
that end at the same instant one may be forgotten.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apportion.calibrate.observation import Observation
from apportion.types.cache import cache_folder
from apportion.types.files import replace_file
from apportion.types.json_text import parse_json
from apportion.types.text_file import read_text

VERSION = 2
KEPT = 40
"""Observations of one hardware, phase and format; the newest are kept, so that a machine may change."""

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Warn = Callable[[str], object]


def calibration_file() -> Path:
    return cache_folder() / "calibration.json"


def read_observations(file: Path, warn: Warn) -> tuple[Observation, ...]:
    """() where there is no file, and, after a warning, where it cannot be used."""
    if not file.exists():
        return ()
    from pydantic import ValidationError

    try:
        document = parse_json(read_text(file), constants=False)
        if document["version"] != VERSION:
            warn(f"calibration {file} has version {document['version']}, not {VERSION}: it is ignored")
            return ()
        seen = _observations().validate_python(document["observations"])
        if any(one.measured_s <= 0 or one.num_layers < 1 for one in seen):
            raise ValueError("a measured time is not positive")
        return seen
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warn(f"calibration {file} cannot be read ({reason}): it is ignored")
        return ()


def _observations() -> "TypeAdapter[tuple[Observation, ...]]":
    """Imported where there is a file: it takes a third of a small plan's time."""
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[Observation, ...])


def add_observations(file: Path, new: Sequence[Observation], warn: Warn) -> None:
    """Adds to the file in one rename. What cannot be written is a warning."""
    usable = [one for one in new if one.measured_s > 0]
    kept = _newest([*read_observations(file, warn), *usable])
    document = {"version": VERSION, "observations": _observations().dump_python(tuple(kept), mode="json")}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(document, indent=1).encode())
    except OSError as error:
        warn(f"calibration {file} cannot be written: {error.strerror}")


def _newest(seen: Sequence[Observation]) -> list[Observation]:
    groups: dict[tuple[str, str, str], list[Observation]] = defaultdict(list)
    for one in seen:
        groups[one.hardware, one.phase, one.weight_format].append(one)
    return [one for group in groups.values() for one in group[-KEPT:]]
