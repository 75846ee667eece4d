"""Processes below another, and whether they are gone."""

import time
from collections.abc import Iterable

import psutil


def children(pid: int) -> list[int]:
    """Every process below `pid`, the forkserver's among them; [] where it has ended."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def assert_gone(pids: Iterable[int], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and not is_zombie(pid)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.05)


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
