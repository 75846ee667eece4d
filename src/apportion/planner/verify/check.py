"""One thing that `verify` holds a plan against."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    statement: str
    ok: bool
