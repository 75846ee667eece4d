"""Runs the tests in parts, each of which has a budget, and says at the end what each took.

    python scripts/test.py [--fast | PART ...]

What only computes runs on all cores at once; what starts processes, or measures time or memory, runs alone. A part that
fails does not keep the others from running.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
AT_ONCE = ("-n", "logical", "--maxprocesses", "8", "--dist")
"""A worker takes up to 600 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    folders: tuple[str, ...]
    """Of tests, each with what is below it and not another part's."""
    budget_s: int
    at_once: str = ""
    """How they are shared out among processes, as pytest-xdist calls it; "" for one process."""


# The kernels come before all that would compile them in one process.
PARTS = {
    "units": Part(folders=("arch", "unit", "property"), budget_s=150, at_once="worksteal"),
    "kernels": Part(folders=("unit/model", "unit/native"), budget_s=120, at_once="loadfile"),
    "runs": Part(
        folders=("unit/transport", "unit/probe", "unit/engine", "transport", "cli", "library"), budget_s=90
    ),
    "parity": Part(folders=("parity",), budget_s=120),
    "faults": Part(folders=("faults",), budget_s=90),
}
FAST = Part(folders=("arch", "unit"), budget_s=90, at_once="worksteal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    part: Part
    passed: bool
    wall_s: float
    cpu_s: float
    num: dict[str, int]


def run(part: Part) -> Outcome:
    begun_s, begun_cpu_s = time.monotonic(), children_cpu_s()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *selected(part)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        return Outcome(
            part=part,
            passed=done.returncode == 0,
            wall_s=time.monotonic() - begun_s,
            cpu_s=children_cpu_s() - begun_cpu_s,
            num=counted(report),
        )


def selected(part: Part) -> list[str]:
    inner = {other for other in assigned() if any(other.startswith(f"{own}/") for own in part.folders)}
    return [
        *((*AT_ONCE, part.at_once) if part.at_once else ()),
        *(f"tests/{folder}" for folder in part.folders),
        *(f"--ignore=tests/{folder}" for folder in sorted(inner.difference(part.folders))),
    ]


def assigned() -> set[str]:
    return {folder for part in PARTS.values() for folder in part.folders}


def rest() -> Part | None:
    """The folders that no part names, alone."""
    tops = {file.relative_to(TESTS).parts[0] for file in TESTS.rglob("test_*.py")}
    folders = sorted(tops - {folder.partition("/")[0] for folder in assigned()})
    return Part(folders=tuple(folders), budget_s=0) if folders else None


def children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def counted(report: Path) -> dict[str, int]:
    if not report.exists():
        return {"errors": 1}
    suite = ElementTree.parse(report).getroot()[0]
    num = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    return {"passed": num.pop("tests") - sum(num.values()), **num}


def table(outcomes: dict[str, Outcome]) -> str:
    lines = [f"{'part':10}{'seconds':>9}{'budget':>8}{'cpu s':>8}"]
    for name, outcome in outcomes.items():
        over = "  OVER ITS BUDGET" if outcome.wall_s > outcome.part.budget_s else ""
        num = ", ".join(f"{number} {what}" for what, number in outcome.num.items() if number)
        seconds = f"{outcome.wall_s:9.0f}{outcome.part.budget_s:8}{outcome.cpu_s:8.0f}"
        lines.append(f"{name:10}{seconds}  {num}{over}")
    total = [sum(outcome.wall_s for outcome in outcomes.values())]
    total.append(sum(outcome.part.budget_s for outcome in outcomes.values()))
    return "\n".join([*lines, f"{'all':10}{total[0]:9.0f}{total[1]:8.0f}"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    given = parser.parse_args()
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there is {', '.join(PARTS)}")
    if given.fast:
        asked = {"fast": FAST}
    else:
        asked = {name: PARTS[name] for name in given.parts or PARTS}
        if not given.parts and (others := rest()):
            asked["rest"] = others
    outcomes = {name: run(part) for name, part in asked.items()}
    print(table(outcomes))
    sys.exit(any(not outcome.passed for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
