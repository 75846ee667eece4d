"""The shape of the code that design and reader rely on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "apportion"
FILES = sorted(SRC.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SRC)))
def test_files_and_functions_stay_small(file: Path):
    source = file.read_text()
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


def test_imports_go_one_way():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=SRC.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
