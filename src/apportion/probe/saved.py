"""What `apportion probe` measured of this machine's processor and disk, for the plans that follow.

`probe.json` in the cache folder. One that is of another processor, was measured while others kept this one busy, or
cannot be read, is as good as none.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apportion.probe.processor import cpu_model, num_cores
from apportion.probe.watch import BUSY_SHARE, QUIET, Conditions
from apportion.types.cache import cache_folder
from apportion.types.cpu import CpuRates
from apportion.types.files import replace_file
from apportion.types.json_text import parse_json
from apportion.types.soundness import is_rate
from apportion.types.text_file import read_text

VERSION = 2


def probe_file() -> Path:
    return cache_folder() / "probe.json"


def read_rates() -> dict[int, CpuRates]:
    """By number of threads; {} where nothing is known."""
    try:
        by_threads = {int(threads): CpuRates(**rates) for threads, rates in _document()["threads"].items()}
        return by_threads if all(map(_is_sound, by_threads.values())) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_sound(rates: CpuRates) -> bool:
    by_format = rates.flops_per_s
    figures = [figure for name, figure in asdict(rates).items() if name != "flops_per_s"]
    return "fp32" in by_format and all(map(is_rate, (*figures, *by_format.values())))


def read_disk_rate() -> float | None:
    """Bytes/s past the page cache; None where that is not known."""
    try:
        rate = _document()["disk_bytes_per_s"]
        return float(rate) if is_rate(rate) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _document() -> Any:
    """Raises ValueError where it is of another processor, OSError where there is none."""
    document = parse_json(read_text(probe_file()))
    if [document[key] for key in ("version", "processor", "cores")] != [VERSION, cpu_model(), num_cores()]:
        raise ValueError("of another processor")
    if document.get("others_share", 0.0) > BUSY_SHARE:
        raise ValueError("of a busy machine")
    return document


def save_rates(
    by_threads: Mapping[int, CpuRates], disk_bytes_per_s: float | None, conditions: Conditions = QUIET
) -> None:
    """Those of a busy machine take no better ones' place. Raises OSError."""
    if conditions.busy and read_rates():
        return
    document = {
        "version": VERSION,
        "processor": cpu_model(),
        "cores": num_cores(),
        "threads": {str(threads): asdict(rates) for threads, rates in by_threads.items()},
        "disk_bytes_per_s": disk_bytes_per_s,
        "others_share": conditions.others_share,
    }
    file = probe_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, (json.dumps(document, indent=1) + "\n").encode())
