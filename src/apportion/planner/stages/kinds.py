"""The kinds of stages a model has: a stage's cost on given devices depends on its kind alone."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from apportion.cost.formats import Formats
from apportion.cost.memory import Capacity
from apportion.cost.shard import layer_counts
from apportion.planner.stages.axes import Room, StageKind, ffn_granule, member_room
from apportion.types.cluster import Device
from apportion.types.model import LayerSpec, ModelSpec

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def stage_kind(model: ModelSpec, start: int, stop: int) -> StageKind:
    return StageKind(
        layers=layer_counts(model.layers[start:stop]),
        has_embedding=start == 0,
        has_head=stop == model.num_layers,
    )


T = TypeVar("T")
MAX_KNOWN = 800
"""Groups' costs that are kept, of one number of microbatches and chunk each: some 100 KB."""
Memory = tuple[str, int]
"""A device's kind and threads: what a member's needs depend on beside its share and its place."""
Place = tuple[int, int]
"""A member's rank and the size of its group. All ranks but 0 are alike: they stand as 1."""


class StageKinds:
    """Numbers the kinds of stages of a model: `index[a, b]` is the kind of layers [a, b), −1 where b ≤ a.

    `counts[kind, i]` layers are of the i-th of `layers`.
    """

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        size = model.num_layers + 1
        self.index: IntArray = np.full((size, size), -1, dtype=np.int64)
        self.kinds: list[StageKind] = []
        self.layers: tuple[LayerSpec, ...] = tuple(dict.fromkeys(model.layers))
        numbers: dict[tuple[int | bool, ...], int] = {}
        sorts = {layer: sort for sort, layer in enumerate(self.layers)}
        sort_of = [sorts[layer] for layer in model.layers]  # comparing layers takes long
        seen = np.cumsum([[0] * len(sorts), *np.eye(len(sorts), dtype=int)[sort_of]], axis=0).tolist()
        for start in range(size - 1):
            for stop in range(start + 1, size):
                counts = (b - a for a, b in zip(seen[start], seen[stop], strict=True))
                key = (*counts, start == 0, stop == size - 1)
                if key not in numbers:
                    numbers[key] = len(self.kinds)
                    held = Counter(sort_of[start:stop])
                    layers = tuple((self.layers[sort], count) for sort, count in held.items())
                    ends = {"has_embedding": start == 0, "has_head": stop == size - 1}
                    self.kinds.append(StageKind(layers=layers, **ends))
                self.index[start, stop] = numbers[key]
        features = np.array(list(numbers), dtype=np.int64)
        self.counts: IntArray = features[:, :-2]
        self.has_embedding: BoolArray = features[:, -2] == 1
        self.has_head: BoolArray = features[:, -1] == 1
        self.num_layers: IntArray = self.counts.sum(axis=1)
        self.position: IntArray = self.has_embedding + 2 * self.has_head
        """0: between others, 1: first, 2: last, 3: the only stage."""
        self._numbers = {kind: number for number, kind in enumerate(self.kinds)}
        self._rooms: dict[tuple[Capacity, Formats], dict[tuple[int, Place, int, Memory], Room]] = {}
        self._bytes: dict[tuple[Capacity, Formats, Place, Memory], IntArray] = {}
        self._known: dict[Hashable, object] = {}

    def known(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, which follows from the key and the model: made once while it is among the last ones."""
        if key not in self._known:
            if len(self._known) >= MAX_KNOWN:
                del self._known[next(iter(self._known))]
            self._known[key] = make()
        return cast(T, self._known[key])

    def bytes(
        self, capacity: Capacity, formats: Formats, device: Device, *, rank: int, size: int
    ) -> IntArray:
        """Bytes of (nothing, a KV head, an FFN granule, a vocabulary row) by kind, on a member of a group."""
        place = _place(rank, size)
        key = (capacity, formats, place, _memory(device))
        if key not in self._bytes:
            room = partial(member_room, self.model, capacity, formats, _without_memory(device), *place)
            self._bytes[key] = self._by_kind(room)
        return self._bytes[key]

    def rooms(
        self, capacity: Capacity, formats: Formats, devices: Sequence[Device], number: int
    ) -> tuple[Room, ...]:
        """Of each of a group's members in a stage of the kind of this number."""
        known = self._rooms.setdefault((capacity, formats), {})
        keys = [
            (device.usable_bytes, _place(rank, len(devices)), number, _memory(device))
            for rank, device in enumerate(devices)
        ]
        for rank, (key, device) in enumerate(zip(keys, devices, strict=True)):
            if key not in known:
                needed = self.bytes(capacity, formats, device, rank=rank, size=len(devices))[number]
                nothing, head, granule, row = (int(size) for size in needed)
                known[key] = Room(
                    free_bytes=device.usable_bytes - nothing,
                    head_bytes=head,
                    granule_bytes=granule,
                    row_bytes=row,
                    num_granules=self.model.ffn_columns // ffn_granule(self.model),
                    vocab_rows=self.model.vocab_rows,
                )
        return tuple(known[key] for key in keys)

    def number(self, kind: StageKind) -> int:
        return self._numbers[kind]

    def _by_kind(self, room: Callable[[StageKind], Room]) -> IntArray:
        """Kinds with the same sorts of layers, and ends, differ by as much for each further layer of a sort."""
        needed = np.empty((len(self.kinds), 4), dtype=np.int64)
        held = self.counts > 0
        ends = np.column_stack([held, self.has_embedding, self.has_head])
        distinct, of_kind = np.unique(ends, axis=0, return_inverse=True)
        for place, (*has_sort, has_embedding, has_head) in enumerate(distinct.tolist()):
            numbers = np.flatnonzero(of_kind.reshape(-1) == place)
            sorts = [sort for sort, has in enumerate(has_sort) if has]
            rows: list[tuple[int, ...]] = []
            for more in (None, *sorts):  # with one layer of each sort, and one more of that
                layers = tuple((self.layers[sort], 1 + (sort == more)) for sort in sorts)
                one = room(StageKind(layers=layers, has_embedding=has_embedding, has_head=has_head))
                rows.append((-one.free_bytes, one.head_bytes, one.granule_bytes, one.row_bytes))
            base, *further = np.array(rows)
            needed[numbers] = base + (self.counts[numbers][:, sorts] - 1) @ (np.array(further) - base)
        return needed


@lru_cache(maxsize=4)
def kinds_of(model: ModelSpec) -> StageKinds:
    """The model's, with what is known of its groups' costs from one plan to the next."""
    return StageKinds(model)


def _place(rank: int, size: int) -> Place:
    return min(rank, 1), size


def _memory(device: Device) -> Memory:
    return device.kind, device.num_threads


def _without_memory(device: Device) -> Device:
    """A member's room on it is minus what it needs."""
    return replace(device, memory_bytes=0, reserved_bytes=0)
