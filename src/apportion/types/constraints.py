"""What a user demands of a division beside the workload: the search, its bound and `verify` all keep to it."""

from dataclasses import dataclass
from typing import Literal

Groups = Literal["any", "even", "none"]
"""Of tensor-parallel groups: any shares; equal ones alone, of sizes that divide the KV heads; no group at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """A plan's certificate is relative to them: no division that keeps them is below its bound."""

    groups: Groups = "any"
    use_all: bool = False
    """Whether every device takes part."""

    @property
    def statement(self) -> str:
        """In words, "" where there are none."""
        groups = {"any": [], "even": ["equal shares in every group"], "none": ["one device a stage"]}
        return ", ".join([*groups[self.groups], *["every device in use"] * self.use_all])


UNCONSTRAINED = Constraints()
