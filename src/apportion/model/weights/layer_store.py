"""Where the weights of streamed layers are kept, as they lie in a layer's buffer: packed, in the stage's format.

They are written once, when a stage is built, and from then on every use of a layer is one straight read. On a CPU they
lie in an unnamed file, which the kernel forgets when the worker ends, however it ends. Of host memory that is its page
cache; a disk is read past it (O_DIRECT), which takes no time of the core. On a GPU they lie in pinned host memory.
"""

import errno
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from apportion.types.cache import cache_folder
from apportion.types.cluster import Device
from apportion.types.errors import ModelError
from apportion.types.units import format_bytes

_STACK_BYTES = 2**18
"""Of the reading thread: address space counts against a worker's budget."""


class LayerStore(Protocol):
    num_buffers: int
    """With two, one layer arrives while another is computed."""

    def keep(self, bytes_B: Tensor) -> None:
        """Takes a copy of a buffer: the weights of one more layer. Raises ModelError where there is no room."""

    def fetch(self, layer: int, bytes_B: Tensor) -> None:
        """Begins to fill a buffer, once what was computed from it so far is done and those before are filled."""

    def arrived(self) -> None:
        """Waits for the first `fetch` that was not waited for, or lets what is computed from now on wait for it."""


OpenStore = Callable[[], LayerStore]


def layer_store(device: Device) -> LayerStore:
    """For what the device streams."""
    if device.kind != "cpu":
        return PinnedStore(device.torch_device)
    return PageCacheStore() if device.stream_from == "host memory" else DiskStore()


class PageCacheStore:
    """Host memory, for a CPU: the thread that computes copies a layer when it is called. A second thread would take the
    same core's time, or the same memory's (docs/benchmarks/streaming.md)."""

    num_buffers = 1

    def __init__(self, folder: Path | None = None) -> None:
        self._file = _LayerFile(folder or cache_folder())

    def keep(self, bytes_B: Tensor) -> None:
        self._file.append(bytes_B)

    def fetch(self, layer: int, bytes_B: Tensor) -> None:
        self._file.read(layer, bytes_B)

    def arrived(self) -> None:
        pass


class DiskStore:
    """A disk, for a CPU: a thread of its own reads the next layer while one is computed."""

    num_buffers = 2

    def __init__(self, folder: Path | None = None) -> None:
        self._file = _LayerFile(folder or cache_folder(), direct=True)
        self._thread = ThreadPoolExecutor(1)
        before = threading.stack_size(_STACK_BYTES)
        self._thread.submit(int).result()  # starts it
        threading.stack_size(before)
        self._fetched: deque[Future[None]] = deque()

    def keep(self, bytes_B: Tensor) -> None:
        self._file.append(bytes_B)

    def fetch(self, layer: int, bytes_B: Tensor) -> None:
        self._fetched.append(self._thread.submit(self._file.read, layer, bytes_B))
        time.sleep(0)  # lets it begin: on the same core it would get its turn milliseconds later

    def arrived(self) -> None:
        self._fetched.popleft().result()


class PinnedStore:
    """Host memory, for a GPU: a side stream copies the next layer while one is computed."""

    num_buffers = 2

    def __init__(self, torch_device: str) -> None:
        self._device = torch.device(torch_device)
        self._layers: list[Tensor] = []
        self._copying = torch.cuda.Stream(self._device)
        self._copied: deque[torch.cuda.Event] = deque()

    def keep(self, bytes_B: Tensor) -> None:
        host_B = torch.empty(len(bytes_B), dtype=torch.uint8, pin_memory=True)
        self._layers.append(host_B.copy_(bytes_B))

    def fetch(self, layer: int, bytes_B: Tensor) -> None:
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            bytes_B.copy_(self._layers[layer], non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._copying)
            self._copied.append(copied)

    def arrived(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied.popleft())


class _LayerFile:
    """Buffers of one size, one behind the other. `direct` passes the page cache by, where the file system can."""

    def __init__(self, folder: Path, *, direct: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._num_layers = 0
        with tempfile.TemporaryFile(dir=folder) as file:
            self._descriptor = _opened_again(file.fileno(), direct=direct)
        weakref.finalize(self, os.close, self._descriptor)

    def append(self, bytes_B: Tensor) -> None:
        missing = memoryview(bytes_B.numpy())  # pyright: ignore[reportArgumentType]
        size = len(missing)
        stop = (self._num_layers + 1) * size
        try:
            os.posix_fallocate(self._descriptor, stop - size, size)
            while missing:
                missing = missing[os.pwrite(self._descriptor, missing, stop - len(missing)) :]
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise
            raise ModelError(
                f"{self._folder} has no room for streamed layer {self._num_layers + 1}, of {format_bytes(size)}:"
                " make room there, set XDG_CACHE_HOME to another folder, or use smaller --weights"
            ) from error
        self._num_layers += 1

    def read(self, layer: int, bytes_B: Tensor) -> None:
        missing = memoryview(bytes_B.numpy())  # pyright: ignore[reportArgumentType]
        stop = (layer + 1) * len(missing)
        while missing:  # one call reads less than 2 GiB
            missing = missing[os.preadv(self._descriptor, [missing], stop - len(missing)) :]


def _opened_again(descriptor: int, *, direct: bool) -> int:
    if direct:
        with suppress(OSError):  # some file systems have no way past the page cache
            return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_DIRECT)
    return os.dup(descriptor)
