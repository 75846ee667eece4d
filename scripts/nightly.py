"""Runs every test marked `nightly`, and exports against llama.cpp's own programs, two at a time; writes what came of it
to docs/nightly.md.

    python scripts/nightly.py [--seed 20261201] [--jobs 2] [NODE ...]

Each test is a process of its own, all with one seed for hypothesis; what fails is repeated by the line it prints.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "nightly.md"
PROGRAMS = ROOT / "build" / "llama.cpp"
WITH_PROGRAMS = "tests/unit/export/test_export_llama_cpp.py"
"""Runs the programs that scripts/llama_cpp_programs.sh builds."""


@dataclass(frozen=True)
class Outcome:
    node: str
    passed: bool
    wall_s: float
    report: str


def nodes() -> list[str]:
    """Test functions with all their parameters; those against enumeration first, as they take longest."""
    found = _pytest("--collect-only", "-q").stdout.splitlines()
    functions = dict.fromkeys(line.split("[")[0] for line in found if "::" in line)
    return sorted(functions, key=lambda node: "tests/property" not in node)


def run(node: str, seed: int) -> Outcome:
    begun_s = time.monotonic()
    done = _with_programs() if node == WITH_PROGRAMS else _pytest("-q", f"--hypothesis-seed={seed}", node)
    wall_s = time.monotonic() - begun_s
    outcome = Outcome(node, done.returncode == 0, wall_s, done.stdout + done.stderr)
    print(f"{'passed' if outcome.passed else 'FAILED'} {wall_s:7.0f} s  {node}", flush=True)
    if not outcome.passed:
        print(outcome.report, flush=True)
        print(f"again: pytest -m nightly --hypothesis-seed={seed} '{node}'", flush=True)
    return outcome


def _pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(sys.executable, "-m", "pytest", "-m", "nightly", "-p", "no:cacheprovider", *arguments)


def _with_programs() -> subprocess.CompletedProcess[str]:
    """Builds llama.cpp's programs where there are none yet, which takes minutes, and runs the tests that need them."""
    if not (PROGRAMS / "bin" / "llama-server").exists():
        built = _run("sh", "scripts/llama_cpp_programs.sh", str(PROGRAMS))
        if built.returncode:
            return built
    variable = f"APPORTION_LLAMA_CPP={PROGRAMS / 'bin'}"
    return _run(
        "env", variable, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", WITH_PROGRAMS
    )


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def page(outcomes: list[Outcome], seed: int, wall_s: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    failed = sum(not outcome.passed for outcome in outcomes)
    head = [
        "# The long tests",
        "",
        f"`make test-nightly`, {datetime.now(UTC):%Y-%m-%d}, commit {commit}: {len(outcomes) - failed} passed,"
        f" {failed} failed, in {wall_s / 60:.0f} minutes on {os.cpu_count()} cores ({_processor()}, Python"
        f" {platform.python_version()}), hypothesis' seed {seed}.",
        "",
        "| test | seconds | |",
        "|---|---|---|",
    ]
    rows = [
        f"| `{outcome.node}` | {outcome.wall_s:.0f} | {'passed' if outcome.passed else 'failed'} |"
        for outcome in sorted(outcomes, key=lambda outcome: outcome.node)
    ]
    return "\n".join([*head, *rows, ""])


def _processor() -> str:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=int(f"{datetime.now(UTC):%Y%m%d}"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("nodes", nargs="*")
    given = parser.parse_args()
    asked = given.nodes or [WITH_PROGRAMS, *nodes()]
    begun_s = time.monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        outcomes = list(pool.map(lambda node: run(node, given.seed), asked))
    if not given.nodes:
        PAGE.write_text(page(outcomes, given.seed, time.monotonic() - begun_s))
    sys.exit(any(not outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    main()
