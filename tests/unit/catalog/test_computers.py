"""Computers, changed cards, and CPUs of which only the memory is known: what they are taken for, and that it is said,
and links as people write them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from planned import cpu, workload

from apportion.catalog.cluster_rules import ASSUMED_LATENCY_S, Here
from apportion.catalog.cluster_text import parse_devices, read_cluster_toml
from apportion.catalog.datasheet import CPU_READ_BYTES_PER_S, DESKTOP
from apportion.catalog.gpus import find_device
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.processors import processors
from apportion.cli.assumed import assumptions
from apportion.planner.build import make_plan
from apportion.types.cluster import Device
from apportion.types.errors import ClusterError
from apportion.types.plan import Plan

GIB = 2**30
CORE = cpu("cpu", 16)
GEFORCE = Here(cards=lambda: ["NVIDIA GeForce RTX 4090"], memory_bytes=lambda: 16 * GIB)
NO_CARD = Here(memory_bytes=lambda: 16 * GIB)


def refuse(_: int) -> Sequence[Device]:
    raise AssertionError("this machine is not meant")


def planned(devices: str, weights: str = "int4", model: str = "llama-3.1-8b") -> Plan:
    spec = read_model_spec(known_config(model))
    return make_plan(spec, parse_devices(devices, refuse), workload(context=2048), (weights,))


@pytest.mark.parametrize("key", processors())
def test_figures_of_computers_are_sane(key: str) -> None:
    one = processors()[key]
    assert 14e9 <= one.flops_per_s / one.cores <= 80e9  # a clock of 1.8 to 4 GHz times 8 to 16
    assert 10e9 <= one.mem_bytes_per_s <= 150e9
    assert 0.2 <= one.read_share <= 0.7
    assert one.memory_bytes in (one.memory_options_bytes or (one.memory_bytes,))
    for name in (one.key, one.name, *one.aliases):
        assert find_device(name).key == key


@pytest.mark.parametrize(
    ("text", "key", "memory_gib"),
    [
        ("Mac mini M4 16GB", "m4", 16),
        ("Mac mini (M4, 32GB)", "m4", 32),
        ("MacBook Pro M3 Max 64GB", "m3-max-40-core", 64),
        ("MacBook Pro 14-inch M3 Max 36GB", "m3-max-30-core", 36),
        ("macbook air m2 24gb", "m2", 24),
        ("Mac Studio M2 Ultra 192GB", "m2-ultra", 192),
        ("Raspberry Pi 5", "raspberry-pi-5", 8),
        ("raspberry pi 5 16GB", "raspberry-pi-5", 16),
        ("rpi5", "raspberry-pi-5", 8),
        ("Orange Pi 5", "orange-pi-5", 8),
        ("Orange Pi 5 Plus 16GB", "orange-pi-5", 16),
        ("Jetson Orin Nano", "jetson-orin-nano-super", 8),
        ("Steam Deck", "steam-deck", 16),
        ("Strix Halo 128GB", "ryzen-ai-max-395", 128),
        ("Framework Desktop 128GB", "ryzen-ai-max-395", 128),
        ("DGX Spark", "dgx-spark", 128),
        ("Radeon 780M 64GB", "radeon-780m", 64),
        ("Ryzen 7 8840HS 32GB", "radeon-780m", 32),
        ("RTX 2080 Ti 22GB", "rtx-2080-ti", 22),
        ("4090 48GB", "rtx-4090", 48),
        ("GTX 970", "gtx-970", 3.5),
        ("NVIDIA H20", "h20", 96),
        ("Tesla K80", "k80", 12),
        ("CMP 170HX", "cmp-170hx-8gb", 8),
        ("P102-100 10GB", "p102-100", 10),
        ("T1200 Laptop", "t1200-laptop", 4),
        ("B300", "b300", 268),
        ("Ascend 910B", "ascend-910b", 64),
    ],
)
def test_names_as_people_write_them(text: str, key: str, memory_gib: float) -> None:
    found = find_device(text)
    assert (found.key, found.memory_bytes) == (key, memory_gib * GIB)


def test_memory_as_people_changed_it() -> None:
    card = parse_devices("rtx-2080-ti:22GiB", refuse).devices[0]
    assert (card.memory_bytes, card.reserved_bytes, card.assumed) == (22 * GIB, 0, None)
    changed = parse_devices("rtx-3060-12gb:24GiB", refuse).devices[0]
    assert changed.assumed == "a rtx-3060-12gb changed to 24.0 GiB (12.0 GiB as sold), as fast as before"
    with pytest.raises(ClusterError, match=r"25\.0 GiB is more than the 12.0 GiB of rtx-3060-12gb"):
        parse_devices("rtx-3060-12gb:25GiB", refuse)


def test_an_8b_on_a_raspberry_pi_5() -> None:
    """2.17 tokens/s are published for llama3.1:8b in 4 bits (github.com/geerlingguy/sbc-reviews/issues/21)."""
    assert 1 / planned("pi1: raspberry-pi-5").estimate.tpot_s == pytest.approx(2.17, rel=0.3)


@pytest.mark.parametrize(
    ("devices", "model", "published"),
    [
        ("a: raspberry-pi-5", "llama-3.2-3b", 4.88),
        ("a: raspberry-pi-5-16gb", "llama-2-13b", 1.36),
        ("a: intel-n150", "llama-3.1-8b", 3.59),
        ("a: raspberry-pi-4", "llama-3.2-3b", 1.60),
        ("Mac mini M4 32GB", "llama-3.1-8b", 20.95),
        ("Mac mini M4 32GB", "llama-2-13b", 13.60),
    ],
)
def test_other_published_speeds(devices: str, model: str, published: float) -> None:
    """In 4 bits, of github.com/geerlingguy/ollama-benchmark; the boards' shares come from the same table."""
    assert 1 / planned(devices, model=model).estimate.tpot_s == pytest.approx(published, rel=0.3)


