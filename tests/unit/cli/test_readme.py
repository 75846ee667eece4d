"""What README.md says that plans print is what they print, and its commands exist."""

import re
import sys
from pathlib import Path

import pytest

from apportion.cli.main import VERBS

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))
from readme_outputs import commands, printed, rewritten  # noqa: E402

TEXT = (ROOT / "README.md").read_text()


def test_there_are_a_plan_and_a_run():
    assert [command.split()[1] for command in commands(TEXT)] == ["plan", "run"]


@pytest.mark.parametrize("command", [command for command in commands(TEXT) if command.split()[1] == "plan"])
def test_plans_are_what_they_print(command: str):
    assert printed(command) == commands(TEXT)[command]


def test_every_command_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)", TEXT, re.MULTILINE)
    assert set(rows) == {"apportion", *VERBS}  # the heading, and a row each or more


def test_a_block_is_replaced_whole():
    text = "a\n<!-- output: x -->\n```\nold\nlines\n```\nb\n"
    assert rewritten(text, str.upper) == "a\n<!-- output: x -->\n```\nX\n```\nb\n"
    assert commands(text) == {"x": "old\nlines"}
