from dataclasses import replace
from pathlib import Path

import pytest
from planned import cpu

from apportion.catalog.cluster_text import make_cluster, parse_devices, read_cluster_toml
from apportion.probe.cpu import measure_cpu
from apportion.probe.local import local_devices
from apportion.types.cluster import Cache
from apportion.types.errors import ClusterError

CORE = replace(cpu("cpu", 16), layer_overhead_s=1e-3)
CARD = replace(CORE, id="cuda0", kind="cuda", torch_device="cuda:0", memory_bytes=8 * 2**30)


def test_devices_as_typed():
    made = parse_devices(
        "laptop=cpu:600MiB@0.5, desk=cpu:900MiB,card=cuda:0, part=cuda:0:6GiB", lambda _: [CORE, CARD]
    )
    laptop, desk, card, part = made.devices
    assert (laptop.id, laptop.memory_bytes, laptop.speed, laptop.emulated) == (
        "laptop",
        600 * 2**20,
        0.5,
        True,
    )
    assert laptop.mem_bytes_per_s == CORE.mem_bytes_per_s / 2
    assert laptop.flops_per_s["fp32"] == CORE.flops_per_s["fp32"] / 2
    assert laptop.layer_overhead_s == 2e-3
    assert (desk.mem_bytes_per_s, desk.emulated) == (CORE.mem_bytes_per_s, False)
    assert (card.kind, card.memory_bytes) == ("cuda", 8 * 2**30)
    assert part.memory_bytes == 6 * 2**30
    assert made.link("laptop", "card") is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no devices"),
        ("laptop", "unknown device 'laptop'; did you mean gtx-1650-laptop"),
        ("a=tpu:6GiB", "write it like"),
        ("a=cpu:600 bananas", "unknown unit 'bananas'"),
        ("a=cpu:0MiB", "not a positive size"),
        ("a=cpu:1,5GiB", "'1,5GiB' has a comma; write 1.5GiB"),
        ("a=cpu:1GiB@0,5", "'0,5' has a comma; write 0.5"),
        ("rtx-3090:1,5GiB", "'1,5GiB' has a comma; write 1.5GiB"),
        ("a: rtx-3090; b: m4; link a-b 1Gbit 0,3ms", "'0,3ms' has a comma; write 0.3ms"),
        ("a: rtx-3090; b: m4; link a-b 1,5Gbit", "'1,5Gbit' has a comma; write 1.5Gbit"),
        ("a: rtx-3090; b: m4; link a-b 1Gbit 0.3", "'0.3' lacks a unit; write a latency like 0.3ms"),
        ("a: rtx-3090; b: m4; link a-b 0.3 1Gbit", "'0.3' lacks a unit; write a latency like 0.3ms"),
        ("a: rtx-3090; b: m4; link a-b 1Gbit 1ms 2ms", "there are two latencies, 1ms and 2ms; write one"),
        ("a: rtx-3090; b: m4; link a-b 1Gbit 2 Gbit", "there are two bandwidths, 1Gbit and 2; write one"),
        ("rtx-3060", "'rtx-3060' can be rtx-3060-12gb or rtx-3060-8gb; write which$"),
        ("a=cpu:1GiB@2", "is not in"),
        ("a=cpu:1GiB@0", "is not in"),
        ("a=cpu:1GiB@nan", "is not in"),
        ("a=cpu:1GiB@fast", "is not a number"),
        ("a=cuda:3", "has no cuda:3; it has cpu"),
        ("a=cpu:1GiB, a=cpu:2GiB", "'a' is given twice"),
        ("a=cpu:" + "9" * 400 + "GiB", "--devices 'a=cpu:999"),
        ("a=cpu:2000TiB", "more memory than"),
        (", ".join(f"d{i}=cpu:1GiB" for i in range(257)), "257 devices are more than the 256"),
    ],
)
def test_devices_that_cannot_be_used(text, message):
    with pytest.raises(ClusterError, match=message):
        parse_devices(text, lambda _: [CORE])


TOML = """
[[device]]
id = "a"
host = "h1"
memory = "6GiB"
reserved = "1GiB"
mem_bytes_per_s = 1e10
flops_per_s = { fp32 = 1e11 }
layer_overhead_s = 1e-4
step_overhead_s = 1e-3
speed = 0.5

[[device]]
id = "b"
host = "h2"
kind = "cuda"
torch_device = "cuda:1"
memory = 1000000
mem_bytes_per_s = 1e11
flops_per_s = { fp32 = 1e12, bf16 = 2e12 }
layer_overhead_s = 0
step_overhead_s = 0

[[link]]
src = "h1"
dst = "h2"
latency_s = 2e-4
bandwidth = "1Gbit"
"""


def refuse(_: int):
    raise AssertionError("nothing is left to measure")


