"""This machine's devices: its CUDA GPUs from the driver, else one core of its CPU as measured. Needs no torch."""

from collections.abc import Callable
from contextlib import suppress
from time import perf_counter, process_time
from typing import Any

import numpy as np
import psutil

from apportion.types.cluster import Device

LOCAL_HOST = "local"
MEMORY_FRACTION = 0.8
"""Share of the memory now available that a device may use unless told otherwise."""
CPU_OVERHEAD_S = 3e-4
"""Per layer and step: Python and kernel launches."""
GPU_OVERHEAD_S = 1.5e-4
CPU_HALF_FRACTION = 0.1
"""bf16 and fp16 products on CPUs without units for them, relative to fp32: converted element by element."""
READ_BYTES = 64 * 2**20
MEASURE_S = 0.15


def local_devices() -> tuple[Device, ...]:
    """The CUDA GPUs, or the CPU where there is none."""
    return cuda_devices() or (measure_cpu(),)


def measure_cpu() -> Device:
    """One core at full speed: bytes per second read by a matrix-vector product, FLOP/s of an fp32 product.

    Both in one thread, which is what a worker has.
    """
    flops_per_s = _single_threaded(_multiply_flops_per_s)
    half = flops_per_s * CPU_HALF_FRACTION
    return Device(
        id="cpu",
        host=LOCAL_HOST,
        kind="cpu",
        torch_device="cpu",
        memory_bytes=int(psutil.virtual_memory().available * MEMORY_FRACTION),
        reserved_bytes=0,
        mem_bytes_per_s=_single_threaded(_read_bytes_per_s),
        flops_per_s={"fp32": flops_per_s, "bf16": half, "fp16": half},
        overhead_s=CPU_OVERHEAD_S,
        speed=1.0,
        source="measured",
    )


def _single_threaded(measure: Callable[[], float]) -> float:
    """BLAS takes all cores by default: what the process spent on CPU over the time it took is their number."""
    wall_s, cpu_s = perf_counter(), process_time()
    rate = measure()
    cores = (process_time() - cpu_s) / (perf_counter() - wall_s)
    return rate / max(1.0, cores)


def _read_bytes_per_s() -> float:
    rows = 4096
    matrix = np.ones((rows, READ_BYTES // 4 // rows), dtype=np.float32)
    vector = np.ones(matrix.shape[1], dtype=np.float32)
    return READ_BYTES / _best_s(lambda: matrix @ vector)


def _multiply_flops_per_s() -> float:
    size = 512
    matrix = np.ones((size, size), dtype=np.float32)
    return 2 * size**3 / _best_s(lambda: matrix @ matrix)


def _best_s(work: Callable[[], object]) -> float:
    """The shortest of the runs that fit in `MEASURE_S`, after one to warm up."""
    work()
    times: list[float] = []
    while sum(times) < MEASURE_S:
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def cuda_devices() -> tuple[Device, ...]:
    """Rates are peaks computed from clocks, bus width and cores as the driver states them; () without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(_cuda_device(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _cuda_device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
    core_hz = 1e6 * nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    flops_per_s = 2 * nvml.nvmlDeviceGetNumGpuCores(handle) * core_hz
    return Device(
        id=f"cuda{index}",
        host=LOCAL_HOST,
        kind="cuda",
        torch_device=f"cuda:{index}",
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).free * MEMORY_FRACTION),
        reserved_bytes=0,
        mem_bytes_per_s=2 * memory_hz * nvml.nvmlDeviceGetMemoryBusWidth(handle) / 8,
        # Without tensor cores counted, 16-bit products are at least as fast as fp32.
        flops_per_s={"fp32": flops_per_s, "bf16": flops_per_s, "fp16": flops_per_s},
        overhead_s=GPU_OVERHEAD_S,
        speed=1.0,
        source="datasheet",
    )
