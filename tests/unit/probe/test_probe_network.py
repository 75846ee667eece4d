"""`apportion probe` between machines: what is measured and written, and who is refused."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from plans import cpu_device

from apportion.catalog.cluster_text import read_cluster_toml
from apportion.cli.main import exit_code
from apportion.probe import channel, listen, network
from apportion.probe.channel import Channel, KeyMismatchError, connect, parse_address
from apportion.probe.cluster_file import cluster_toml
from apportion.probe.host_rates import LinkRates
from apportion.probe.listen import listening, serve
from apportion.probe.machine import Machine
from apportion.probe.network import measure_link, probe_network
from apportion.types.cpu import CpuRates
from apportion.types.errors import ClusterError, UsageError

KEY = "a secret of enough characters"
RATES = LinkRates(latency_s=2.5e-5, bytes_per_s=1.25e9)
CPU = replace(cpu_device("cpu"), layer_overhead_s=1e-4, step_overhead_s=2e-4, host_bytes_per_s=2e10)
ALL_CORES = CpuRates(
    read_bytes_per_s=2e10,
    flops_per_s={"fp32": 7e10},
    copied_bytes_per_s=8e9,
    cached_read_bytes_per_s=7e10,
    cached_copied_bytes_per_s=2e10,
)
MACHINE = Machine(
    products_measured=False,
    devices=(CPU,),
    names={"cpu": "a processor"},
    threads={1: ALL_CORES},
    copy_bytes_per_s=9e9,
    disk_bytes_per_s=2e9,
    unix_socket=RATES,
    loopback=RATES,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listen, "probe_machine", lambda _: MACHINE)
    monkeypatch.setattr(network, "ROUND_TRIPS", 20)
    monkeypatch.setattr(network, "LONG_ENOUGH_S", 1e-3)


@contextmanager
def listener(key: str = KEY) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """Its address on loopback and what it told; its thread ends with the socket."""
    told: list[str] = []

    def run() -> None:
        try:
            serve(server, key, told.append)
        except OSError:
            return

    with listening(("127.0.0.1", 0), key) as server:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server.getsockname(), told
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    assert not thread.is_alive()


def ignored(_: str) -> None:
    return None


def test_all_machines_and_all_links_are_measured_and_written(tmp_path: Path):
    begun: list[str] = []
    with listener() as (tower, _), listener() as (laptop, _):
        found = probe_network({"tower": tower, "laptop": laptop}, KEY, begun.append)
    assert len(begun) == network.num_steps(2)
    assert found.machines == {"tower": MACHINE, "laptop": MACHINE}
    assert set(found.links) == {("local", "tower"), ("local", "laptop"), ("tower", "laptop")}
    for rates in found.links.values():
        assert 1e-6 < rates.latency_s < 0.1
        assert 1e6 < rates.bytes_per_s < 1e12
    file = tmp_path / "cluster.toml"
    file.write_text(cluster_toml({"local": MACHINE, **found.machines}, found.links))
    cluster = read_cluster_toml(file, lambda _: [CPU])
    assert [(device.id, device.host) for device in cluster.devices] == [
        ("cpu", "local"),
        ("tower-cpu", "tower"),
        ("laptop-cpu", "laptop"),
    ]
    assert cluster.device("tower-cpu").layer_overhead_s == CPU.layer_overhead_s
    assert {(link.src, link.dst) for link in cluster.links} == {
        *((host, host) for host in ("local", "tower", "laptop")),
        *found.links,
    }
    assert {link.source for link in cluster.links} == {"measured"}


def test_a_link_that_others_cannot_measure_is_left_out():
    with listener() as (tower, _), listener() as (laptop, _):

        def moved(address: tuple[str, int], _: str) -> LinkRates:
            raise ConnectionRefusedError(111, f"Connection refused by {address[1]}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(listen, "measure_link", moved)
            found = probe_network({"tower": tower, "laptop": laptop}, KEY, ignored)
    assert found.missing == {("tower", "laptop"): f"Connection refused by {laptop[1]}"}
    assert ("tower", "laptop") not in found.links


def test_the_slower_direction_counts(monkeypatch: pytest.MonkeyPatch):
    """By the clock: 4 KiB round trips take 2 ms, there a byte takes 1 ns and back 3 ns."""

    def timed(_: socket.socket, size: int, answer_size: int, num: int) -> list[float]:
        return [2e-3 + 1e-9 * size * (size > 4096) + 3e-9 * answer_size * (answer_size > 4096)] * num

    monkeypatch.setattr(network, "round_trips_s", timed)
    monkeypatch.setattr(network, "LONG_ENOUGH_S", 0.01)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        rates = network.channel_rates(Channel(ours, b"", "client"))
    assert rates.latency_s == 1e-3
    assert rates.bytes_per_s == pytest.approx(1e9 / 3)


def test_another_key_is_refused_by_both_sides():
    with listener() as (address, told):
        with pytest.raises(KeyMismatchError, match="keys differ"):
            connect(address, "another secret, long enough")
        with pytest.raises(ClusterError, match=r"tower at 127\.0\.0\.1:\d+ \(the keys differ\); run"):
            probe_network({"tower": address}, "another secret, long enough", ignored)
        assert measure_link(address, KEY).bytes_per_s > 0
    assert not any("measuring this machine" in line for line in told)


def refused(speak: Callable[[socket.socket], object]) -> str:
    """What the listener says of a peer that speaks so; it goes on to serve the next."""
    with listener() as (address, told):
        with socket.create_connection(address) as peer:
            speak(peer)
            with suppress(OSError):  # reset, and perhaps before we say that we are done
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
        assert measure_link(address, KEY).bytes_per_s > 0
    return told[0]


def test_a_peer_without_proof_gets_nothing():
    assert "no apportion probe" in refused(lambda peer: peer.sendall(b"GET / HTTP/1.1\r\n" * 9))
    assert "key differs" in refused(lambda peer: peer.sendall(channel._MAGIC + bytes(32 + 32)))  # pyright: ignore


def test_an_altered_request_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(ours, b"one key", "client").send({"ask": "machine"})
        with pytest.raises(ConnectionError, match="altered"):
            Channel(theirs, b"another", "server").receive()


def test_a_silent_peer_does_not_keep_others_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.1)
    with listener() as (address, told), socket.create_connection(address):
        assert measure_link(address, KEY).bytes_per_s > 0
    assert "timed out" in told[0]


@pytest.mark.parametrize("key", ["", "short"])
def test_nothing_listens_or_asks_beyond_loopback_without_a_key(
    key: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    with (
        pytest.raises(UsageError, match=r"listening on 0\.0\.0\.0.* needs --key"),
        listening(("0.0.0.0", 0), key),
    ):
        pass
    with pytest.raises(UsageError, match=r"asking tower .* needs --key"):
        probe_network({"tower": ("192.0.2.1", 7453)}, key, ignored)
    file = tmp_path / "key"
    file.write_text(key)
    assert exit_code(["probe", "--listen", "0.0.0.0", "--key-file", str(file)]) == 2
    assert "at least 16 characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.3", ("10.0.0.3", 7453)),
        ("tower.lan:9000", ("tower.lan", 9000)),
        ("[fe80::1]:9000", ("fe80::1", 9000)),
        ("[::1]", ("::1", 7453)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hosts", ""], "NAME=ADDRESS"),
        (["--hosts", "local=10.0.0.3"], "NAME=ADDRESS"),
        (["--hosts", "a=127.0.0.1, a=127.0.0.2"], "NAME=ADDRESS"),
        (["--hosts", "a=127.0.0.1:x"], "no address"),
        (["--hosts", "a=127.0.0.1:1"], "run `apportion probe --listen` there"),
        (["--listen", "127.0.0.1", "--hosts", "a"], "only answers"),
    ],
)
def test_what_cannot_be_used_is_one_line(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    assert exit_code(["probe", *options]) == 2
    *progress, error = capsys.readouterr().err.splitlines()
    assert told in error
    assert all(line.startswith("measuring") for line in progress)
