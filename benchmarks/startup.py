"""How long a person waits: `apportion plan` of a home cluster to its answer, and `run demo` to its first token.

Both start their interpreter anew, with files in the page cache. CPU seconds of the command itself stand
beside the wall clock, for machines that are not idle.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

ROUNDS = 5
APPORTION = [sys.executable, "-m", "apportion"]
HOME = "tower: rtx-4090 + 2x rtx-3060-12gb; laptop: m2-max; link tower-laptop 1Gbit 0.3ms"
TWO_EQUAL = "tower: 2x rtx-3060-12gb"
COMMANDS = {
    "version": [*APPORTION, "--version"],
    "plan, two equal cards": [
        *APPORTION,
        "plan",
        "llama-3.1-8b",
        "--weights",
        "bf16",
        "--devices",
        TWO_EQUAL,
    ],
    "plan, home cluster": [*APPORTION, "plan", "llama-3.1-8b", "--devices", HOME],
    "run demo to first token": [
        *(*APPORTION, "run", "demo", "ROMEO:", "--max-tokens", "1", "--devices", "a=cpu:600MiB, b=cpu:600MiB")
    ],
}


def first_output_s(command: list[str]) -> tuple[float, float]:
    """Wall seconds to the first line on stdout, CPU seconds to the end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as cache:
        begun_s = time.perf_counter()
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "XDG_CACHE_HOME": cache},
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            first_s = time.perf_counter() - begun_s
            process.stdout.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return first_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    rows = []
    for name, command in COMMANDS.items():
        first_output_s(command)
        times = [first_output_s(command) for _ in range(ROUNDS)]
        first_s, cpu_s = (median(column) for column in zip(*times, strict=True))
        print(f"{name:24} {first_s:5.2f} s ({min(times)[0]:.2f} to {max(times)[0]:.2f}), CPU {cpu_s:5.2f} s")
        rows.append({"command": name, "first_output_s": first_s, "cpu_s": cpu_s})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