def test_clusters_from_a_file(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(TOML)
    made = read_cluster_toml(path, refuse)
    a, b = made.devices
    assert (a.host, a.usable_bytes, a.speed) == ("h1", 5 * 2**30, 0.5)
    assert (a.mem_bytes_per_s, a.flops_per_s, a.layer_overhead_s) == (5e9, {"fp32": 5e10}, 2e-4)
    assert (b.kind, b.torch_device, b.memory_bytes) == ("cuda", "cuda:1", 1000000)
    across = made.link("a", "b")
    assert across is not None
    assert across.bytes_per_s == 1.25e8
    assert len(made.links) == 3


def test_rates_that_are_not_given_are_measured(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[[device]]\nid = "a"\nmemory = "1GiB"\nspeed = 0.5\n')
    made = read_cluster_toml(path, lambda _: [CORE])
    assert made.devices[0].mem_bytes_per_s == CORE.mem_bytes_per_s / 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "a"', "", "device 1: id: a text is needed"),
        ('id = "b"', 'id = "a"', "'a' is given twice"),
        (
            '"6GiB"',
            '"6 pots"',
            r"device 1 \(a\): memory: '6 pots': unknown unit 'pots'; write it like 600MiB",
        ),
        ("1000000", "-5", r"device 2 \(b\): memory: -5 is not a size"),
        ('reserved = "1GiB"', 'reserved = "9GiB"', "nothing is left"),
        (
            "mem_bytes_per_s = 1e10",
            "mem_bytes_per_s = nan",
            "mem_bytes_per_s: nan is not a finite number > 0",
        ),
        ("layer_overhead_s = 1e-4", "layer_overhead_s = -1.0", "layer_overhead_s: -1.0 is not"),
        ("fp32 = 1e11", "fp64 = 1e11", "unknown weight format of flops_per_s 'fp64'; did you mean fp16"),
        ("fp32 = 1e11", "fp32 = inf", "flops_per_s: fp32: inf is not"),
        ("speed = 0.5", "speed = 1.5", "speed 1.5 is not in"),
        ("speed = 0.5", "sped = 0.5", "unknown key 'sped'"),
        ('kind = "cuda"', 'kind = "tpu"', "unknown kind 'tpu'; did you mean xpu, npu or cpu"),
        ('torch_device = "cuda:1"', 'torch_device = "cpu"', "'cpu' is no cuda device"),
        ('dst = "h2"', 'dst = "h3"', "link 1: unknown host 'h3'; there is h1, h2"),
        ('"1Gbit"', '"1 snail"', "bandwidth: '1 snail': unknown unit 'snail'; write it like 1Gbit/s"),
        ('bandwidth = "1Gbit"', "", 'link 1: give its bandwidth, like bandwidth = "1Gbit"'),
        ("[[link]]", "[[links]]", "unknown key 'links'"),
        ("[[link]]", "[link]", r"write it as \[\[link\]\]"),
        ("[[link]]", "[[link", "is not TOML"),
        ('id = "a"', 'id = "a\\nb"', "cannot be printed in one line"),
        ("speed = 0.5", "count = 0", "count: 0 is not a whole number"),
        ("speed = 0.5", "count = 1000000000", "1000000001 devices are more than the 256"),
        ('torch_device = "cuda:1"', 'torch_device = "cuda:1"\ncount = 2', "2 devices cannot all be cuda:1"),
        ('kind = "cuda"', 'kind = "metal"', "'cuda:1' is no metal device"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, old, new, message):
    path = tmp_path / "c.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(ClusterError, match=message) as caught:
        read_cluster_toml(path, lambda _: [CORE])
    assert "\n" not in str(caught.value)


def test_a_file_without_devices(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("")
    with pytest.raises(ClusterError, match="no devices"):
        read_cluster_toml(path, refuse)
    with pytest.raises(ClusterError, match="cannot read"):
        read_cluster_toml(tmp_path / "none", refuse)


def test_the_probe_measures_a_share_of_the_cores():
    core = measure_cpu(1000)
    assert core.num_threads == 1
    assert 1e8 < core.mem_bytes_per_s < 1e12
    assert 1e9 < core.flops_per_s["fp32"] < 1e13
    assert core.memory_bytes > 0
    assert make_cluster(local_devices(), []).devices


WRITTEN = """id = "a"
memory = "6GiB"
mem_bytes_per_s = 1e10
flops_per_s = { fp32 = 1e11 }
layer_overhead_s = 1e-4
step_overhead_s = 1e-3
"""
GPU = 'gpu = "rtx-3090"\n'


def stream_of(folder: Path, lines: str) -> float | None:
    file = folder / "cluster.toml"
    file.write_text(f"[[device]]\n{lines}")
    return read_cluster_toml(file, lambda _: []).devices[0].stream_bytes_per_s


def test_stream_rates(tmp_path: Path):
    assert stream_of(tmp_path, WRITTEN + 'stream = "3 GB/s"') == 3e9
    assert stream_of(tmp_path, WRITTEN + 'stream = "3 GB/s"\nspeed = 0.5') == 1.5e9
    assert stream_of(tmp_path, WRITTEN + 'stream = "3 GB/s"\nstream_from = "disk"\nspeed = 0.5') == 3e9
    assert stream_of(tmp_path, WRITTEN) is None
    assert stream_of(tmp_path, GPU) == pytest.approx(0.8 * 31.5e9, rel=1e-3)
    assert stream_of(tmp_path, GPU + 'stream = "never"') is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (GPU + 'stream = "40 GB/s"', "more than the 31.5 GB/s of the connector"),
        ('gpu = "m2-max-64gb"\nstream = "3 GB/s"', "nowhere to stream from"),
        (GPU + 'stream = "3 GB/s"\nstream_from = "disk"', "a disk streams layers to a cpu device alone"),
        (WRITTEN + 'stream_from = "disk"', 'its rate is needed: stream = "2 GB/s"'),
        (WRITTEN + 'stream_from = "tape"', "unknown stream_from 'tape'; there is host memory, disk"),
        (WRITTEN + 'stream = "fast"', "stream: 'fast' is not a bandwidth; .*, or never"),
    ],
)
def test_stream_rates_that_contradict(tmp_path: Path, lines: str, message: str):
    with pytest.raises(ClusterError, match=message):
        stream_of(tmp_path, lines)


def test_a_host_s_memory_is_shared_by_its_devices(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    host = '[[host]]\nname = "local"\nmem_bytes_per_s = 1.5e10\n'
    file.write_text(f"[[device]]\ncount = 2\n{WRITTEN}[[device]]\n{GPU}memory = '6GiB'\n{host}")
    *cores, card = read_cluster_toml(file, lambda _: []).devices
    assert [core.host_bytes_per_s for core in cores] == [1.5e10, 1.5e10]
    assert card.host_bytes_per_s is None
    file.write_text(f"[[device]]\ncount = 2\n{WRITTEN}")
    assert read_cluster_toml(file, lambda _: []).devices[0].host_bytes_per_s is None


def test_a_host_s_room_for_streamed_weights(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    host = '[[host]]\nname = "local"\nmemory = "24GiB"\ndisk = "2 GB/s"\n'
    cache = "cache = { bytes = 1.2e7, read_bytes_per_s = 7e10, copied_bytes_per_s = 2e10 }\nspeed = 0.5\n"
    file.write_text(f"[[device]]\n{WRITTEN}{cache}[[device]]\n{GPU}{host}")
    core, card = read_cluster_toml(file, lambda _: []).devices
    assert core.cache == Cache(num_bytes=12_000_000, read_bytes_per_s=3.5e10, copied_bytes_per_s=1e10)
    for device in (core, card):
        assert (device.host_memory_bytes, device.disk_bytes_per_s) == (24 * 2**30, 2e9)
        assert device.host_bytes_per_s is None


def test_hosts_that_cannot_be(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    host = '[[host]]\nname = "local"\nmem_bytes_per_s = 1.5e10\n'
    file.write_text(f"[[device]]\n{WRITTEN}{host}{host}")
    with pytest.raises(ClusterError, match="host 2: host 'local' is given twice"):
        read_cluster_toml(file, lambda _: [])
    file.write_text(f"[[device]]\n{WRITTEN}{host.replace('local', 'attic')}")
    with pytest.raises(ClusterError, match="host 1: unknown host 'attic'; there is local"):
        read_cluster_toml(file, lambda _: [])


def test_a_link_without_hosts_joins_all_that_have_none_of_their_own():
    made = parse_devices("a: m4; b: m4; c: m4; link 1Gbit 0.2ms; link c-a 10Gbit 1ms", lambda _: [])
    across = {
        (link.src, link.dst): (link.bytes_per_s, link.latency_s)
        for link in made.links
        if link.src != link.dst
    }
    assert across == {("c", "a"): (1.25e9, 1e-3), ("a", "b"): (1.25e8, 2e-4), ("b", "c"): (1.25e8, 2e-4)}


def test_a_host_may_be_called_like_a_bandwidth():
    made = parse_devices("1g: m4; 2g: m4; link 1g-2g 1Gbit 0.2ms", lambda _: [])
    assert [(link.src, link.dst) for link in made.links if link.src != link.dst] == [("1g", "2g")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: m4; b: m4; link 1Gbit; link 2Gbit", "two links without hosts, 'link 1Gbit' and 'link 2Gbit'"),
        ("a: m4; link 1Gbit", "a link without hosts is between hosts, and there is one"),
        ("a: m4; b: m4; link 1Gbit 0.3", "'0.3' lacks a unit"),
    ],
)
def test_a_link_without_hosts_that_says_nothing(text: str, message: str):
    with pytest.raises(ClusterError, match=message):
        parse_devices(text, lambda _: [])
