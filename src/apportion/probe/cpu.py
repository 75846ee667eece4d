"""This machine's processor: what so many of its threads reach, and the device that they make. Needs no torch."""

import os
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec

from apportion.probe.processor import cached_bytes, num_cores
from apportion.probe.saved import read_disk_rate, read_rates
from apportion.types import cpu
from apportion.types.children import python
from apportion.types.cluster import LOCAL_HOST, Cache, Device
from apportion.types.cpu import CpuRates
from apportion.types.errors import EngineError
from apportion.types.json_text import parse_json

_MOST_S = 300.0
"""Of a measurement that takes a second or so."""
MEMORY_FRACTION = 0.8
"""Share of the memory now available that a device may use unless told otherwise."""
HOST_MEMORY_FRACTION = 0.9
"""Share of the memory now available that is left for plans beside the processes themselves."""


def host_memory_bytes() -> int:
    return int(_available_bytes() * HOST_MEMORY_FRACTION)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductRates:
    """What the engine's own products reach."""

    read_bytes_per_s: float
    flops_per_s: dict[str, float]


def measure_cpu(num_devices: int) -> Device:
    """One of `num_devices` that share the cores evenly, by what `apportion probe` once saved of this machine, else
    measured now."""
    num_threads, cores = max(1, num_cores() // num_devices), num_cores()
    saved = read_rates()
    own = saved.get(num_threads) or measured_rates(num_threads)
    if num_threads == cores:
        together = own.read_bytes_per_s
    elif cores in saved:
        together = saved[cores].read_bytes_per_s
    else:
        together = read_bytes_per_s(cores)
    return cpu_device(own, num_threads, max(own.read_bytes_per_s, together), read_disk_rate())


def read_bytes_per_s(num_threads: int) -> float:
    """What so many of BLAS's threads read now out of memory, all together."""
    return float(_printed("apportion.probe.cpu_rates", num_threads, "read"))


def cpu_device(
    rates: CpuRates, num_threads: int, host_bytes_per_s: float, disk_bytes_per_s: float | None
) -> Device:
    return Device(
        id="cpu",
        host=LOCAL_HOST,
        kind="cpu",
        torch_device="cpu",
        memory_bytes=int(_available_bytes() * MEMORY_FRACTION),
        reserved_bytes=0,
        mem_bytes_per_s=rates.read_bytes_per_s,
        flops_per_s=rates.flops_per_s,
        layer_overhead_s=cpu.LAYER_OVERHEAD_S,
        step_overhead_s=cpu.STEP_OVERHEAD_S,
        num_threads=num_threads,
        host_cores=num_cores(),
        speed=1.0,
        source="measured",
        stream_bytes_per_s=rates.copied_bytes_per_s,
        host_bytes_per_s=host_bytes_per_s,
        cache=_cache(rates, num_threads),
        host_memory_bytes=host_memory_bytes(),
        disk_bytes_per_s=disk_bytes_per_s,
    )


def _cache(rates: CpuRates, num_threads: int) -> Cache | None:
    per_thread = cached_bytes()
    if per_thread is None:
        return None
    return Cache(
        num_bytes=per_thread * num_threads,
        read_bytes_per_s=rates.cached_read_bytes_per_s,
        copied_bytes_per_s=rates.cached_copied_bytes_per_s,
    )


def measured_rates(num_threads: int) -> CpuRates:
    """Of BLAS's products; the engine's, whose fp32 one is as fast within 5 % (docs/benchmarks/linear-formats.md), are
    assumed from them."""
    printed = _printed("apportion.probe.cpu_rates", num_threads)
    read, multiply, copied, cached_copied, cached_read = (float(figure) for figure in printed.split())
    return CpuRates(
        read_bytes_per_s=read,
        flops_per_s=cpu.rates_per_format(multiply),
        copied_bytes_per_s=copied,
        cached_read_bytes_per_s=cached_read,
        cached_copied_bytes_per_s=cached_copied,
    )


def product_rates(num_threads: int, most_s: float | None = None) -> ProductRates | None:
    """Takes seconds. None where torch is not there or fails, or has not ended after `most_s`."""
    if find_spec("torch") is None:
        return None
    try:
        printed = parse_json(_printed("apportion.model.product_rates", num_threads, most_s=most_s))
    except EngineError:
        return None
    return ProductRates(read_bytes_per_s=printed["read_bytes_per_s"], flops_per_s=printed["flops_per_s"])


def _available_bytes() -> int:
    import psutil  # plans for other machines do without

    return psutil.virtual_memory().available


def _printed(module: str, num_threads: int, *arguments: str, most_s: float | None = None) -> str:
    """By a process of its own: BLAS reads its number of threads at import. It takes the code that is best for the
    processor, as the engine's own products do, whatever the environment has chosen for BLAS."""
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(variables, str(num_threads))}
    environment.pop("OPENBLAS_CORETYPE", None)
    try:
        return subprocess.run(
            python("-m", module, *arguments),
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=most_s or _MOST_S,
        ).stdout
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        reason = f"nothing after {error.timeout:.0f} s"
    raise EngineError(f"this machine's processor could not be measured ({reason}); try again")
