"""What `apportion probe` measures, and that its file is a cluster file."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from plans import cpu_device

from apportion.catalog.cluster_rules import HOP_S
from apportion.catalog.cluster_text import read_cluster_toml
from apportion.cli.main import exit_code
from apportion.probe import cpu as probed_cpu
from apportion.probe import disk, host_rates, machine
from apportion.probe.cluster_file import cluster_toml
from apportion.probe.cpu import measure_cpu
from apportion.probe.hardware import hardware_names
from apportion.probe.host_rates import LinkRates, loopback_rates, unix_socket_rates
from apportion.probe.machine import Machine
from apportion.probe.processor import cpu_model
from apportion.probe.saved import probe_file, read_disk_rate, read_rates, save_rates
from apportion.probe.watch import QUIET, Conditions, Watch
from apportion.types import cpu
from apportion.types.cluster import Cache, Cluster, Link
from apportion.types.cpu import CpuRates

PROCESSOR = replace(cpu_device("cpu"), flops_per_s=cpu.rates_per_format(7e10), host_bytes_per_s=2e10)
PROCESSOR_THAT_STREAMS = replace(PROCESSOR, stream_bytes_per_s=8e9)
CARD = replace(PROCESSOR, id="card", kind="cuda", torch_device="cuda:0", host_bytes_per_s=None)
ONE = CpuRates(
    read_bytes_per_s=1.5e10,
    flops_per_s={"fp32": 4e10},
    copied_bytes_per_s=8e9,
    cached_read_bytes_per_s=7e10,
    cached_copied_bytes_per_s=2e10,
)
MACHINE = Machine(
    devices=(PROCESSOR, CARD),
    names={"cpu": "a processor", "card": "a card"},
    threads={1: ONE, 2: replace(ONE, read_bytes_per_s=2e10)},
    products_measured=True,
    copy_bytes_per_s=9e9,
    disk_bytes_per_s=2e9,
    unix_socket=LinkRates(latency_s=2.5e-5, bytes_per_s=1.25e9),
    loopback=LinkRates(latency_s=3e-5, bytes_per_s=1e9),
)


def test_the_file_is_a_cluster_file(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text(cluster_toml({"local": MACHINE}, {}))
    other = [replace(device, mem_bytes_per_s=1.0, layer_overhead_s=0.5) for device in MACHINE.devices]
    cluster = read_cluster_toml(file, lambda _: other)
    for device, probed in zip(cluster.devices, MACHINE.devices, strict=True):
        assert device == replace(probed, layer_overhead_s=0.5, disk_bytes_per_s=2e9)
    (link,) = cluster.links
    assert link == Link(
        src="local", dst="local", latency_s=2.5e-5, bytes_per_s=1.25e9, source="measured", hop_s=HOP_S
    )


def test_the_file_says_where_streamed_weights_stay(tmp_path: Path):
    """And through which cache they pass."""
    cache = Cache(num_bytes=12_600_000, read_bytes_per_s=7e10, copied_bytes_per_s=2e10)
    device = replace(PROCESSOR_THAT_STREAMS, host_memory_bytes=20 * 2**30, disk_bytes_per_s=2e9, cache=cache)
    file = tmp_path / "cluster.toml"
    file.write_text(cluster_toml({"local": replace(MACHINE, devices=(device,))}, {}))
    assert read_cluster_toml(file, lambda _: [PROCESSOR]).devices[0] == device
    without = replace(MACHINE, devices=(PROCESSOR_THAT_STREAMS,), disk_bytes_per_s=None)
    file.write_text(cluster_toml({"local": without}, {}))
    assert read_cluster_toml(file, lambda _: [PROCESSOR]).devices[0] == PROCESSOR_THAT_STREAMS


def test_a_disk_is_read_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "FILE_BYTES", disk.PIECE_BYTES)
    monkeypatch.setattr(disk, "MEASURE_S", 1e-9)
    rate = disk.disk_bytes_per_s(tmp_path / "new")
    assert rate is None or rate > 1e6
    occupied = tmp_path / "file"
    occupied.touch()
    assert disk.disk_bytes_per_s(occupied) is None


def test_the_file_says_what_is_measured_of_a_processor():
    measured = cluster_toml({"local": MACHINE}, {})
    assert "# measured, of the engine's own products" in measured
    assumed = cluster_toml({"local": replace(MACHINE, products_measured=False)}, {})
    assert "# fp32 measured; without torch the others are assumed as fast" in assumed


def test_products_are_measured_in_every_format_where_torch_is(monkeypatch: pytest.MonkeyPatch):
    rates = probed_cpu.product_rates(1)
    assert rates is not None
    assert rates.flops_per_s.keys() == cpu.rates_per_format(1.0).keys()
    assert all(1e8 < rate < 1e14 for rate in rates.flops_per_s.values())
    assert 1e8 < rates.read_bytes_per_s < 1e13
    monkeypatch.setattr(probed_cpu, "find_spec", lambda _: None)
    assert probed_cpu.product_rates(1) is None


def test_the_environment_does_not_choose_the_code_that_is_measured(monkeypatch: pytest.MonkeyPatch):
    """It may hold BLAS to that of an older processor."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given: list[dict[str, str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        given.append(env)
        return subprocess.CompletedProcess(command, 0, stdout="2e10 1e11 3e10 4e10 5e10")

    monkeypatch.setattr(subprocess, "run", run)
    rates = probed_cpu.measured_rates(2)
    assert (rates.read_bytes_per_s, rates.flops_per_s["int8"], rates.copied_bytes_per_s) == (2e10, 1e11, 3e10)
    assert "OPENBLAS_CORETYPE" not in given[0]
    assert given[0]["OMP_NUM_THREADS"] == "2"


