"""What `apportion probe` measures, and that its file is a cluster file."""

from dataclasses import replace
from pathlib import Path

import pytest
from plans import cpu_device

from apportion.catalog.cluster_text import read_cluster_toml
from apportion.cli.main import exit_code
from apportion.probe import host_rates, local
from apportion.probe.cluster_file import cluster_toml
from apportion.probe.hardware import cpu_model, hardware_names
from apportion.probe.host_rates import LinkRates, loopback_rates, unix_socket_rates
from apportion.probe.machine import Machine
from apportion.types import cpu
from apportion.types.cluster import Cluster, Link

CARD = replace(cpu_device("card"), kind="cuda", torch_device="cuda:0")
MACHINE = Machine(
    devices=(cpu_device("cpu"), CARD),
    names={"cpu": "a processor", "card": "a card"},
    products_measured=True,
    copy_bytes_per_s=9e9,
    unix_socket=LinkRates(latency_s=2.5e-5, bytes_per_s=1.25e9),
    loopback=LinkRates(latency_s=3e-5, bytes_per_s=1e9),
)


def test_the_file_is_a_cluster_file(tmp_path: Path):
    file = tmp_path / "cluster.toml"
    file.write_text(cluster_toml({"local": MACHINE}, {}))
    other = [replace(device, mem_bytes_per_s=1.0, layer_overhead_s=0.5) for device in MACHINE.devices]
    cluster = read_cluster_toml(file, lambda _: other)
    for device, probed in zip(cluster.devices, MACHINE.devices, strict=True):
        assert device == replace(probed, layer_overhead_s=0.5)
    (link,) = cluster.links
    assert link == Link(src="local", dst="local", latency_s=2.5e-5, bytes_per_s=1.25e9, source="measured")


def test_the_file_says_what_is_measured_of_a_processor():
    measured = cluster_toml({"local": MACHINE}, {})
    assert "# measured, of the engine's own products" in measured
    assumed = cluster_toml({"local": replace(MACHINE, products_measured=False)}, {})
    assert "# fp32 measured; without torch the others are assumed as fast" in assumed


def test_products_are_measured_in_every_format_where_torch_is(monkeypatch: pytest.MonkeyPatch):
    rates = local.product_rates(1)
    assert rates is not None
    assert rates.keys() == cpu.rates_per_format(1.0).keys()
    assert all(1e8 < rate < 1e14 for rate in rates.values())
    monkeypatch.setattr(local, "find_spec", lambda _: None)
    assert local.product_rates(1) is None


def test_only_this_machines_own_devices_have_a_name():
    ours = cpu_device("ours")
    slow = replace(cpu_device("slow", speed=0.5), num_threads=2)
    elsewhere = replace(ours, id="elsewhere", host="office")
    written = replace(ours, id="written", source="datasheet")
    card = replace(CARD, torch_device="cuda:63")
    names = hardware_names(Cluster(devices=(ours, slow, elsewhere, written, card), links=()))
    assert names == {
        "ours": f"{cpu_model()}, 1 thread",
        "slow": f"{cpu_model()}, 2 threads, at 0.5 of its speed",
    }


def test_sockets_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host_rates, "ROUND_TRIPS", 20)
    for rates in (unix_socket_rates(), loopback_rates()):
        assert 1e-6 < rates.latency_s < 0.1
        assert 1e6 < rates.bytes_per_s < 1e12


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "cluster.toml"
    assert exit_code(["probe", "--out", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "cpu" in shown
    assert "GB/s" in shown
    assert "other hosts are not measured" in shown
    assert "[[device]]" in file.read_text()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert exit_code(["probe", "--out", str(tmp_path / "none" / "cluster.toml")]) == 2
    assert "cannot write" in capsys.readouterr().err
