"""This machine's devices: its CUDA GPUs from the driver, else its CPU as measured. Needs no torch."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from apportion.probe.cpu import MEMORY_FRACTION, host_memory_bytes, measure_cpu
from apportion.types import pcie
from apportion.types.cluster import LOCAL_HOST, Device

Figure = TypeVar("Figure")

GPU_LAYER_OVERHEAD_S, GPU_STEP_OVERHEAD_S = 1.5e-4, 5e-4
"""Assumed: not measured yet."""


def local_devices() -> tuple[Device, ...]:
    """The CUDA GPUs, or the CPU where there is none."""
    return cuda_devices() or (measure_cpu(1),)


def all_local_devices(num_cpu_devices: int) -> tuple[Device, ...]:
    """The CUDA GPUs and the CPU, of which `num_cpu_devices` are made."""
    return (*cuda_devices(), measure_cpu(num_cpu_devices))


def cuda_devices() -> tuple[Device, ...]:
    """Rates are peaks computed from clocks, bus width and cores as the driver states them; () without a driver."""
    return _each_card(_cuda_device)


def cuda_names() -> dict[str, str]:
    """The driver's names of the CUDA GPUs, by torch device; {} without a driver."""
    cards = _each_card(lambda nvml, index: nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
    return {f"cuda:{index}": name for index, name in enumerate(cards)}


def cuda_memories() -> tuple[tuple[str, int], ...]:
    """The driver's name and the memory of every CUDA GPU; () without a driver."""

    def read(nvml: Any, index: int) -> tuple[str, int]:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetMemoryInfo(handle).total

    return _each_card(read)


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
        host_memory_bytes=host_memory_bytes(),
        compute_capability=_capability(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


def _capability(major: int, minor: int) -> float:
    return major + minor / 10
