"""Everything that `apportion probe` measures of one machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from apportion.probe.cpu import cpu_device, measured_rates, product_rates
from apportion.probe.disk import disk_bytes_per_s
from apportion.probe.hardware import hardware_names
from apportion.probe.host_rates import LinkRates, copy_bytes_per_s, loopback_rates, unix_socket_rates
from apportion.probe.local import cuda_devices
from apportion.probe.processor import num_cores
from apportion.types.cache import cache_folder
from apportion.types.cluster import Cluster, Device
from apportion.types.cpu import CpuRates


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`names` are by device id, `threads` what one thread of the processor reaches alone, and all together, by their
    number. `products_measured`: these are rates of the engine's own products; without torch they are BLAS's in fp32,
    and assumed for the other weight formats."""

    devices: tuple[Device, ...]
    names: dict[str, str]
    threads: dict[int, CpuRates]
    products_measured: bool
    copy_bytes_per_s: float
    disk_bytes_per_s: float | None
    """Of the cache folder's disk, past the page cache; None where that cannot be read so."""
    unix_socket: LinkRates
    loopback: LinkRates


NUM_STEPS = 6
CPU_ROUNDS, THOROUGH_ROUNDS = 2, 3
PRODUCTS_S = 8.0
"""The engine's own products are measured for so long at most, unless thoroughly: compiling them takes longer where that
was never done. With the other steps it makes 15 seconds on two cores."""


def probe_machine(begin: Callable[[str], object], *, thorough: bool = False) -> Machine:
    """`begin` is told what comes next, `NUM_STEPS` times."""
    rounds = THOROUGH_ROUNDS if thorough else CPU_ROUNDS
    cores = num_cores()
    begin("the processor's memory and arithmetic")
    threads = {number: _best([measured_rates(number) for _ in range(rounds)]) for number in {1, cores}}
    begin("the processor's products in the weight formats")
    products = _with_products(threads, None if thorough else PRODUCTS_S)
    threads = products or threads
    begin("copies in host memory")
    copies = copy_bytes_per_s()
    begin("the disk")
    disk = disk_bytes_per_s(cache_folder())
    begin("messages between two processes")
    unix_socket, loopback = unix_socket_rates(), loopback_rates()
    begin("the cards, through their driver")
    devices = (*cuda_devices(), cpu_device(threads[cores], cores, threads[cores].read_bytes_per_s, disk))
    return Machine(
        devices=devices,
        names=hardware_names(Cluster(devices=devices, links=())),
        threads=threads,
        products_measured=products is not None,
        copy_bytes_per_s=copies,
        disk_bytes_per_s=disk,
        unix_socket=unix_socket,
        loopback=loopback,
    )


def _with_products(threads: Mapping[int, CpuRates], most_s: float | None) -> dict[int, CpuRates] | None:
    """What the engine's own products reach in place of BLAS's; None where that cannot be measured within `most_s`."""
    ends_s = None if most_s is None else perf_counter() + most_s
    measured: dict[int, CpuRates] = {}
    for number, rates in threads.items():
        left_s = None if ends_s is None else max(0.0, ends_s - perf_counter())
        products = product_rates(number, left_s)
        if products is None:
            return None
        measured[number] = replace(
            rates, read_bytes_per_s=products.read_bytes_per_s, flops_per_s=products.flops_per_s
        )
    return measured


def _best(measured: Sequence[CpuRates]) -> CpuRates:
    """Each rate where it was least disturbed."""
    names = measured[0].flops_per_s
    return CpuRates(
        read_bytes_per_s=max(rates.read_bytes_per_s for rates in measured),
        flops_per_s={name: max(rates.flops_per_s[name] for rates in measured) for name in names},
        copied_bytes_per_s=max(rates.copied_bytes_per_s for rates in measured),
        cached_read_bytes_per_s=max(rates.cached_read_bytes_per_s for rates in measured),
        cached_copied_bytes_per_s=max(rates.cached_copied_bytes_per_s for rates in measured),
    )