def test_a_cpu_beside_cards_that_this_machine_lacks_is_not_this_machine_s() -> None:
    card, other = parse_devices("rtx-4090 + cpu:160GiB", refuse, NO_CARD).devices
    assert card.host == other.host
    assert (other.memory_bytes, other.mem_bytes_per_s, other.source) == (
        160 * GIB,
        CPU_READ_BYTES_PER_S,
        "datasheet",
    )
    assert other.assumed == DESKTOP.name
    written = parse_devices("tower: rtx-4090 + cpu:160GiB", refuse).devices
    assert [replace(one, host="tower") for one in (card, other)] == list(written)
    own = parse_devices("rtx-4090 + cpu:8GiB", lambda _: [CORE], GEFORCE).devices[1]
    assert (own.mem_bytes_per_s, own.assumed) == (CORE.mem_bytes_per_s, None)
    with pytest.raises(ClusterError, match="give the memory of host 'local'"):
        parse_devices("2x rtx-4090 + cpu", refuse, GEFORCE)


@pytest.mark.parametrize("text", ["cpu:160GiB", "a=cpu:10GiB, b=cpu:10GiB", "rtx-4090 + cpu:160GiB"])
def test_memory_that_this_machine_lacks_is_refused(text: str) -> None:
    with pytest.raises(ClusterError, match=r"GiB are asked of this machine's CPU, which has 16.0 GiB"):
        parse_devices(text, lambda _: [CORE], GEFORCE)


def test_the_same_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[[device]]\ngpu = "rtx-4090"\n[[device]]\nid = "c"\nmemory = "160GiB"\n')
    assert read_cluster_toml(file, refuse, NO_CARD).devices[1].assumed == DESKTOP.name
    file.write_text('[[device]]\ncpu = "Raspberry Pi 5"\nhost = "pi1"\n')
    assert read_cluster_toml(file, refuse).devices == parse_devices("pi1: raspberry-pi-5", refuse).devices
    file.write_text('[[device]]\nid = "cpu"\nhost = "b"\nmemory = "4GiB"\n')
    assert read_cluster_toml(file, refuse).devices == parse_devices("b: cpu:4GiB", refuse).devices


