"""From the shell to the first token of the bundled model, files in the page cache; and what the coordinator spends on a
step of 64 sequences."""

import subprocess
import sys
import time
from statistics import median

from speed_model import heading, ratio

RUNS = 4
COMMAND = [sys.executable, "-m", "apportion", "run", "demo", "ROMEO:", "--max-tokens", "4"]


def first_output_s() -> float:
    begun_s = time.perf_counter()
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("ROMEO:") + 1)
        seconds = time.perf_counter() - begun_s
        process.communicate()
    return seconds


def main() -> None:
    heading("Start to first token")
    first_output_s()
    seconds = [first_output_s() for _ in range(RUNS)]
    print(f"seconds: {', '.join(f'{one:.2f}' for one in seconds)}")
    ratio("seconds to the first token, at most", median(seconds), 5)


if __name__ == "__main__":
    main()
