"""A GPU of the catalogue as a device to plan for: datasheet peaks times what programs reach of them.

Sources of the shares, by what was published: `memory_share` and `layer_overhead_s` fit the 16-bit decode speeds of
benchmarks/published/decode_speeds.toml as time = bytes / (share × bandwidth) + layers × overhead; there is no term
per step, so `step_overhead_s` is 0. `COMPUTE_SHARE` is no fit: prefill of 7B and 8B models in F16
(github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference README at 00dd2bd) reaches 0.57 to 0.94 of the catalogue's
rate on GeForce RTX 3090 and 4090, 0.35 to 0.7 on Apple, but 0.13 to 0.35 on A100, H100 and workstation cards.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from apportion.catalog.gpus import COMPUTE_CAPABILITIES, Gpu, GpuKind, find_gpu
from apportion.catalog.processors import Processor
from apportion.types import cpu
from apportion.types.cluster import Device, Spread
from apportion.types.errors import ClusterError
from apportion.types.pcie import REACHED_SHARE
from apportion.types.units import WEIGHT_BITS, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    memory_share: float
    layer_overhead_s: float


REACHED: dict[GpuKind, Reached] = {
    "cuda": Reached(memory_share=0.87, layer_overhead_s=45e-6),
    "metal": Reached(memory_share=0.85, layer_overhead_s=160e-6),
    "rocm": Reached(memory_share=0.85, layer_overhead_s=120e-6),
    "xpu": Reached(memory_share=0.80, layer_overhead_s=75e-6),
    "npu": Reached(memory_share=0.80, layer_overhead_s=75e-6),
}
"""Of `npu` nothing is published: assumed as of xpu, the lowest."""
COMPUTE_SHARE = 0.6

PUBLISHED_SPREAD = Spread(
    decode=0.18, prefill=0.6, source="errors against published decode speeds; prefill assumed"
)
"""Decode: 68 % of the 127 speeds in benchmarks/published were predicted within this by constants chosen on the other
sources alone (accuracy.py prints it, 2026-11-22). Prefill: assumed, for the shares above."""

COMMON_CARDS = ("rtx-3050-8gb", "rtx-3060-12gb", "rtx-4060-ti-16gb", "rtx-3090", "rtx-5090")
"""The consumer cards of 8, 12, 16, 24 and 32 GB that are easiest to come by."""

DRIVER_SHARE, DRIVER_BYTES = 0.03, 512 * 2**20
"""Reserved on a card of its own memory: what the driver does not show (see gpus.toml), and its context. The second is
assumed."""
SYSTEM_SHARE = 1 / 4
"""Reserved where the memory is the system's, and more of it where there is little: gpus.toml says what macOS keeps."""
SMALL_SYSTEM_BYTES, SMALL_SYSTEM_SHARE = 36 * 2**30, 1 / 3

STAGED = 0.5
"""Of a card's connector: staged in host memory, every byte crosses PCIe twice (few cards reach each other)."""

CPU_CORES = 8
CPU_READ_SHARE = 0.7
CPU_READ_BYTES_PER_S = CPU_READ_SHARE * 2 * 64 / 8 * 3.2e9
"""A CPU of which only the memory is known is taken for a desktop's: two channels of DDR4-3200, 0.7 of them read,"""
CPU_CORES_TO_READ = 2
"""so many cores of which read as much as all,"""
CPU_FLOPS_PER_S = 0.6 * CPU_CORES * 2 * 2 * 8 * 3.5e9
"""and 8 cores at 3.5 GHz with two 8-wide fused multiply-adds a cycle (AVX2), of which 0.6 are reached."""
CPU_STREAM_BYTES_PER_S = 8e9
"""One core's copy out of the page cache; assumed, a little below what a server's core did here (10 GB/s), and at most
half of what is read."""
SYSTEM_CPU_SHARE = 0.2
"""Of a computer's memory, what is left to its system and its other programs; as on this machine (probe/cpu.py)."""
CHANGED_FACTOR = 2
"""Cards are changed by soldering on chips of twice the size: 2080 Ti 22 GB, 3080 20 GB, 4090 48 GB."""


def gpu_device(gpu: Gpu, device_id: str, host: str) -> Device:
    """All of its memory, of which the reserve is for driver and system."""
    reached = REACHED[gpu.kind]
    return Device(
        id=device_id,
        host=host,
        kind=gpu.kind,
        torch_device=torch_device(gpu.kind, 0),
        memory_bytes=gpu.memory_bytes,
        reserved_bytes=reserve_bytes(gpu),
        mem_bytes_per_s=gpu.mem_bytes_per_s * reached.memory_share,
        flops_per_s={
            # Integer units multiply where activations are integers too: beside 16-bit ones int8 weights are widened.
            name: rate * COMPUTE_SHARE
            for name, rate in gpu.flops_per_s.items()
            if name in WEIGHT_BITS and name != "int8"
        },
        layer_overhead_s=reached.layer_overhead_s,
        step_overhead_s=0.0,
        num_threads=1,
        host_cores=None,
        speed=1.0,
        source="datasheet",
        stream_bytes_per_s=gpu.pcie_bytes_per_s and gpu.pcie_bytes_per_s * REACHED_SHARE,
        spread=PUBLISHED_SPREAD,
        host_bytes_per_s=None if gpu.pcie_bytes_per_s else gpu.mem_bytes_per_s * reached.memory_share,
        compute_capability=COMPUTE_CAPABILITIES.get(gpu.architecture),
    )


