"""GPUs by name in clusters, on the command line and in files."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import cpu

from apportion.catalog.cluster_rules import INTRA_HOST_BYTES_PER_S, Here
from apportion.catalog.cluster_text import parse_devices, read_cluster_toml
from apportion.catalog.datasheet import COMPUTE_SHARE, CPU_CORES, REACHED, reserve_bytes
from apportion.catalog.gpus import find_gpu, gpus
from apportion.types.cluster import Cluster, Device
from apportion.types.errors import ClusterError

GIB = 2**30
CORE = replace(cpu("cpu", 16), layer_overhead_s=1e-3)
CARD = replace(CORE, id="cuda0", kind="cuda", torch_device="cuda:0", memory_bytes=8 * GIB)
TWO_HOSTS = "tower: rtx-4090 + 2x rtx-3060-12gb; laptop: rtx-4060-laptop; link tower-laptop 1Gbit 0.3ms"


def refuse(_: int) -> list[Device]:
    raise AssertionError("nothing is left to measure")


def names(made: Cluster) -> list[tuple[str, str, str]]:
    return [(device.host, device.id, device.torch_device) for device in made.devices]


def test_hosts_gpus_counts_and_links():
    made = parse_devices(TWO_HOSTS, refuse)
    assert names(made) == [
        ("tower", "rtx-4090", "cuda:0"),
        ("tower", "rtx-3060-12gb-1", "cuda:1"),
        ("tower", "rtx-3060-12gb-2", "cuda:2"),
        ("laptop", "rtx-4060-laptop", "cuda:0"),
    ]
    assert made.devices[1] == replace(made.devices[2], id="rtx-3060-12gb-1", torch_device="cuda:1")
    across = made.link("rtx-4090", "rtx-4060-laptop")
    assert across is not None
    assert (across.latency_s, across.bytes_per_s) == (pytest.approx(3e-4), 1.25e8)


def test_a_datasheet_as_a_device():
    device = parse_devices("rtx-3090", refuse).devices[0]
    assert (device.host, device.kind, device.source, device.emulated) == ("local", "cuda", "datasheet", False)
    assert device.memory_bytes == 24 * GIB
    assert device.reserved_bytes == pytest.approx(0.03 * 24 * GIB + GIB / 2, abs=1)
    assert device.mem_bytes_per_s == pytest.approx(936e9 * 0.87, rel=1e-3)
    assert device.flops_per_s["bf16"] == pytest.approx(71.2e12 * COMPUTE_SHARE, rel=5e-3)
    assert set(device.flops_per_s) == {"fp32", "fp16", "bf16"}
    assert device.rate("int8") == device.flops_per_s["fp16"]
    assert (device.layer_overhead_s, device.step_overhead_s) == (45e-6, 0.0)


def test_memory_that_is_written_is_for_the_engine_alone():
    made = parse_devices("rtx-3090:20GiB@0.5", refuse).devices[0]
    assert (made.memory_bytes, made.reserved_bytes, made.speed) == (20 * GIB, 0, 0.5)
    assert made.layer_overhead_s == 90e-6


@pytest.mark.parametrize("key", gpus())
def test_every_gpu_of_the_catalogue_can_be_planned_for(key: str):
    gpu = gpus()[key]
    device = parse_devices(f"here: {key}", refuse).devices[0]
    assert (device.id, device.kind) == (key, gpu.kind)
    assert 0 < device.usable_bytes < device.memory_bytes == gpu.memory_bytes
    assert device.layer_overhead_s == REACHED[gpu.kind].layer_overhead_s
    assert "fp16" in device.flops_per_s


def test_memory_that_is_the_systems_is_shared_with_it():
    assert reserve_bytes(find_gpu("m2-max-32gb")) == round(32 * GIB / 3)
    assert reserve_bytes(find_gpu("m2-max-96gb")) == 24 * GIB


@pytest.mark.parametrize(
    ("text", "torch_devices"),
    [
        ("2x mi50-32gb", ["cuda:0", "cuda:1"]),
        ("arc-b580 + rtx-3090", ["xpu:0", "cuda:0"]),
        ("m2-max-64gb", ["mps"]),
    ],
)
def test_devices_are_called_what_pytorch_calls_them(text: str, torch_devices: list[str]):
    assert [device.torch_device for device in parse_devices(text, refuse).devices] == torch_devices


def inside_bytes_per_s(text: str) -> float:
    made = parse_devices(text, refuse)
    link = made.link(made.devices[0].id, made.devices[0].id)
    assert link is not None
    return link.bytes_per_s


def test_cards_of_a_host_exchange_over_half_of_the_slowest_pcie():
    slowest = gpus()["rtx-4060"].pcie_bytes_per_s
    assert slowest == pytest.approx(15.754e9, rel=1e-4)
    assert inside_bytes_per_s("rtx-3090 + rtx-4060") == pytest.approx(slowest / 2)
    assert inside_bytes_per_s("a: rtx-3090 + cpu:64GiB") == pytest.approx(31.508e9 / 2, rel=1e-4)
    assert inside_bytes_per_s("m2-max") == INTRA_HOST_BYTES_PER_S
    assert inside_bytes_per_s("a: 2x rtx-3090; link a-a 50GB/s 5us") == 50e9


def test_cpus():
    here = Here(cards=lambda: ["NVIDIA GeForce RTX 4090"])
    local = parse_devices("cpu:2GiB + rtx-4090", lambda _: [CORE], here).devices[0]
    other = "b: x=cpu:4GiB + y=cpu"
    assert (local.id, local.memory_bytes, local.mem_bytes_per_s) == ("cpu", 2 * GIB, CORE.mem_bytes_per_s)
    with pytest.raises(ClusterError, match="'y=cpu': give the memory of host 'b', like cpu:16GiB"):
        parse_devices(other, refuse)
    x, y = parse_devices(f"{other}:8GiB", refuse).devices
    assert (x.memory_bytes, y.memory_bytes, x.source) == (4 * GIB, 8 * GIB, "datasheet")
    assert x.num_threads + y.num_threads == x.host_cores == CPU_CORES
    alone = parse_devices("b: cpu:4GiB", refuse).devices[0]
    assert x.mem_bytes_per_s == alone.mem_bytes_per_s == x.host_bytes_per_s


def test_old_and_new_forms_mix():
    made = parse_devices("laptop=cpu:600MiB@0.5, card=cuda:0:6GiB, big=rtx-4090", lambda _: [CORE, CARD])
    assert [device.id for device in made.devices] == ["laptop", "card", "big"]
    assert made.devices[0].mem_bytes_per_s == CORE.mem_bytes_per_s / 2
    assert made.devices[1].memory_bytes == 6 * GIB


@pytest.mark.parametrize(
    ("text", "key", "count"),
    [
        ("2x3060-12gb", "rtx-3060-12gb", 2),
        ("2× RTX 3060 12GB", "rtx-3060-12gb", 2),
        ("tower:4090", "rtx-4090", 1),
        ("7900xtx", "rx-7900-xtx", 1),
        ("7900 xtx", "rx-7900-xtx", 1),
        ("rtx-4090:10GiB", "rtx-4090", 1),
        ("rtx-4090 : 10 GiB", "rtx-4090", 1),
        ("4090+3090", "rtx-4090", 1),
        ("rtx-4090, rtx-3090", "rtx-4090", 1),
    ],
)
def test_spellings(text: str, key: str, count: int):
    devices = parse_devices(text, refuse).devices
    assert sum(device.id.startswith(key) for device in devices) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("laptop", "'laptop': unknown device 'laptop'; did you mean gtx-1650-laptop"),
        ("rtx-4091", r"unknown device 'rtx-4091'; did you mean rtx-4090 or rtx-4090-d\?$"),
        ("3060", "'3060' can be rtx-3060-12gb or rtx-3060-8gb; write which"),
        (
            "rtx-4090:97GiB",
            "97.0 GiB is more than the 48.0 GiB of rtx-4090, and changed ones have at most 96.0",
        ),
        ("m4:64GiB", "64.0 GiB is more than the 32.0 GiB of m4$"),
        (
            "2x raspberry-pi-5",
            "each computer is a host of its own: write a: raspberry-pi-5; b: raspberry-pi-5",
        ),
        ("rtx-4090:-5GiB", "'-5GiB' is not a size"),
        ("rtx-4090:0GiB", "is not a positive size"),
        ("rtx-4090@nan", "is not in"),
        ("rtx-4090@0", "is not in"),
        ("0x rtx-4090", "count is not ≥ 1"),
        ("300x rtx-4090", "300 devices are more than the 256"),
        ("200x rtx-4090 + 57x rtx-3090", "257 devices are more than the 256"),
        ("rtx-4090 + ", "''"),
        ("a: cuda:0", "cuda:0 is a GPU of this machine"),
        ("cuda:1 + rtx-4090", "this machine has no cuda:1; it has cpu"),
        ("rtx-4090; rtx-3090", "each has a name before its devices"),
        ("a: rtx-4090; a: rtx-3090", "host 'a' is given twice"),
        ("x=rtx-4090 + x=rtx-3090 + x-1=rtx-3090", "'x-1' is given twice"),
        ("a: rtx-4090; link a-b 1Gbit 1ms", "unknown pair of hosts 'a-b'; there is a-a"),
        ("rtx-4090; link a-b 1Gbit 1ms", "no devices have a host name before them"),
        ("a: rtx-4090; b: m4; link a-b", "write it like link tower-laptop 1Gbit 0.3ms"),
        ("a: rtx-4090; b: m4; link a-b 0.3ms", "write it like link tower-laptop 1Gbit 0.3ms"),
        (
            "tower: rtx-4090; b: m4; link towr-b 1Gbit",
            r"unknown pair of hosts 'towr-b'; did you mean tower-b",
        ),
        ("a: rtx-4090; b: m4; link a-b 1gb/s", "may be bits or bytes; write 1Gbit/s or 1GB/s"),
        ("a: rtx-4090; b: m4; link a-b 1Gbit 0.3", "'0.3' lacks a unit; write a latency like 0.3ms"),
        ("a: rtx-4090; b: m4; link a-b nanbit 1ms", "'nanbit' is not a bandwidth; write it like 1Gbit/s"),
        ("a: rtx-4090; b: m4; link a-b 0Gbit 1ms", "'0Gbit' is not > 0"),
        ("a: rtx-4090; b: m4; link a-b 1Gbit -1ms", "'-1ms' is not a time; write it like 0.3ms"),
        ("a: m2; b: m4; link a-b 1Gbit 1ms; link b-a 1Gbit 1ms", "link 'a – b' is given twice"),
        ("link a-b 1Gbit 1ms", "no devices"),
    ],
)
def test_text_that_cannot_be_used(text: str, message: str):
    with pytest.raises(ClusterError, match=message) as caught:
        parse_devices(text, lambda _: [CORE])
    assert "\n" not in str(caught.value)


PIECES = st.sampled_from(
    [
        *"abx:;+,=@ \n1",
        "rtx-4090",
        "cpu",
        "cuda:0",
        "2x ",
        "10GiB",
        "link ",
        "a-b",
        "1Gbit",
        "0.3ms",
        "nan",
        "-5",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_any_text_is_a_cluster_or_a_one_line_error(text: str):
    message = ""
    try:
        assert parse_devices(text, lambda _: [CORE, CARD]).devices
    except ClusterError as error:
        message = str(error)
    assert message.isprintable()


FILE = """
[[device]]
gpu = "rtx-4090"
host = "tower"

