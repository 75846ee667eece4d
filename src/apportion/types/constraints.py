"""What a user demands of a division beside the workload: the search, its bound and `verify` all keep to it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
        several = f"stages of {self.group_size} equal shares"
        sizes = "one device a stage" if self.group_size == 1 else several
        return ", ".join([f"{sizes} in {self.name}", *["a CPU first"] * self.cpu_first])


Groups = Literal["any", "even", "none"]
"""Of tensor-parallel groups: any shares; equal ones alone, of sizes that divide the KV heads; no group at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A device that takes part, with layers `[layer_start, layer_stop)` and maybe others; where these are none, with
    any."""

    device_id: str
    layer_start: int = 0
    layer_stop: int = 0

    @property
    def device_ids(self) -> tuple[str, ...]:
        return (self.device_id,)

    @property
    def typed(self) -> str:
        return f"--pin {self.device_id}{_layers(self.layer_start, self.layer_stop)}"

    @property
    def statement(self) -> str:
        if self.layer_start == self.layer_stop:
            return f"{self.device_id} in use"
        return f"{_named(self.layer_start, self.layer_stop)} on {self.device_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedStage:
    """A stage by hand: exactly layers `[layer_start, layer_stop)` on exactly these devices."""

    device_ids: tuple[str, ...]
    layer_start: int
    layer_stop: int
    shares: tuple[int, ...] = ()
    """The ratio of the devices' shares; of none, the best."""

    @property
    def typed(self) -> str:
        shares = "".join(f":{share}" for share in self.shares)
        return f"--stage {'+'.join(self.device_ids)}{shares}{_layers(self.layer_start, self.layer_stop)}"

    @property
    def statement(self) -> str:
        shares = f" ({':'.join(map(str, self.shares))})" if self.shares else ""
        layers = _named(self.layer_start, self.layer_stop)
        return f"a stage of {layers} on {' + '.join(self.device_ids)}{shares}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """A plan's certificate is relative to them: no division that keeps them is below its bound."""

    groups: Groups = "any"
    use_all: bool = False
    """Whether every device takes part that is not excluded."""
    excluded: tuple[str, ...] = ()
    """Devices that take no layers."""
    pins: tuple[Pin, ...] = ()
    stages: tuple[FixedStage, ...] = ()
    """Layers that are in none of them are divided among the other devices."""

    engine: EngineLimits | None = None
    """The engine that the plan is for; None where it is this one."""

    @property
    def embedding_on_host(self) -> bool:
        return self.engine is not None and self.engine.embedding_on_host

    @property
    def tied(self) -> tuple[Pin | FixedStage, ...]:
        """Those that name layers."""
        return (*(pin for pin in self.pins if pin.layer_start < pin.layer_stop), *self.stages)

    @property
    def used(self) -> frozenset[str]:
        """Devices that are named as taking part."""
        return frozenset(name for one in (*self.pins, *self.stages) for name in one.device_ids)

    def stage_of(self, device_id: str) -> FixedStage | None:
        return next((stage for stage in self.stages if device_id in stage.device_ids), None)

    @property
    def statement(self) -> str:
        """In words, "" where there are none."""
        groups = {"any": [], "even": ["equal shares in every group"], "none": ["one device a stage"]}
        excluded = [f"nothing on {', '.join(self.excluded)}"] if self.excluded else []
        every = [f"every {'other ' if excluded else ''}device in use"] * self.use_all
        tied = [one.statement for one in (*self.pins, *self.stages)]
        form = [self.engine.statement] if self.engine else groups[self.groups]
        return ", ".join([*form, *excluded, *every, *tied])

    @property
    def engine_alone(self) -> "Constraints":
        """What is left of them without those that a user types beside --for."""
        return Constraints(groups=self.groups, engine=self.engine) if self.engine else UNCONSTRAINED

    def parts(self) -> Iterator[tuple[str, "Constraints"]]:
        """Each constraint as it is typed, and all the others without it."""
        if self.engine is not None:
            yield f"--for {self.engine.name.lower()}", replace(self, engine=None, groups="any")
        elif self.groups != "any":
            what = "equal shares in every group" if self.groups == "even" else "one device a stage"
            yield what, replace(self, groups="any")
        if self.use_all:
            yield "--use-all", replace(self, use_all=False)
        for name in self.excluded:
            yield (
                f"--exclude {name}",
                replace(self, excluded=tuple(other for other in self.excluded if other != name)),
            )
        for pin in self.pins:
            yield pin.typed, replace(self, pins=tuple(other for other in self.pins if other != pin))
        for stage in self.stages:
            yield stage.typed, replace(self, stages=tuple(other for other in self.stages if other != stage))


def _layers(start: int, stop: int) -> str:
    """As typed, both ends included."""
    if start == stop:
        return ""
    return f"={start}" if stop == start + 1 else f"={start}-{stop - 1}"


def _named(start: int, stop: int) -> str:
    return f"layer {start}" if stop == start + 1 else f"layers {start}–{stop - 1}"


UNCONSTRAINED = Constraints()
