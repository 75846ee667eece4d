"""Everything that `apportion probe` measures of this machine, and the cluster file it makes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from apportion.probe.hardware import hardware_names
from apportion.probe.host_rates import LinkRates, copy_bytes_per_s, loopback_rates, unix_socket_rates
from apportion.probe.local import CPU_HALF_FRACTION, LOCAL_HOST, cuda_devices, measure_cpu
from apportion.types.cluster import Cluster, Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """`names` are by device id."""

    devices: tuple[Device, ...]
    names: dict[str, str]
    copy_bytes_per_s: float
    unix_socket: LinkRates
    loopback: LinkRates


NUM_STEPS = 4
CPU_ROUNDS = 3


def probe_machine(begin: Callable[[str], object]) -> Machine:
    """`begin` is told what comes next, `NUM_STEPS` times."""
    begin("the processor's memory and arithmetic")
    processor = _best_processor([measure_cpu(1) for _ in range(CPU_ROUNDS)])
    begin("copies in host memory")
    copies = copy_bytes_per_s()
    begin("messages between two processes")
    unix_socket, loopback = unix_socket_rates(), loopback_rates()
    begin("the cards, through their driver")
    devices = (*cuda_devices(), processor)
    return Machine(
        devices=devices,
        names=hardware_names(Cluster(devices=devices, links=())),
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


def cluster_toml(machine: Machine) -> str:
    """A file for `--cluster`. Overheads are left out: they are assumed until runs here calibrate them."""
    link = machine.unix_socket
    parts = [
        "# Written by `apportion probe`. Links to other hosts are not measured: add [[link]] tables for them.\n"
        f"# Host memory copies {machine.copy_bytes_per_s:.3g} B/s; TCP on this host: "
        f"{machine.loopback.latency_s:.3g} s, {machine.loopback.bytes_per_s:.3g} B/s.",
        *(_device_toml(device, machine.names[device.id]) for device in machine.devices),
        f'[[link]]\nsrc = "{LOCAL_HOST}"\ndst = "{LOCAL_HOST}"\n'
        f"latency_s = {link.latency_s:.3g}     # measured: half a round trip between two processes\n"
        f"bytes_per_s = {link.bytes_per_s:.3g}  # measured\n",
    ]
    return "\n\n".join(parts)


def _device_toml(device: Device, name: str) -> str:
    cpu = device.kind == "cpu"
    how = "measured" if cpu else "computed from the driver's clocks and widths"
    half = f"; bf16 and fp16 assumed at {CPU_HALF_FRACTION:g} of fp32" if cpu else ", without tensor cores"
    flops = ", ".join(f"{format_name} = {rate:.3g}" for format_name, rate in device.flops_per_s.items())
    lines = [
        f"[[device]]  # {name}",
        f'id = "{device.id}"',
        f'host = "{device.host}"',
        f'kind = "{device.kind}"',
        f'torch_device = "{device.torch_device}"',
        f'memory = "{device.memory_bytes // 2**20}MiB"  # most of what is free now',
        f"mem_bytes_per_s = {device.mem_bytes_per_s:.3g}  # {how}",
        f"flops_per_s = {{ {flops} }}  # {how}{half}",
    ]
    if device.stream_bytes_per_s is not None:
        source = "measured, out of the page cache" if cpu else "a share of its connector's"
        lines.append(
            f'stream = "{device.stream_bytes_per_s / 1e9:.3g} GB/s"  # of weights not held; {source}'
        )
    if cpu:
        lines.append(f"num_threads = {device.num_threads}")
    return "\n".join(lines)
