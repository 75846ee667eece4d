"""Sums over a group's members: as layers call them, and as an operation of a table does (`kernels.layer.reduce`)."""

import ctypes
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a partial result over the members of the group."""
_FUNCTION = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)


@runtime_checkable
class CompiledAllReduce(Protocol):
    """At `function` lies code of (`context`, address, rows, columns): it replaces fp32 numbers by their sum."""

    @property
    def function(self) -> int: ...

    @property
    def pause(self) -> int | None:
        """Code of (`context`) to call where an emulated device may sleep, so that it reads its weights as evenly as a
        slow device would."""
        ...

    @property
    def context(self) -> int: ...

    def __call__(self, partial: Tensor) -> Tensor: ...

    def check(self) -> None:
        """Raises what went wrong in calls of the code, which itself cannot."""
        ...


class CalledBack:
    """A CompiledAllReduce whose code calls Python."""

    context, pause = 0, None

    def __init__(self, all_reduce: AllReduce) -> None:
        self._all_reduce = all_reduce
        self._error: BaseException | None = None
        self._code = _FUNCTION(self._reduce)
        function = ctypes.cast(self._code, ctypes.c_void_p).value
        assert function is not None
        self.function = function

    def __call__(self, partial: Tensor) -> Tensor:
        return self._all_reduce(partial)

    def check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _reduce(self, _context: int, address: int, rows: int, columns: int) -> None:
        if self._error is not None:
            return
        floats = (ctypes.c_float * (rows * columns)).from_address(address)
        partial = torch.frombuffer(floats, dtype=torch.float32).view(rows, columns)
        try:
            partial.copy_(self._all_reduce(partial))
        except BaseException as error:
            self._error = error


def compiled(all_reduce: AllReduce) -> CompiledAllReduce:
    return all_reduce if isinstance(all_reduce, CompiledAllReduce) else CalledBack(all_reduce)
