"""The devices a person has, and the links that join their hosts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from apportion.types.errors import ClusterError
from apportion.types.units import FORMAT_BYTES, WEIGHT_BITS, format_bytes

DeviceKind = Literal["cpu", "cuda", "rocm", "metal", "xpu", "npu"]
"""All can be planned for; the engine runs those of catalog.runnable."""
FigureSource = Literal["measured", "datasheet"]
StreamSource = Literal["host memory", "disk"]
LOCAL_HOST = "local"
"""This machine, where it has no other name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Relative standard deviation to expect of a device's predicted times, and where that is known from."""

    decode: float
    prefill: float
    source: str


WIDENED = ("int8", "int4")
"""Formats whose weights a kernel can turn into floating-point ones on the way, as all engines do for int4."""
ASSUMED_SPREAD = Spread(decode=0.3, prefill=0.3, source="rates probed or assumed, no run yet")
"""Before any run on a device: benchmarks/calibration.py shows what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A CPU device's part of its host's last cache, and how fast it is read and copied into out of the page cache."""

    num_bytes: int
    read_bytes_per_s: float
    copied_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device. Its rates are those the engine sees: an emulated device's are already scaled by `speed`.

    `memory_bytes` is what the engine may allocate beyond the imported runtime, of which `reserved_bytes` stay
    unused. `flops_per_s` is keyed by weight format; `layer_overhead_s` is spent once per layer and step,
    `step_overhead_s` once per step (message, batch, waking up).
    `torch_device` is where tensors live ("cpu", "cuda:0").
    """

    id: str
    host: str
    kind: DeviceKind
    torch_device: str
    memory_bytes: int
    reserved_bytes: int
    mem_bytes_per_s: float
    flops_per_s: dict[str, float]
    layer_overhead_s: float
    step_overhead_s: float
    num_threads: int
    """Of the worker process: a CPU's cores, shared evenly where several devices are CPUs of one host."""
    host_cores: int | None
    """Cores that the CPU devices of its host share, None where not known."""
    speed: float
    source: FigureSource
    stream_bytes_per_s: float | None = None
    """How fast weights come while steps run: over a card's own connector; on a CPU a copy out of the page cache, which
    takes its own time, or from its disk. None where layers cannot be streamed to it."""
    stream_from: StreamSource = "host memory"
    """Where streamed layers' weights stay; only a CPU reads them from a disk."""
    spread: Spread = ASSUMED_SPREAD
    host_bytes_per_s: float | None = None
    """Where its memory is its host's own: what all devices that share that read together. None for its own memory, and
    where not known."""
    cache: Cache | None = None
    """Where streamed layers may still be when they are computed from; None where not known."""
    host_memory_bytes: int | None = None
    """What its host has for CPU devices, for weights that are streamed out of host memory and for swapped blocks; None
    where not known."""
    disk_bytes_per_s: float | None = None
    """How fast its host's disk is read past the page cache; None where not known."""
    assumed: str | None = None
    """What it is taken for where nobody said what it is."""
    compute_capability: float | None = None
    """At least that, of NVIDIA's; None elsewhere, and where not known."""

    @property
    def usable_bytes(self) -> int:
        return self.memory_bytes - self.reserved_bytes

    def rate(self, weight_format: str) -> float | None:
        """FLOP/s of products with such weights, None where there is no figure. int8 and int4 weights without a rate of
        their own are turned into 16 bits first, or 32, and go at that rate; weights as stored are turned into whichever
        floating-point format is fastest."""
        if weight_format in self.flops_per_s:
            return self.flops_per_s[weight_format]
        if weight_format in WEIGHT_BITS:
            return self.flops_per_s.get(self.widened_to(weight_format) or "")
        return max(
            (self.flops_per_s[name] for name in FORMAT_BYTES if name in self.flops_per_s), default=None
        )

    def widened_to(self, weight_format: str) -> str | None:
        """The format at whose rate such weights go where they have none of their own; None elsewhere."""
        if weight_format in self.flops_per_s or weight_format not in WIDENED:
            return None
        return next((name for name in ("fp16", "bf16", "fp32") if name in self.flops_per_s), None)

    @property
    def stream_buffers(self) -> int:
        """Of one streamed layer each: a GPU or a disk fills one while the other is computed from; out of the page cache
        a CPU copies itself."""
        return 1 if self.kind == "cpu" and not self.reads_disk else 2

    @property
    def reads_disk(self) -> bool:
        return self.stream_from == "disk"

    @property
    def in_host_memory(self) -> bool:
        """Whether its memory is its host's own."""
        return self.kind == "cpu" or self.host_bytes_per_s is not None

    @property
    def emulated(self) -> bool:
        return self.speed < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Joins two hosts in both directions; `src == dst` is the link between devices of one host."""

    src: str
    dst: str
    latency_s: float
    bytes_per_s: float
    source: FigureSource = "datasheet"
    hop_s: float = 0.0
    """Of a message between stages or with the coordinator, beside all else: making it, and waking up who receives it.
    Members of a group wait for each other actively."""
    assumed: str | None = None
    """What of it nobody said."""

    def seconds(self, message_bytes: float) -> float:
        """Time of one message inside a group: latency + bytes / bandwidth."""
        return self.latency_s + message_bytes / self.bytes_per_s

    def hop_seconds(self, message_bytes: float) -> float:
        """Time of one message between stages, or with the coordinator."""
        return self.hop_s + self.seconds(message_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    devices: tuple[Device, ...]
    links: tuple[Link, ...]
    others_bytes_per_s: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By host, what devices of other clusters read there out of memory shared with this one's: on average, at most."""
    coordinator: str | None = None
    """The coordinator's host, which a plan chooses; None for that of the first device."""

    def device(self, device_id: str) -> Device:
        return next(device for device in self.devices if device.id == device_id)

    def without_buffers(self, buffer_bytes: Mapping[str, int]) -> "Cluster":
        """With so much less of each device's memory kept unused."""
        return replace(
            self,
            devices=tuple(
                replace(one, reserved_bytes=max(0, one.reserved_bytes - buffer_bytes.get(one.id, 0)))
                for one in self.devices
            ),
        )

    def with_reserve(self, device_id: str, num_bytes: int) -> "Cluster":
        """With so many bytes more of a device kept unused. Raises ClusterError where it has not so many."""
        device = self.device(device_id)
        if num_bytes >= device.usable_bytes:
            kept = f", of which {format_bytes(device.reserved_bytes)} are kept already" * (
                device.reserved_bytes > 0
            )
            raise ClusterError(
                f"{format_bytes(num_bytes)} cannot be kept unused on {device_id}: it has"
                f" {format_bytes(device.memory_bytes)}{kept}; give less, or exclude it"
            )
        return self._with(replace(device, reserved_bytes=device.reserved_bytes + num_bytes))

    def with_memory(self, device_id: str, num_bytes: int) -> "Cluster":
        """With so many bytes of a device for the engine, of which nothing is kept unused."""
        return self._with(replace(self.device(device_id), memory_bytes=num_bytes, reserved_bytes=0))

    def _with(self, changed: Device) -> "Cluster":
        devices = tuple(changed if device.id == changed.id else device for device in self.devices)
        return replace(self, devices=devices)

    def link(self, src_device_id: str, dst_device_id: str) -> Link | None:
        """The link between two devices' hosts, None where there is none."""
        hosts = {self.device(src_device_id).host, self.device(dst_device_id).host}
        return next((link for link in self.links if {link.src, link.dst} == hosts), None)
