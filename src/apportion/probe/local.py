"""This machine's devices: its CUDA GPUs from the driver, else its CPU as measured. Needs no torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import psutil

from apportion.types import cpu, pcie
from apportion.types.cluster import Device

Figure = TypeVar("Figure")

LOCAL_HOST = "local"
MEMORY_FRACTION = 0.8
"""Share of the memory now available that a device may use unless told otherwise."""
GPU_LAYER_OVERHEAD_S, GPU_STEP_OVERHEAD_S = 1.5e-4, 5e-4
"""Assumed: not measured yet."""


def local_devices() -> tuple[Device, ...]:
    """The CUDA GPUs, or the CPU where there is none."""
    return cuda_devices() or (measure_cpu(1),)


def all_local_devices(num_cpu_devices: int) -> tuple[Device, ...]:
    """The CUDA GPUs and the CPU, of which `num_cpu_devices` are made."""
    return (*cuda_devices(), measure_cpu(num_cpu_devices))


def measure_cpu(num_devices: int) -> Device:
    """One of `num_devices` that share the cores evenly: bytes per second that its threads read in a matrix-vector
    product and that one of them copies out of the page cache, and FLOP/s of an fp32 product."""
    cores = len(os.sched_getaffinity(0))
    num_threads = max(1, cores // num_devices)
    read_bytes_per_s, flops_per_s, stream_bytes_per_s = _measured_rates(num_threads)
    return Device(
        id="cpu",
        host=LOCAL_HOST,
        kind="cpu",
        torch_device="cpu",
        memory_bytes=int(psutil.virtual_memory().available * MEMORY_FRACTION),
        reserved_bytes=0,
        mem_bytes_per_s=read_bytes_per_s,
        flops_per_s=cpu.rates_per_format(flops_per_s),
        layer_overhead_s=cpu.LAYER_OVERHEAD_S,
        step_overhead_s=cpu.STEP_OVERHEAD_S,
        num_threads=num_threads,
        host_cores=cores,
        speed=1.0,
        source="measured",
        stream_bytes_per_s=stream_bytes_per_s,
    )


def product_rates(num_threads: int) -> dict[str, float] | None:
    """FLOP/s of the engine's own products by weight format; takes seconds. None where torch is not there or fails."""
    if find_spec("torch") is None:
        return None
    try:
        printed = _printed(["-m", "apportion.model.product_rates"], num_threads)
    except subprocess.CalledProcessError:
        return None
    return {name: float(rate) for name, rate in json.loads(printed).items()}


def _measured_rates(num_threads: int) -> tuple[float, float, float]:
    """As cpu_rates.py prints them."""
    printed = _printed([str(Path(__file__).with_name("cpu_rates.py"))], num_threads)
    read, multiply, copied = (float(figure) for figure in printed.split())
    return read, multiply, copied


def _printed(arguments: list[str], num_threads: int) -> str:
    """By a process of its own: BLAS reads its number of threads at import."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **dict.fromkeys(variables, str(num_threads))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def cuda_devices() -> tuple[Device, ...]:
    """Rates are peaks computed from clocks, bus width and cores as the driver states them; () without a driver."""
    return _each_card(_cuda_device)


def cuda_names() -> dict[str, str]:
    """The driver's names of the CUDA GPUs, by torch device; {} without a driver."""
    cards = _each_card(lambda nvml, index: nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
    return {f"cuda:{index}": name for index, name in enumerate(cards)}


def _each_card(read: Callable[[Any, int], Figure]) -> tuple[Figure, ...]:
    """What `read` finds out of every card, through NVML; () without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        return tuple(read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
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
        # Without tensor cores counted, 16-bit and int8 products are at least as fast as fp32.
        flops_per_s=dict.fromkeys(("fp32", "bf16", "fp16", "int8"), flops_per_s),
        layer_overhead_s=GPU_LAYER_OVERHEAD_S,
        step_overhead_s=GPU_STEP_OVERHEAD_S,
        num_threads=1,
        host_cores=None,
        speed=1.0,
        # Figures of this very card: a run here may replace them, as it may not replace a catalogued card's.
        source="measured",
        stream_bytes_per_s=pcie.stream_bytes_per_s(
            nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
        ),
    )
