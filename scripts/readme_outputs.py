"""Writes into README.md what its commands print now: every block of code under a comment `<!-- output: COMMAND -->`."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"(<!-- output: (?P<command>[^\n]+) -->\n```\n)(?P<text>.*?)\n?```\n", re.DOTALL)


def commands(text: str) -> dict[str, str]:
    """What every command is said to print."""
    return {block["command"]: block["text"] for block in _BLOCK.finditer(text)}


def rewritten(text: str, printed: Callable[[str], str]) -> str:
    return _BLOCK.sub(lambda block: f"{block[1]}{printed(block['command'])}\n```\n", text)


def printed(command: str) -> str:
    """In 80 columns, of both streams, without spaces at the ends of lines."""
    environment = {
        **os.environ,
        "COLUMNS": "80",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        command,
        shell=True,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rewritten(readme.read_text(), printed))
