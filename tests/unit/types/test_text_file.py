"""Files that never end are refused before they fill the memory."""

from pathlib import Path

import pytest

from apportion.cli.main import exit_code
from apportion.types.text_file import MOST_BYTES, read_text


def test_text_is_read_whole(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_bytes("Grüße\n".encode())
    assert read_text(file) == "Grüße\n"


def test_a_file_without_an_end_is_refused():
    with pytest.raises(OSError, match=f"more than {MOST_BYTES >> 20} MiB"):
        read_text(Path("/dev/zero"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "/dev/zero"],
        ["export", "/dev/zero", "--to", "vllm"],
        ["plan", "demo", "--cluster", "/dev/zero"],
        ["run", "demo", "--prompts", "/dev/zero"],
    ],
)
def test_a_command_that_is_given_one_says_so_in_a_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert exit_code(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "/dev/zero" in said
