"""The GPU catalogue: every figure sane, some by hand, and names as people write them."""

import tomllib
from importlib.resources import files
from typing import Any

import pytest

from apportion.catalog.gpus import find_gpu, gpus
from apportion.types.errors import ClusterError

GIB = 2**30

# memory GiB, bandwidth GB/s (bus bits / 8 × Gbit/s per pin), TFLOPS fp32, fp16 with fp32 accumulation, int8 TOPS,
# PCIe generation and lanes: from the datasheet or whitepaper, not from the catalogue's generator.
BY_HAND = {
    "gtx-1080-ti": (11, 352 / 8 * 11, 11.34, 11.34, 45.4, (3, 16)),
    "rtx-2080-ti": (11, 352 / 8 * 14, 13.45, 53.8, 215.2, (3, 16)),
    "rtx-3060-12gb": (12, 192 / 8 * 15, 12.74, 25.5, 102, (4, 16)),
    "rtx-3080-10gb": (10, 320 / 8 * 19, 29.8, 59.5, 238, (4, 16)),
    "rtx-3090": (24, 384 / 8 * 19.5, 35.6, 71, 284, (4, 16)),
    "rtx-4060-ti-16gb": (16, 128 / 8 * 18, 22.06, 44.1, 176.5, (4, 8)),
    "rtx-4070-ti-super": (16, 256 / 8 * 21, 44.1, 88.2, 352.8, (4, 16)),
    "rtx-4090": (24, 384 / 8 * 21, 82.6, 165.2, 660.6, (4, 16)),
    "rtx-4090-laptop": (16, 256 / 8 * 18, 33, 66, 264, (4, 16)),
    "rtx-5090": (32, 512 / 8 * 28, 104.8, 209.5, 838, (5, 16)),
    "rtx-a6000": (48, 384 / 8 * 16, 38.7, 154.8, 309.7, (4, 16)),
    "rtx-6000-ada": (48, 384 / 8 * 20, 91.1, 364.2, 728.5, (4, 16)),
    "p40": (24, 346, 11.76, 11.76, 47, (3, 16)),
    "t4": (16, 320, 8.1, 65, 130, (3, 16)),
    "v100-sxm2-32gb": (32, 900, 15.7, 125, 62.8, (3, 16)),
    "a10": (24, 600, 31.2, 125, 250, (4, 16)),
    "a100-sxm4-80gb": (80, 2039, 19.5, 312, 624, (4, 16)),
    "l4": (24, 300, 30.3, 121, 242.5, (4, 16)),
    "h100-sxm": (80, 3350, 67, 989.4, 1978.9, (5, 16)),
    "h100-pcie": (80, 2039, 51.2, 756, 1513, (5, 16)),
    "rx-7900-xtx": (24, 960, 61.4, 122.8, 122.8, (4, 16)),
    "rx-9070-xt": (16, 640, 48.7, 194.6, 389, (5, 16)),
    "mi50-32gb": (32, 1024, 13.4, 26.8, 53.6, (4, 16)),
    "mi300x": (192, 5325, 163.4, 1307, 2615, (5, 16)),
    "arc-a770-16gb": (16, 560, 19.66, 131, 262, (4, 16)),
    "m2-ultra": (64, 819.2, 27.2, 27.2, None, None),
    "dgx-spark": (128, 273, 29.7, 125, 250, None),
}


@pytest.fixture(scope="module")
def tables() -> dict[str, Any]:
    return tomllib.loads(files("apportion.catalog").joinpath("gpus.toml").read_text(encoding="utf-8"))


def test_counts() -> None:
    assert len(gpus()) >= 200
    assert {gpu.kind for gpu in gpus().values()} == {"cuda", "rocm", "metal", "xpu", "npu"}


@pytest.mark.parametrize("key", gpus())
def test_figures_are_sane(key: str) -> None:
    gpu = gpus()[key]
    assert gpu.key == key == key.lower()
    assert 3 * GIB <= gpu.memory_bytes <= 288 * GIB
    assert 50e9 <= gpu.mem_bytes_per_s <= 10e12
    vector = set[str]() if gpu.kind == "npu" else {"fp32"}
    assert vector | {"fp16"} <= gpu.flops_per_s.keys() <= {"fp32", "fp16", "bf16", "int8"}
    assert all(1e12 < rate < 1e16 for rate in gpu.flops_per_s.values())
    assert gpu.flops_per_s.get("fp32", 0) <= gpu.flops_per_s["fp16"]
    assert gpu.flops_per_s.get("fp32", 0) < gpu.flops_per_s.get("int8", float("inf"))
    assert gpu.flops_per_s.get("bf16", 0) <= gpu.flops_per_s["fp16"]
    assert gpu.pcie_bytes_per_s is None or 1e9 <= gpu.pcie_bytes_per_s < 130e9
    if gpu.memory_options_bytes:
        assert sorted(gpu.memory_options_bytes) == list(gpu.memory_options_bytes)
        assert gpu.memory_bytes == gpu.memory_options_bytes[0]


