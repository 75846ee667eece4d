"""Everything that `apportion probe` measures of one machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from apportion.probe.hardware import hardware_names
from apportion.probe.host_rates import LinkRates, copy_bytes_per_s, loopback_rates, unix_socket_rates
from apportion.probe.local import cuda_devices, measure_cpu, product_rates
from apportion.types.cluster import Cluster, Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`names` are by device id. `products_measured`: the processor's rates are those of the engine's own product in
    each weight format; without torch they are of an fp32 product, and assumed for the others."""

    devices: tuple[Device, ...]
    names: dict[str, str]
    products_measured: bool
    copy_bytes_per_s: float
    unix_socket: LinkRates
    loopback: LinkRates


NUM_STEPS = 5
CPU_ROUNDS = 3


def probe_machine(begin: Callable[[str], object]) -> Machine:
    """`begin` is told what comes next, `NUM_STEPS` times."""
    begin("the processor's memory and arithmetic")
    processor = _best_processor([measure_cpu(1) for _ in range(CPU_ROUNDS)])
    begin("the processor's products in the weight formats")
    rates = product_rates(processor.num_threads)
    if rates is not None:
        processor = replace(processor, flops_per_s=rates)
    begin("copies in host memory")
    copies = copy_bytes_per_s()
    begin("messages between two processes")
    unix_socket, loopback = unix_socket_rates(), loopback_rates()
    begin("the cards, through their driver")
    devices = (*cuda_devices(), processor)
    return Machine(
        devices=devices,
        names=hardware_names(Cluster(devices=devices, links=())),
        products_measured=rates is not None,
        copy_bytes_per_s=copies,
        unix_socket=unix_socket,
        loopback=loopback,
    )


def _best_processor(measured: Sequence[Device]) -> Device:
    """Each rate where it was least disturbed."""
    names = measured[0].flops_per_s
    return replace(
        measured[0],
        mem_bytes_per_s=max(device.mem_bytes_per_s for device in measured),
        flops_per_s={name: max(device.flops_per_s[name] for device in measured) for name in names},
        stream_bytes_per_s=max(device.stream_bytes_per_s or 0.0 for device in measured),
    )
