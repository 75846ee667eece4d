"""What operations read of the step that they run for, at an address that stays."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

STEP = np.dtype(
    [(name, "i8") for name in ("input", "positions", "num", "rows", "slots", "num_runs", "runs", "first_run")]
)
"""Addresses of what the stage is given (ids_T or hidden_TH) and of the positions; the rest is a `DecodeRows`: how many
sequences and runs it has, and where its arrays lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """The sequences with one new token (int64). Shapes: B = sequences, R = their runs of consecutive KV slots."""

    rows_B: np.ndarray
    slots_B: np.ndarray
    """Where each new token's key and value go."""
    runs_R2: np.ndarray
    """(first slot, number of slots) of all positions of each sequence in turn."""
    first_run_B: np.ndarray
    """Sequence b has the runs `[first_run_B[b], first_run_B[b + 1])`; one longer than B."""


class StepOperand:
    def __init__(self) -> None:
        self._record = np.zeros((), STEP)
        self.address = self._record.ctypes.data
        self.input_address, self.positions_address = (
            self.address + (STEP.fields or {})[name][1] for name in ("input", "positions")
        )

    def point_to(self, inputs: Tensor, positions_T: Tensor, decode: DecodeRows) -> None:
        """All have to live until the operations have run; the inputs are contiguous."""
        arrays = (decode.rows_B, decode.slots_B, decode.runs_R2, decode.first_run_B)
        rows, slots, runs, first_run = (array.__array_interface__["data"][0] for array in arrays)
        self._record[()] = (
            *(inputs.data_ptr(), positions_T.data_ptr()),
            *(len(decode.rows_B), rows, slots, len(decode.runs_R2), runs, first_run),
        )
