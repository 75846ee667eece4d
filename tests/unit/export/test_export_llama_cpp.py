"""What is exported for llama.cpp, given to llama.cpp's own programs: $APPORTION_LLAMA_CPP is the folder they are in.

scripts/llama_cpp_programs.sh builds them.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import pytest
from exported import export
from planned import cpu
from unit.export.test_export import gpu, plan_of
from unit.export.test_export_flags import GROUP
from unit.export.test_export_situations import planned

from apportion.export.launch import MODEL, Launch
from apportion.types.plan import Plan

VARIABLE = "APPORTION_LLAMA_CPP"
START_S = 20.0


@pytest.fixture
def programs() -> Path:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} does not name a folder with llama.cpp's programs")
    assert (Path(folder) / "llama-server").is_file(), f"{VARIABLE}={folder} holds no llama-server"
    return Path(folder)


def parsed(programs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The parser takes all words before --version, at which it stops with success."""
    command = [str(programs / "llama-server"), *words, "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def server_words(plan: Plan) -> list[str]:
    program, *words = export(plan, "llama.cpp").launches[-1].command
    assert program == "llama-server"
    return [word.replace(MODEL, "/none.gguf") for word in words]


def test_words_that_are_not_known_are_refused(programs: Path):
    """So that the other tests here can fail."""
    assert parsed(programs, "--no-such-option").returncode != 0
    assert parsed(programs, "--split-mode", "diagonal").returncode != 0


@pytest.mark.parametrize(
    "plan",
    [
        plan_of([[1]], [12], [cpu("laptop", 8)]),
        plan_of([[1], [1]], [5, 7], [cpu("laptop", 8), gpu("card", 0)]),
        plan_of([[1], [1], [1]], [5, 4, 3], [gpu("a", 0), gpu("b", 1), cpu("laptop", 8)]),
        GROUP,
        planned("qwen3-30b-a3b", "int4", "tower: rtx-3060-12gb + cpu:64GiB", 8192),
        planned("glm-4.5-air", "int4", "tower: rtx-4090 + cpu:96GiB", 8192),
    ],
    ids=["a CPU", "a CPU first", "a CPU last", "a group", "experts on the CPU", "shared experts too"],
)
def test_the_parser_takes_what_is_exported(plan: Plan, programs: Path):
    done = parsed(programs, *server_words(plan))
    assert done.returncode == 0, done.stderr
    assert "version" in done.stdout + done.stderr


def test_devices_of_other_hosts_are_reached_through_their_servers(programs: Path):
    """Two CPUs behind servers of their own, started as exported but on ports that are free."""
    devices = [replace(cpu(name, 8), host=host) for name, host in (("desk", "main"), ("nas", "127.0.0.1"))]
    exported = export(plan_of([[1], [1]], [5, 7], devices), "llama.cpp")
    *servers, server = exported.launches
    assert len(servers) == 1
    with ExitStack() as started:
        ports = {
            launch.command[-1]: started.enter_context(rpc_server(programs, launch)) for launch in servers
        }
        words = list(server.command[1:])
        addresses = words[words.index("--rpc") + 1]
        for old, new in ports.items():
            addresses = addresses.replace(f":{old}", f":{new}")
        words[words.index("--rpc") + 1] = addresses
        done = parsed(programs, *(word.replace(MODEL, "/none.gguf") for word in words))
    assert done.returncode == 0, done.stderr


@contextmanager
def rpc_server(programs: Path, launch: Launch) -> Iterator[int]:
    """Its port, once something listens there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program, *words, _ = launch.command
    with subprocess.Popen(
        [str(programs / program), *words, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            wait_for(port, server)
            yield port
        finally:
            server.terminate()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = monotonic() + START_S
    while monotonic() < deadline_s:
        assert server.poll() is None, "the server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")