[[device]]
id = "pair"
gpu = "RTX 3060 12GB"
host = "tower"
count = 2
memory = "10GiB"

[[device]]
id = "mac"
gpu = "m2-max-64gb"
host = "desk"
reserved = "8GiB"
layer_overhead_s = 1e-4

[[link]]
src = "tower"
dst = "desk"
latency_s = 3e-4
bandwidth = "1Gbit"
"""


def read(tmp_path: Path, text: str) -> Cluster:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return read_cluster_toml(path, refuse)


def test_gpus_in_a_file(tmp_path: Path):
    made = read(tmp_path, FILE)
    assert names(made) == [
        ("tower", "rtx-4090", "cuda:0"),
        ("tower", "pair-1", "cuda:1"),
        ("tower", "pair-2", "cuda:2"),
        ("desk", "mac", "mps"),
    ]
    card, pair, _, mac = made.devices
    assert card == replace(parse_devices("rtx-4090", refuse).devices[0], host="tower")
    assert (pair.memory_bytes, pair.reserved_bytes, pair.kind) == (10 * GIB, 0, "cuda")
    assert (mac.kind, mac.usable_bytes, mac.layer_overhead_s) == ("metal", 56 * GIB, 1e-4)
    inside = made.link("pair-1", "pair-2")
    assert inside is not None
    assert inside.bytes_per_s == pytest.approx(31.508e9 / 2, rel=1e-4)


def test_gpus_without_a_name_are_numbered_throughout_the_file(tmp_path: Path):
    made = read(
        tmp_path, '[[device]]\ngpu = "m4"\nhost = "a"\n[[device]]\ngpu = "m4"\ncount = 2\nhost = "b"\n'
    )
    assert [device.id for device in made.devices] == ["m4-1", "m4-2", "m4-3"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"RTX 3060 12GB"', '"RTX 3060"', "device 2: gpu: 'RTX 3060' can be"),
        ('gpu = "rtx-4090"', 'gpu = "rtx-4090"\nkind = "rocm"', "kind: rtx-4090 is a cuda device, not rocm"),
        (
            'memory = "10GiB"',
            'memory = "25GiB"',
            r"device 2 \(pair\): memory: 25.0 GiB is more than the 12.0",
        ),
        ('reserved = "8GiB"', 'reserved = "64GiB"', "nothing is left"),
        ("count = 2", "count = 2000", "2002 devices are more than the 256"),
        ("count = 2", "count = 2.5", "count: 2.5 is not a whole number"),
        ("count = 2", 'count = 2\ntorch_device = "cuda:1"', "2 devices cannot all be cuda:1"),
        ('gpu = "m2-max-64gb"', "gpu = 3", "gpu: a text is needed, not 3"),
        ('gpu = "m2-max-64gb"', "", "give the memory of host 'desk'"),
        ('id = "mac"', 'id = "rtx-4090"', "'rtx-4090' is given twice"),
        ('gpu = "m2-max-64gb"', 'kind = "cuda"', "give gpu, or mem_bytes_per_s"),
        ('gpu = "m2-max-64gb"', 'gpu = "raspberry-pi-5"', 'gpu: write it as cpu = "raspberry-pi-5"'),
        ('gpu = "m2-max-64gb"', 'vram = "64GiB"', "device 3: unknown key 'vram'; did you mean memory"),
        ("[[device]]", "[[devices]]", "unknown key 'devices'; did you mean device"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, old: str, new: str, message: str):
    path = tmp_path / "c.toml"
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ClusterError, match=message) as caught:
        read_cluster_toml(path, lambda _: [])
    assert "\n" not in str(caught.value)


def test_a_file_of_ten_thousand_devices(tmp_path: Path):
    with pytest.raises(ClusterError, match="10000 devices are more than the 256"):
        read(tmp_path, '[[device]]\ngpu = "rtx-4090"\n' * 10_000)