@pytest.mark.parametrize(
    ("link", "bits_per_s", "latency_s"),
    [
        ("link a-b 1Gbit 0.3ms", 1e9, 3e-4),
        ("link a-b 1Gbps 0.3ms", 1e9, 3e-4),
        ("link a-b 0.3ms 1Gb", 1e9, 3e-4),
        ("link a-b 1 Gbit/s 300us", 1e9, 3e-4),
        ("link a-b 1 Gbit/s, 300 us", 1e9, 3e-4),
        ("link a-b 2.5GbE 0.1 ms latency", 2.5e9, 1e-4),
        ("link a - b 10 GbE", 1e10, ASSUMED_LATENCY_S),
        ("link a to b 100Mbit/s", 1e8, ASSUMED_LATENCY_S),
        ("link a-b: 25GB/s 5us", 2e11, 5e-6),
        ("link a-b thunderbolt 4", 16.4e9, ASSUMED_LATENCY_S),
    ],
)
def test_links_as_people_write_them(link: str, bits_per_s: float, latency_s: float) -> None:
    made = parse_devices(f"a: rtx-3060-12gb; b: rtx-4090; {link}", refuse).link("rtx-3060-12gb", "rtx-4090")
    assert made is not None
    assert (made.bytes_per_s, made.latency_s) == (pytest.approx(bits_per_s / 8), pytest.approx(latency_s))
    assert (made.assumed is None) == ("ms" in link or "us" in link)


def test_links_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    devices = '[[device]]\ngpu = "m4"\nhost = "a"\n[[device]]\ngpu = "m4"\nhost = "b"\n'
    file.write_text(devices + '[[link]]\nsrc = "a"\ndst = "b"\nbandwidth = "2.5GbE"\nlatency = "0.1ms"\n')
    made = read_cluster_toml(file, refuse).links[-1]
    assert (made.bytes_per_s, made.latency_s, made.assumed) == (2.5e9 / 8, 1e-4, None)
    file.write_text(devices + '[[link]]\nsrc = "a"\ndst = "b"\nbytes_per_s = "2.5 Gbps"\n')
    made = read_cluster_toml(file, refuse).links[-1]
    assert (made.bytes_per_s, made.latency_s) == (2.5e9 / 8, ASSUMED_LATENCY_S)


def test_a_card_by_hand_with_16_bit_rates_alone_does_int8_and_int4(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    for rates, wider in (('{ fp16 = "20 TFLOPS" }', "fp16"), ("{ fp32 = 2e13 }", "fp32")):
        file.write_text(
            f'[[device]]\nid = "x"\nkind = "cuda"\nmemory = "24GiB"\nflops_per_s = {rates}\n'
            'mem_bytes_per_s = "300 GB/s"\nlayer_overhead_s = "50us"\nstep_overhead_s = 0\n'
        )
        made = read_cluster_toml(file, refuse)
        spec = read_model_spec(known_config("llama-3.1-8b"))
        card = made.devices[0]
        assert (card.flops_per_s, card.mem_bytes_per_s, card.layer_overhead_s) == (
            {wider: 2e13},
            3e11,
            pytest.approx(5e-5),
        )
        assert card.rate("int8") == card.rate("int4") == 2e13
        assert card.rate("bf16") is None
        plan = make_plan(spec, made, workload(context=2048), ("int8",))
        said = "assumed of x: int8 weights go at the fp32 rate, for want of one of their own"
        assert assumptions(plan) == [said] * (wider == "fp32")


def test_what_is_assumed_is_said() -> None:
    said = assumptions(planned("a: cpu:3GiB; b: cpu:3GiB; link a-b 1Gbit"))
    assert said == [
        f"assumed of cpu-1, cpu-2: {DESKTOP.name}; name the computer (raspberry-pi-5, intel-n100), or write its"
        " rates in a cluster file",
        "assumed of link a-b: a latency of 0.3 ms; write it behind the bandwidth",
    ]
    assert assumptions(planned("a: raspberry-pi-5; b: m4; link a-b 1Gbit 0.3ms")) == []