def common_cards() -> tuple[Device, ...]:
    """What most people could add, one of each size of memory, the smallest first."""
    return tuple(gpu_device(find_gpu(name), name, "") for name in COMMON_CARDS)


def reserve_bytes(gpu: Gpu) -> int:
    if gpu.pcie_bytes_per_s is not None:
        return round(gpu.memory_bytes * DRIVER_SHARE) + DRIVER_BYTES
    small = gpu.memory_bytes <= SMALL_SYSTEM_BYTES
    return round(gpu.memory_bytes * (SMALL_SYSTEM_SHARE if small else SYSTEM_SHARE))


def with_memory(gpu: Gpu, device: Device, memory_bytes: int, place: str) -> Device:
    """With what was written: all of it is for the engine. A card's own memory may have been changed for at most twice
    what it is sold with. Raises ClusterError beyond that."""
    sold = max((gpu.memory_bytes, *gpu.memory_options_bytes))
    most = sold if gpu.pcie_bytes_per_s is None else CHANGED_FACTOR * sold
    if memory_bytes > most:
        changed = "" if most == sold else f", and changed ones have at most {format_bytes(most)}"
        raise ClusterError(
            f"{place}: {format_bytes(memory_bytes)} is more than the {format_bytes(sold)} of {gpu.key}{changed}"
        )
    assumed = (
        f"a {gpu.key} changed to {format_bytes(memory_bytes)} ({format_bytes(sold)} as sold), as fast as before"
        if memory_bytes > sold
        else device.assumed
    )
    return replace(device, memory_bytes=memory_bytes, reserved_bytes=0, assumed=assumed)


def check_stream(gpu: Gpu, stream_bytes_per_s: float | None, place: str) -> None:
    """Raises ClusterError for a rate at which no weights can come to this GPU."""
    if stream_bytes_per_s is None:
        return
    if gpu.pcie_bytes_per_s is None:
        raise ClusterError(
            f"{place}: the memory of {gpu.key} is the system's, there is nowhere to stream from"
        )
    if stream_bytes_per_s > gpu.pcie_bytes_per_s:
        most, asked = (f"{rate / 1e9:.3g} GB/s" for rate in (gpu.pcie_bytes_per_s, stream_bytes_per_s))
        raise ClusterError(f"{place}: {asked} is more than the {most} of the connector of {gpu.key}")


def torch_device(kind: GpuKind, index: int) -> str:
    """PyTorch calls ROCm's devices cuda, and Apple's single one mps."""
    return "mps" if kind == "metal" else f"{kind if kind in ('xpu', 'npu') else 'cuda'}:{index}"


DESKTOP = Processor(
    key="desktop",
    name="a desktop's CPU: 8 cores at 3.5 GHz, two channels of DDR4-3200",
    memory_bytes=2**34,
    memory_options_bytes=(),
    mem_bytes_per_s=CPU_READ_BYTES_PER_S / CPU_READ_SHARE,
    read_share=CPU_READ_SHARE,
    cores=CPU_CORES,
    flops_per_s=CPU_FLOPS_PER_S / COMPUTE_SHARE,
    aliases=(),
    source=(),
)
"""What a CPU is taken for of which only the memory is known."""


def processor_device(
    processor: Processor, device_id: str, host: str, memory_bytes: int | None, num_devices: int = 1
) -> Device:
    """One of `num_devices` that share its cores and memory channels evenly. Where no memory is written a share of its
    own is reserved for the system."""
    num_threads = max(1, processor.cores // num_devices)
    read_bytes_per_s = processor.mem_bytes_per_s * processor.read_share
    return Device(
        id=device_id,
        host=host,
        kind="cpu",
        torch_device="cpu",
        memory_bytes=memory_bytes or processor.memory_bytes // num_devices,
        reserved_bytes=0 if memory_bytes else round(processor.memory_bytes // num_devices * SYSTEM_CPU_SHARE),
        mem_bytes_per_s=read_bytes_per_s * min(1.0, num_threads / CPU_CORES_TO_READ),
        flops_per_s=cpu.rates_per_format(
            processor.flops_per_s * COMPUTE_SHARE * num_threads / processor.cores
        ),
        layer_overhead_s=cpu.LAYER_OVERHEAD_S,
        step_overhead_s=cpu.STEP_OVERHEAD_S,
        num_threads=num_threads,
        host_cores=processor.cores,
        speed=1.0,
        source="datasheet",
        stream_bytes_per_s=min(CPU_STREAM_BYTES_PER_S, read_bytes_per_s / 2),
        host_bytes_per_s=read_bytes_per_s,
        assumed=processor.name if processor is DESKTOP else None,
    )


def inside_bytes_per_s(gpus_by_host: Iterable[tuple[str, Gpu]]) -> dict[str, float]:
    """By host: half the peak of the slowest card's connector. Left out where no GPU has one."""
    slowest: dict[str, float] = {}
    for host, gpu in gpus_by_host:
        if gpu.pcie_bytes_per_s is not None:
            slowest[host] = min(slowest.get(host, gpu.pcie_bytes_per_s), gpu.pcie_bytes_per_s)
    return {host: bytes_per_s * STAGED for host, bytes_per_s in slowest.items()}