@pytest.mark.parametrize("key", gpus())
def test_bandwidth_is_bus_times_data_rate(key: str, tables: dict[str, Any]) -> None:
    bus = tables["gpu"][key]["memory_bus"]
    assert gpus()[key].mem_bytes_per_s == pytest.approx(
        bus["bits"] / 8 * bus["bits_per_s_per_pin"], rel=0.005
    )


def test_every_source_is_named(tables: dict[str, Any]) -> None:
    used = {source for gpu in gpus().values() for source in gpu.source}
    assert {source for source in used if not source.startswith("tpu:c")} == set(tables["sources"])
    assert all(gpu.source for gpu in gpus().values())


def test_aliases_are_unique() -> None:
    names = [name for gpu in gpus().values() for name in (gpu.key, *gpu.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("key", gpus())
def test_each_entry_answers_to_all_its_names(key: str) -> None:
    gpu = gpus()[key]
    for name in (gpu.key, gpu.name, *gpu.aliases, gpu.key.upper().replace("-", " ")):
        assert find_gpu(name).key == key


@pytest.mark.parametrize("key", BY_HAND)
def test_figures_checked_by_hand(key: str) -> None:
    memory_gib, gbytes_per_s, fp32, fp16, int8, pcie = BY_HAND[key]
    gpu = gpus()[key]
    assert gpu.memory_bytes == memory_gib * GIB
    assert gpu.mem_bytes_per_s / 1e9 == pytest.approx(gbytes_per_s, rel=0.005)
    assert gpu.flops_per_s["fp32"] / 1e12 == pytest.approx(fp32, rel=0.01)
    assert gpu.flops_per_s["fp16"] / 1e12 == pytest.approx(fp16, rel=0.01)
    assert gpu.flops_per_s.get("int8", 0) / 1e12 == pytest.approx(int8 or 0, rel=0.01)
    assert (gpu.pcie_generation, gpu.pcie_lanes) == (pcie or (None, None))


def test_pcie_rate_counts_the_line_code() -> None:
    assert gpus()["rtx-3090"].pcie_bytes_per_s == pytest.approx(31.508e9, rel=1e-4)
    assert gpus()["rtx-4060"].pcie_bytes_per_s == pytest.approx(15.754e9, rel=1e-4)
    assert gpus()["m4"].pcie_bytes_per_s is None


def test_bf16_is_absent_before_ampere() -> None:
    assert "bf16" not in gpus()["rtx-2080-ti"].flops_per_s
    assert "bf16" not in gpus()["v100-pcie-16gb"].flops_per_s
    assert "bf16" in gpus()["rtx-3060-12gb"].flops_per_s


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rtx-4090", "rtx-4090"),
        ("RTX 4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("4090 24GB", "rtx-4090"),
        ("geforce rtx 3060 12gb", "rtx-3060-12gb"),
        ("3060-12gb", "rtx-3060-12gb"),
        ("3060 12 GiB", "rtx-3060-12gb"),
        ("3060ti", "rtx-3060-ti"),
        ("a100-80gb", "a100-pcie-80gb"),
        ("A6000", "rtx-a6000"),
        ("7900 xtx", "rx-7900-xtx"),
        ("m2-max", "m2-max"),
        ("orin nx 16gb", "jetson-orin-nx-16gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "rtx-4070-laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("Intel(R) Arc(TM) B580 Graphics", "arc-b580"),
        ("AMD Radeon PRO W7900", "w7900"),
        ("Apple M3 Max (40-core GPU)", "m3-max-40-core"),
    ],
)
def test_names_as_people_and_drivers_write_them(text: str, key: str) -> None:
    assert find_gpu(text).key == key


def test_a_size_picks_among_the_sizes_sold() -> None:
    assert find_gpu("m2-max").memory_bytes == 32 * GIB
    assert find_gpu("m2-max-96gb").memory_bytes == 96 * GIB
    assert find_gpu("m3 max 64gb").key == "m3-max-40-core"
    with pytest.raises(ClusterError, match=r"not sold with 48 GiB, but with 32 GiB \(m2-max\), 64 GiB"):
        find_gpu("m2-max-48gb")


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("3060", "rtx-3060-12gb or rtx-3060-8gb"),
        ("a100", "a100-pcie-40gb, a100-pcie-80gb, a100-sxm4-40gb or a100-sxm4-80gb"),
        ("h100-80gb", "h100-pcie or h100-sxm"),
        ("m4-max", "m4-max-32-core or m4-max-40-core"),
    ],
)
def test_ambiguous_names_list_what_they_can_be(text: str, candidates: str) -> None:
    with pytest.raises(ClusterError) as caught:
        find_gpu(text)
    assert str(caught.value) == f"'{text}' can be {candidates}; write which"


@pytest.mark.parametrize(
    ("text", "near"), [("rtx-4900", "rtx-4090"), ("rtx 6000", "rtx-6000-ada"), ("pixel-9-pro", "pixel-8-pro")]
)
def test_unknown_names_suggest_near_ones(text: str, near: str) -> None:
    with pytest.raises(ClusterError, match=rf"unknown device .*did you mean {near}"):
        find_gpu(text)


@pytest.mark.parametrize("text", ["", "12gb", "banana", "---"])
def test_unreadable_names_are_errors(text: str) -> None:
    with pytest.raises(ClusterError, match="unknown device"):
        find_gpu(text)
