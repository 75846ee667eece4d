"""What a user demands of a division beside the workload: the search, its bound and `verify` all keep to it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """How another engine divides a model, where a plan is made for it."""

    name: str
    group_size: int
    """Of every stage."""
    cpu_first: bool = False
    """Whether a CPU of the main host holds the first layers or none."""
    embedding_on_host: bool = False
    """Whether the embedding table is in the main host's memory, whichever GPU has the first layer."""
    step_tokens: int
    """Tokens of prompts that it takes in at once, at most."""
    buffer_bytes: dict[str, int]
    """By device: of its reserve, what the engine takes beside weights and KV cache."""

    @property
    def statement(self) -> str:
        several = f"every stage a group of {self.group_size}, shared equally"
        sizes = "one device a stage" if self.group_size == 1 else several
        return ", ".join([f"what {self.name} can do: {sizes}", *["a CPU first"] * self.cpu_first])


Groups = Literal["any", "even", "none"]
"""Of tensor-parallel groups: any shares; equal ones alone, of sizes that divide the KV heads; no group at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """A plan's certificate is relative to them: no division that keeps them is below its bound."""

    groups: Groups = "any"
    use_all: bool = False
    """Whether every device takes part."""
    engine: EngineLimits | None = None
    """The engine that the plan is for; None where it is this one."""

    @property
    def embedding_on_host(self) -> bool:
        return self.engine is not None and self.engine.embedding_on_host

    @property
    def statement(self) -> str:
        """In words, "" where there are none."""
        groups = {"any": [], "even": ["equal shares in every group"], "none": ["one device a stage"]}
        form = [self.engine.statement] if self.engine else groups[self.groups]
        return ", ".join([*form, *["every device in use"] * self.use_all])


UNCONSTRAINED = Constraints()
