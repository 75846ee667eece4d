"""Planning on a machine that is no Linux one: modules and calls that only Linux or Unix have are taken away first.

Child processes are blocked too: a `sitecustomize` module on their path takes the same away.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import SRC

BLOCK = '''
import mmap, os, signal, sys

import psutil  # each system has its own, which may use what is taken away here

for name in ("resource", "fcntl", "termios", "pwd", "grp", "tty", "pty", "syslog", "spwd", "_posixshmem"):
    sys.modules[name] = None
for module, names in {
    os: "sched_getaffinity memfd_create O_DIRECT preadv pwritev fork eventfd sendfile getuid geteuid",
    signal: "SIGHUP SIGQUIT SIGKILL SIGSTOP pthread_sigmask",
    mmap: "MADV_HUGEPAGE MADV_DONTNEED MAP_POPULATE",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)


def refuse(event, arguments):
    """/proc and /sys are not there for our own code; psutil stands for the other systems' own ways."""
    if event == "open" and str(arguments[0]).startswith(("/proc", "/sys")):
        frame = sys._getframe(1)
        while frame is not None:
            if "apportion" in frame.f_globals.get("__name__", ""):
                raise FileNotFoundError(arguments[0])
            if "psutil" in frame.f_globals.get("__name__", ""):
                return
            frame = frame.f_back


sys.addaudithook(refuse)
'''
RUN = "from apportion.cli.main import main\nmain()"


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("off-linux")
    (folder / "sitecustomize.py").write_text(BLOCK)
    return folder


def apportion(blocked: Path, *arguments: str, code: str = RUN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{blocked}{os.pathsep}{SRC}"},
        timeout=120,
    )


def test_the_block_blocks(blocked: Path) -> None:
    for code in ("import resource", "import os; os.sched_getaffinity(0)", "import signal; signal.SIGHUP"):
        assert apportion(blocked, code=code).returncode == 1, code
    reads = "__name__ = 'apportion.x'\nfrom pathlib import Path\nPath('/proc/cpuinfo').read_text()"
    assert "FileNotFoundError" in apportion(blocked, code=reads).stderr


def test_all_of_planning_is_used(blocked: Path, tmp_path: Path) -> None:
    plan = str(tmp_path / "p.json")
    devices = "a: rtx-3060-12gb; b: Mac mini M4 16GB; link a-b 1Gbit 0.3ms"
    for arguments in (
        ["plan", "qwen3-0.6b", "--devices", devices, "--out", plan, "--why"],
        ["verify", plan],
        ["whatif", plan, "--context", "2k"],
        ["export", plan, "--to", "llama.cpp"],
    ):
        done = apportion(blocked, *arguments)
        assert done.returncode == 0, done.stderr


def test_this_machine_is_measured_without_its_kernel_s_files(blocked: Path) -> None:
    done = apportion(blocked, "plan", "demo")
    assert done.returncode == 0, done.stderr
    assert "cpu" in done.stdout
