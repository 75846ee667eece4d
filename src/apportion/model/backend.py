"""What a kind of device has to bring along to run a stage: everything else in `model` is the same for all.

To add one, write a `Backend` in `backends/`, choose it in `backends/choose.py`, and hand it to
`tests/parity/test_backends.py`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from apportion.model.batch import FlatBatch
from apportion.model.decoder_stage import StageModules, StageProgram
from apportion.model.kv_pool import KVPool, PoolTensors
from apportion.model.reduction import AllReduce
from apportion.model.weights.load_memory import LoadMemory
from apportion.model.weights.weight_backend import WeightBackend
from apportion.types.request import BlockMove, ScheduledBatch


class Backend(WeightBackend, Protocol):
    """Holds and computes one member's share of a stage on one device."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of the KV cache."""
        ...

    def prepare(self, batch: ScheduledBatch) -> FlatBatch:
        """The batch as this backend's attention reads it."""
        ...

    def kv_pool(self, tensors: PoolTensors) -> KVPool: ...

    def programs(
        self, modules: StageModules, pool: Any, hidden_size: int, all_reduce: AllReduce | None
    ) -> Sequence[StageProgram | None]:
        """What runs in place of embedding, layers and final norm, by the buffer in which the first streamed layer
        arrives; None where they are called one by one.

        `kv_pool` made the pool; `all_reduce` is None for a member alone.
        """
        ...

    def through_host(self, all_reduce: AllReduce) -> AllReduce:
        """The reduction, which takes tensors of the host, for tensors of the device."""
        ...

    def block_mover(self, pool: PoolTensors, num_swap_blocks: int) -> "BlockMover": ...

    def warm_up(self, weight_format: str, kv_format: str) -> None:
        """Loads what products and attention in these formats need, so that its memory is not counted as a stage's."""
        ...


class BlockMover(Protocol):
    """Moves blocks of a pool, also to and from a swap space in the host's memory, which is none of the device's."""

    host_bytes: int
    """The size of the swap space."""

    def apply(self, moves: Sequence[BlockMove]) -> None:
        """Moves in order: one may read what an earlier one has written."""
        ...


class MemoryMeter(LoadMemory, Protocol):
    """Holds a worker to its device's memory budget and measures the peak of what it allocated. While loading, `observe`
    takes the present size into the peak."""

    def start(self, budget_bytes: int) -> None:
        """From here on everything allocated counts, and the budget holds; so does what is left of an earlier place."""
        ...

    def left(self) -> None:
        """Called when the place held so far has been given up, before anything else is loaded."""
        ...

    def loaded(self, host_bytes: int) -> None:
        """Called when the stage is loaded and its files are closed; of what the process then holds, `host_bytes` are
        the host's and not the device's."""
        ...

    def stepped(self) -> None:
        """Called after each step."""
        ...

    def peak_bytes(self) -> int: ...