def test_only_this_machines_own_devices_have_a_name():
    ours = cpu_device("ours")
    slow = replace(cpu_device("slow", speed=0.5), num_threads=2)
    elsewhere = replace(ours, id="elsewhere", host="office")
    written = replace(ours, id="written", source="datasheet")
    card = replace(CARD, torch_device="cuda:63")
    names = hardware_names(Cluster(devices=(ours, slow, elsewhere, written, card), links=()))
    assert names == {
        "ours": f"{cpu_model()}, 1 thread",
        "slow": f"{cpu_model()}, 2 threads",
    }


def test_sockets_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_rates, "ROUND_TRIPS", 20)
    for rates in (unix_socket_rates(), loopback_rates()):
        assert 1e-6 < rates.latency_s < 0.1
        assert 1e6 < rates.bytes_per_s < 1e12


def test_the_command_prints_writes_and_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Watch, "conditions", lambda _: QUIET)
    file = tmp_path / "cluster.toml"
    assert exit_code(["probe", "--thorough", "--out", str(file)]) == 0
    shown, progress = capsys.readouterr()
    assert [line.partition(":")[0] for line in progress.splitlines()] == [
        f"measuring, {number} of {machine.NUM_STEPS}" for number in range(1, machine.NUM_STEPS + 1)
    ]
    assert "cpu" in shown
    assert "GB/s" in shown
    assert "other hosts are not measured" in shown
    assert "[[device]]" in file.read_text()
    assert str(tmp_path / "apportion" / "probe.json") in shown
    monkeypatch.setattr(probed_cpu, "measured_rates", None)  # what was saved is used
    rates = read_rates()
    cores = max(rates)
    whole, part = measure_cpu(1), measure_cpu(cores)
    assert whole.mem_bytes_per_s == rates[cores].read_bytes_per_s
    assert (part.mem_bytes_per_s, part.flops_per_s) == (rates[1].read_bytes_per_s, rates[1].flops_per_s)
    assert part.host_bytes_per_s == max(one.read_bytes_per_s for one in rates.values())


def test_saved_rates_of_another_processor_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_rates() == {}
    save_rates({1: ONE}, 2e9)
    assert read_rates() == {1: ONE}
    assert read_disk_rate() == 2e9
    for damaged in (probe_file().read_text().replace('"processor": "', '"processor": "Other '), "[]", "{"):
        probe_file().write_text(damaged)
        assert read_rates() == {}
        assert read_disk_rate() is None


def test_a_file_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "probe_machine", lambda _, **__: MACHINE)
    assert exit_code(["probe", "--out", str(tmp_path / "none" / "cluster.toml")]) == 2
    assert "cannot write" in capsys.readouterr().err


BUSY = Conditions(others_share=0.5, clock_hz=None)


def test_rates_of_a_busy_machine_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor take the place of better ones; those of a quiet machine take theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_rates({1: ONE}, 2e9, BUSY)
    assert probe_file().exists()
    assert read_rates() == {}
    assert read_disk_rate() is None
    save_rates({1: ONE}, 2e9)
    assert read_rates() == {1: ONE}
    save_rates({1: replace(ONE, read_bytes_per_s=1.0)}, 1.0, BUSY)
    assert (read_rates(), read_disk_rate()) == ({1: ONE}, 2e9)


def test_a_probe_of_a_busy_machine_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "probe_machine", lambda _, **__: MACHINE)
    monkeypatch.setattr(Watch, "conditions", lambda _: BUSY)
    assert exit_code(["probe"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "cores busy: plans do not start from these rates; probe again when it is quiet." in shown


def test_products_are_given_up_after_their_time():
    assert probed_cpu.product_rates(1, 0.01) is None


def test_a_short_probe_takes_15_seconds_of_two_cores_at_most(monkeypatch: pytest.MonkeyPatch):
    """By what its parts are given: rounds of measuring, with the start of each process, and the products' time."""
    asked: list[float | None] = []
    monkeypatch.setattr(machine, "measured_rates", lambda _: ONE)
    monkeypatch.setattr(machine, "product_rates", lambda _, most_s: asked.append(most_s))
    for name in ("copy_bytes_per_s", "unix_socket_rates", "loopback_rates"):
        monkeypatch.setattr(machine, name, lambda: None)
    monkeypatch.setattr(machine, "disk_bytes_per_s", lambda _: None)
    assert not machine.probe_machine(lambda _: None).products_measured
    assert not machine.probe_machine(lambda _: None, thorough=True).products_measured
    short, thorough = asked
    assert short is not None
    assert short <= machine.PRODUCTS_S
    assert thorough is None
    rounds_s = 2 * machine.CPU_ROUNDS * (3 * 0.15 + 2 * 0.05 + 0.5)
    assert rounds_s + machine.PRODUCTS_S + 2.5 <= 15
