"""What `apportion probe` measured of this machine's processor, for the plans that follow.

`probe.json` in the cache folder. One that is of another processor, or cannot be read, is as good as none.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from apportion.probe.processor import cpu_model, num_cores
from apportion.types.cache import cache_folder
from apportion.types.cpu import CpuRates

VERSION = 1


def probe_file() -> Path:
    return cache_folder() / "probe.json"


def read_rates() -> dict[int, CpuRates]:
    """By number of threads; {} where nothing is known."""
    try:
        document = json.loads(probe_file().read_text(encoding="utf-8"))
        if [document[key] for key in ("version", "processor", "cores")] != [
            VERSION,
            cpu_model(),
            num_cores(),
        ]:
            return {}
        return {int(threads): CpuRates(**rates) for threads, rates in document["threads"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def save_rates(by_threads: Mapping[int, CpuRates]) -> None:
    """Raises OSError."""
    document = {
        "version": VERSION,
        "processor": cpu_model(),
        "cores": num_cores(),
        "threads": {str(threads): asdict(rates) for threads, rates in by_threads.items()},
    }
    file = probe_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
