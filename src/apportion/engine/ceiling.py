"""How fast a device reads its memory: what no decode step can beat that has to read its weights once."""

import os
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import perf_counter

import torch

from apportion.engine import processes
from apportion.types.cluster import Device
from apportion.types.errors import EngineError

_CPU_BYTES, _CUDA_BYTES = 2**27, 2**30
"""Beyond the caches of the devices meant here."""
_REPEATS = 10
_MOST_S = 120.0


def read_bytes_per_s(device: Device, cores: frozenset[int]) -> float:
    """The best of several sums over a large buffer, in a process of its own, at the device's emulated speed.

    Its threads run on `cores`, on any where there are none.
    """
    processes.preload([__name__])
    ours, theirs = Pipe(duplex=False)
    arguments = (theirs, device.torch_device, device.num_threads, cores)
    process = processes.start(_measure, arguments, f"the measurement of device {device.id}")
    theirs.close()
    with ours:
        try:
            if not ours.poll(_MOST_S):
                raise EOFError
            rate = ours.recv()
        except EOFError:
            process.kill()
            raise EngineError(f"how fast device {device.id} reads could not be measured; run again") from None
    process.join()
    return rate * device.speed


def _measure(
    result: "Connection[float, None]",
    torch_device: str,
    num_threads: int,
    cores: frozenset[int],
) -> None:
    if cores:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(num_threads)
    on_cpu = torch_device == "cpu"
    buffer = torch.ones((_CPU_BYTES if on_cpu else _CUDA_BYTES) // 4, device=torch_device)
    wait = _nothing if on_cpu else torch.cuda.synchronize
    result.send(buffer.nbytes / min(_seconds(buffer, wait) for _ in range(_REPEATS)))


def _seconds(buffer: torch.Tensor, wait: Callable[[], object]) -> float:
    wait()
    begun_s = perf_counter()
    buffer.sum()
    wait()
    return perf_counter() - begun_s


def _nothing() -> None:
    pass
