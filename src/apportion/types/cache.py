"""Where this user's measurements are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    # The XDG specification: a relative path is to be ignored.
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "apportion"
