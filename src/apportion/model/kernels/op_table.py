"""A table of operations (`op_code`) whose operands lie in scratch memory, each at so many bytes for each token.

Shapes: O = operations, W = words of a row, T = tokens of a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from apportion.model.kernels.op_code import BUFFER_WORDS, FP32_BYTES, ROW_WORDS, ROWS_WORD, Op
from apportion.model.kernels.team import Team

_NOWHERE, _STEP, _HALF = range(3)


@dataclass(frozen=True, slots=True)
class Place:
    """In the memory of a step or of a half of a layer, behind `floats` fp32 numbers for each token."""

    memory: int
    floats: int

    @classmethod
    def in_step(cls, floats: int) -> "Place":
        return cls(_STEP, floats)

    @classmethod
    def in_half(cls, floats: int) -> "Place":
        return cls(_HALF, floats)


_UNUSED = Place(_NOWHERE, 0)


class OpTable:
    def __init__(self, team: Team) -> None:
        self._team = team
        self._rows: list[np.ndarray] = []
        self._names: list[str] = []
        self._places: list[tuple[Place, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        op: Op,
        operands: Mapping[str, float],
        *,
        x: Place = _UNUSED,
        y: Place = _UNUSED,
        z: Place = _UNUSED,
        out: Place = _UNUSED,
    ) -> int:
        """Returns the operation's number."""
        row_W = np.zeros(ROW_WORDS, np.int64)
        op.fill(row_W, **operands)
        self._rows.append(row_W)
        self._names.append(op.name)
        self._places.append((x, y, z, out))
        return len(self._rows) - 1

    def name(self, number: int) -> str:
        """Of the operation's function."""
        return self._names[number]

    def finish(self) -> None:
        """No more is added."""
        self._words_OW = np.stack(self._rows)
        self._memory_O4 = np.array([[place.memory for place in row] for row in self._places])
        self._bytes_O4 = np.array([[place.floats * FP32_BYTES for place in row] for row in self._places])
        self._addresses = np.zeros(3, np.int64)
        self._pointed = (0, 0, 0, 0, 0)

    def point(self, first: int, stop: int, num_tokens: int, step_address: int, half_address: int) -> None:
        """The operations `[first, stop)` to memory for `num_tokens`."""
        now = (first, stop, num_tokens, step_address, half_address)
        if now == self._pointed:
            return
        ops, self._pointed = slice(first, stop), now
        self._addresses[_STEP], self._addresses[_HALF] = step_address, half_address
        self._words_OW[ops, ROWS_WORD] = num_tokens
        self._words_OW[ops, BUFFER_WORDS] = (
            self._addresses[self._memory_O4[ops]] + num_tokens * self._bytes_O4[ops]
        )

    def run(self, first: int, stop: int) -> None:
        self._team.run_ops(self._words_OW, first, stop)
