"""The file for `--cluster` that a probe writes: docs/cluster-file.md lists its keys."""

from collections.abc import Iterator, Mapping

from apportion.probe.host_rates import LinkRates
from apportion.probe.machine import Machine
from apportion.types.cluster import LOCAL_HOST, Device

_ALONE = "Links to other hosts are not measured: `apportion probe --hosts` does, or add [[link]] tables."


def cluster_toml(machines: Mapping[str, Machine], links: Mapping[tuple[str, str], LinkRates]) -> str:
    """`machines` by host, this one's being "local"; `links` are those between hosts."""
    local = machines[LOCAL_HOST]
    parts = [
        f"# Written by `apportion probe`.{'' if links else ' ' + _ALONE}\n"
        f"# Host memory copies {local.copy_bytes_per_s:.3g} B/s; TCP on this host: "
        f"{local.loopback.latency_s:.3g} s, {local.loopback.bytes_per_s:.3g} B/s.",
        *(_host_toml(host, machine) for host, machine in machines.items()),
        *(part for host, machine in machines.items() for part in _device_tables(host, machine)),
        *(_link_toml((host, host), machine.unix_socket) for host, machine in machines.items()),
        *(_link_toml(ends, rates) for ends, rates in links.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _device_tables(host: str, machine: Machine) -> Iterator[str]:
    for device in machine.devices:
        lines = _device_lines(device, machine)
        here = host == LOCAL_HOST
        lines[1:1] = [f'id = "{device.id if here else f"{host}-{device.id}"}"', f'host = "{host}"']
        if not here:
            # This machine's own are assumed until runs here calibrate them.
            lines.append(f"layer_overhead_s = {device.layer_overhead_s:.3g}  # assumed")
            lines.append(f"step_overhead_s = {device.step_overhead_s:.3g}  # assumed")
        yield "\n".join(lines)


def _device_lines(device: Device, machine: Machine) -> list[str]:
    cpu = device.kind == "cpu"
    how = "measured" if cpu else "computed from the driver's clocks and widths"
    products = f"{how}, without tensor cores"
    if cpu:
        assumed = "fp32 measured; without torch the others are assumed as fast"
        products = "measured, of the engine's own products" if machine.products_measured else assumed
    flops = ", ".join(f"{format_name} = {rate:.3g}" for format_name, rate in device.flops_per_s.items())
    lines = [
        f"[[device]]  # {machine.names[device.id]}",
        f'kind = "{device.kind}"',
        f'torch_device = "{device.torch_device}"',
        f'memory = "{device.memory_bytes // 2**20}MiB"  # most of what is free now',
        f"mem_bytes_per_s = {device.mem_bytes_per_s:.3g}  # {how}",
        f"flops_per_s = {{ {flops} }}  # {products}",
    ]
    if device.stream_bytes_per_s is not None:
        source = "measured, out of the page cache" if cpu else "a share of its connector's"
        lines.append(
            f'stream = "{device.stream_bytes_per_s / 1e9:.3g} GB/s"  # of weights not held; {source}'
        )
    if device.cache is not None:
        figures = ", ".join(
            f"{name} = {figure:.3g}"
            for name, figure in (
                ("bytes", device.cache.num_bytes),
                ("read_bytes_per_s", device.cache.read_bytes_per_s),
                ("copied_bytes_per_s", device.cache.copied_bytes_per_s),
            )
        )
        lines.append(f"cache = {{ {figures} }}  # that streamed layers pass through; measured")
    return [*lines, f"num_threads = {device.num_threads}"] if cpu else lines


def _host_toml(host: str, machine: Machine) -> str:
    together = machine.threads[max(machine.threads)].read_bytes_per_s
    alone = machine.threads[1]
    flops = ", ".join(f"{name} = {rate:.3g}" for name, rate in alone.flops_per_s.items())
    return "\n".join(
        [
            "[[host]]",
            f'name = "{host}"',
            f"mem_bytes_per_s = {together:.3g}  # that its processor's threads read together",
            *_room_lines(machine),
            "# One thread by itself, for a device of num_threads = 1:",
            f"# mem_bytes_per_s = {alone.read_bytes_per_s:.3g}, flops_per_s = {{ {flops} }}",
        ]
    )


def _room_lines(machine: Machine) -> Iterator[str]:
    """Where streamed weights stay."""
    known = [device.host_memory_bytes for device in machine.devices if device.host_memory_bytes is not None]
    if known:
        yield f'memory = "{max(known) // 2**20}MiB"  # free now: for CPU devices, streamed weights, swapped blocks'
    if machine.disk_bytes_per_s is not None:
        yield f'disk = "{machine.disk_bytes_per_s / 1e9:.3g} GB/s"  # of weights streamed past the page cache'


def _link_toml(ends: tuple[str, str], rates: LinkRates) -> str:
    return "\n".join(
        [
            "[[link]]",
            f'src = "{ends[0]}"',
            f'dst = "{ends[1]}"',
            f"latency_s = {rates.latency_s:.3g}  # half a round trip",
            f"bytes_per_s = {rates.bytes_per_s:.3g}",
            'source = "measured"',
        ]
    )
