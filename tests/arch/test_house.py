"""The shape of the code that design and reader rely on."""

import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[2] / "src" / "apportion"


def test_imports_go_one_way():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=SRC.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
