"""What operations read of the step that they run for, at an address that stays."""

import numpy as np
from torch import Tensor

from apportion.model.batch import FlatBatch

STEP = np.dtype(
    [(name, "i8") for name in ("input", "positions", "num", "rows", "slots", "num_runs", "runs", "first_run")]
)
"""Addresses of what the stage is given (ids_T or hidden_TH) and of the positions; the rest is a `DecodeRows`: how many
sequences and runs it has, and where its arrays lie."""


class StepOperand:
    def __init__(self) -> None:
        self._record = np.zeros((), STEP)
        self.address = self._record.ctypes.data
        self.input_address, self.positions_address = (
            self.address + (STEP.fields or {})[name][1] for name in ("input", "positions")
        )

    def point_to(self, inputs: Tensor, batch: FlatBatch) -> None:
        """Both have to live until the operations have run; the inputs are contiguous."""
        decode = batch.decode
        arrays = (decode.rows_B, decode.slots_B, decode.runs_R2, decode.first_run_B)
        rows, slots, runs, first_run = (array.__array_interface__["data"][0] for array in arrays)
        self._record[()] = (
            *(inputs.data_ptr(), batch.positions_T.data_ptr()),
            *(len(decode.rows_B), rows, slots, len(decode.runs_R2), runs, first_run),
        )
