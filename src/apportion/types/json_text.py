"""JSON out of files that anybody may have written."""

import json
from typing import Any


def parse_json(text: str | bytes, *, constants: bool = True) -> Any:
    """Raises ValueError for all that is no JSON, nesting beyond what Python can follow included; NaN and Infinity too
    where no `constants` are wanted."""
    try:
        return json.loads(text) if constants else json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no figure")
