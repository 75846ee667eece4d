"""How fast a device reads its memory: what no decode step can beat that has to read its weights once."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter

import torch

from apportion.types.cluster import Device

_CPU_BYTES, _CUDA_BYTES = 2**27, 2**30
"""Beyond the caches of the devices meant here."""
_REPEATS = 10


def read_bytes_per_s(device: Device, cores: frozenset[int]) -> float:
    """The best of several sums over a large buffer, in a process of its own, at the device's emulated speed.

    Its threads run on `cores`, on any where there are none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(theirs, device.torch_device, device.num_threads, cores))
    process.start()
    theirs.close()
    with ours:
        rate = ours.recv()
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
