"""A worker's all-reduce: it sleeps what an emulated device still owes, exchanges, and notes when. Through shared memory
all of it is one compiled function, so that the layers of a group's member are one compiled call.

numba compiles it when this module is first imported on a machine, and keeps the result on disk.

Shapes: E = exchanges since they were last taken.
"""

import time
from typing import Any

import numpy as np
import torch
from numba import cfunc, types
from numba.np.numpy_support import carray
from torch import Tensor

from apportion.engine.pacing import Pacer, settle, start
from apportion.native.libc import now_ns
from apportion.native.words import pointer
from apportion.transport.group import TensorGroup
from apportion.transport.shared import SharedExchange
from apportion.transport.shared_code import add_up

_REDUCTION = np.dtype([(name, "i8") for name in ("pace", "exchange", "spans", "most", "num")])
"""Addresses of the pacer's and of the exchange's state, and of `most` pairs of times, of which `num` are set."""


def _reduce(context, floats, rows, columns):
    a = carray(pointer(context), 1, _REDUCTION)[0]
    settle(a.pace)
    begun = now_ns()
    add_up(a.exchange, floats, rows * columns)
    spans_E2 = carray(pointer(a.spans), (a.most, 2), np.int64)
    if a.num < a.most:
        spans_E2[a.num, 0], spans_E2[a.num, 1] = begun, now_ns()
    a.num += 1
    start(a.pace)  # what an emulated device does slowly is computing, not exchanging


def _pause(context):
    settle(carray(pointer(context), 1, _REDUCTION)[0].pace)


_pause_code: Any = cfunc(types.void(types.int64), cache=True, error_model="numpy")(_pause)
_code: Any = cfunc(types.void(*[types.int64] * 4), cache=True, error_model="numpy")(_reduce)


class PacedAllReduce:
    """See `model.reduction.AllReduce`."""

    def __init__(self, group: TensorGroup, pacer: Pacer) -> None:
        self._group, self._pacer = group, pacer
        self._spans: list[tuple[float, float]] = []

    def __call__(self, partial: Tensor) -> Tensor:
        self._pacer.settle()
        begun_s = time.perf_counter()
        total = self._group.all_reduce(partial)
        self._spans.append((begun_s, time.perf_counter()))
        self._pacer.start()
        return total

    def take_spans(self) -> list[tuple[float, float]]:
        """When exchanges began and ended (`time.perf_counter`) since they were last taken."""
        spans, self._spans = self._spans, []
        return spans


class CompiledPacedAllReduce(PacedAllReduce):
    """See `model.reduction.CompiledAllReduce`. Through `shared` memory, `most` times before its spans are taken."""

    function: int = _code.address

    def __init__(self, group: TensorGroup, pacer: Pacer, shared: SharedExchange, most: int) -> None:
        super().__init__(group, pacer)
        self.pause: int | None = _pause_code.address if pacer.speed < 1 else None
        self._shared = shared
        self._spans_E2 = np.zeros((most, 2), np.int64)
        self._state = np.zeros((), _REDUCTION)
        self._state[()] = (pacer.address, shared.address, self._spans_E2.ctypes.data, most, 0)
        self.context = self._state.ctypes.data

    def __call__(self, partial: Tensor) -> Tensor:
        if partial.dtype != torch.float32:
            return super().__call__(partial)
        total = partial.contiguous()
        _code.ctypes(self.context, total.data_ptr(), 1, total.numel())
        self.check()
        return total

    def check(self) -> None:
        self._shared.check()

    def take_spans(self) -> list[tuple[float, float]]:
        num, self._state["num"] = int(self._state["num"]), 0
        assert num <= len(self._spans_E2)
        compiled = [(begun * 1e-9, ended * 1e-9) for begun, ended in self._spans_E2[:num].tolist()]
        return [*super().take_spans(), *compiled]


def paced_all_reduce(group: TensorGroup, pacer: Pacer, most: int) -> PacedAllReduce:
    if group.shared is None:
        return PacedAllReduce(group, pacer)
    return CompiledPacedAllReduce(group, pacer, group.shared, most)
