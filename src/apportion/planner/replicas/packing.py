"""The best choice of disjoint sets of devices and of their shares of the sequences, of what each is worth.

Dynamic programming over (replicas, devices used of each kind, sequences given out): every set with every share is
added as often as its devices allow. Exact.
"""

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np
from numpy.typing import NDArray

from apportion.planner.replicas.task import Item, ReplicaSets

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BETTER = 1 + 1e-12
"""Relative: less is rounding, and the choice that came first stays."""


class Packings:
    def __init__(self, of: ReplicaSets) -> None:
        sets, self.sets, self.shares = of.sets, of.sets, of.shares
        self.num_replicas = of.task.num_replicas
        self._sums = (0, *self.shares)
        """Of shares some at a time: only one takes the rest, so these are the shares again."""
        self._ends = list(range(len(self._sums))) if not of.task.all_sequences else [len(self._sums) - 1]
        available = np.array(sets.available)
        self._strides = np.cumprod([1, *(available[:0:-1] + 1)])[::-1]
        used = np.vstack([np.zeros_like(sets.counts[:1]), sets.counts])
        self._most: IntArray = np.array(
            [(available[counts > 0] // counts[counts > 0]).min() for counts in sets.counts]
        )
        """Of a set there is room for."""
        least = available if of.task.constraints.use_all else np.zeros_like(available)
        self._lacking: NDArray[np.bool_] = np.any(used < least, axis=1)
        """States without a device that has to take part."""
        self._room = [np.flatnonzero((used + counts <= available).all(axis=1)) for counts in sets.counts]
        self._added = sets.counts @ self._strides
        place = {count: number for number, count in enumerate(self._sums)}
        self._given: list[IntArray] = [
            np.array([(place[count], place[count + share]) for count in self._sums if count + share in place])
            for share in self.shares
        ]

    def best(self, worth: FloatArray) -> tuple[float, list[Item]] | None:
        """Of `worth[set, share]`, −inf for what is not to be had; None where no choice is."""
        layers = 1 if self.num_replicas is None else self.num_replicas + 1
        value = np.full((layers, len(self.sets.counts) + 1, len(self._sums)), -inf)
        value[0, 0, 0] = 0.0
        choice = np.full(value.shape, -1, dtype=np.int64)
        items = [Item(int(one), int(share)) for one, share in np.argwhere(worth > -inf)]
        for number, item in enumerate(items):
            self._add(value, choice, number, item, float(worth[item]))
        last = np.where(self._lacking[:, None], -inf, value[-1][:, self._ends])
        state, end = divmod(int(last.argmax()), len(self._ends))
        if last[state, end] == -inf or (state == 0 and end == 0):
            return None
        traced = list(self._trace(choice, items, state, self._ends[end]))
        return float(last[state, end]), traced

    def _add(self, value: FloatArray, choice: IntArray, number: int, item: Item, worth: float) -> None:
        room, given = self._room[item.set], self._given[item.share]
        if len(given) == 0:
            return
        step = 0 if self.num_replicas is None else 1
        layers, added_state = np.arange(len(value) - step), int(self._added[item.set])
        before = (layers[:, None, None], room[:, None], given[:, 0])
        after = (layers[:, None, None] + step, room[:, None] + added_state, given[:, 1])
        for _ in range(int(self._most[item.set])):
            added, held = value[before] + worth, value[after]
            better = added > np.where(held > 0, held * BETTER, held)
            if not better.any():
                return
            value[after] = np.where(better, added, held)
            choice[after] = np.where(better, number, choice[after])

    def _trace(self, choice: IntArray, items: Sequence[Item], state: int, end: int) -> Iterator[Item]:
        layer, number = len(choice) - 1, int(choice[-1, state, end])
        place = {count: index for index, count in enumerate(self._sums)}
        while number >= 0:
            item = items[number]
            yield item
            layer -= 0 if self.num_replicas is None else 1
            state -= int(self._added[item.set])
            end = place[self._sums[end] - self.shares[item.share]]
            number = int(choice[layer, state, end])
