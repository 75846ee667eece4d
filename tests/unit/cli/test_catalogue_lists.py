"""What the catalogue knows, listed: all of it, a part by text, and where it was read."""

import pytest

from apportion.catalog.gpus import gpus
from apportion.catalog.known_models import known_models
from apportion.catalog.processors import processors
from apportion.cli.main import exit_code


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert exit_code(list(arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    return lines


def test_everything_is_listed(capsys: pytest.CaptureFixture[str]):
    names = {line.split()[0] for line in listed(capsys, "models")[1:-2]}
    assert names == set(known_models())
    names = {line.split()[0] for line in listed(capsys, "devices")[1:-2]}
    assert names == {*gpus(), *processors()}


def test_a_part_is_listed_by_any_of_its_names(capsys: pytest.CaptureFixture[str]):
    heading, *rows, count, last = listed(capsys, "devices", "RTX 3060")
    assert heading.split() == ["device", "kind", "memory", "reads"]
    assert {row.split()[0] for row in rows} == {
        "rtx-3060-12gb",
        "rtx-3060-8gb",
        "rtx-3060-ti",
        "rtx-3060-laptop",
    }
    # 192 bits at 15 Gbit/s a pin
    assert next(row for row in rows if "12gb" in row).split()[1:] == ["cuda", "12.0", "GiB", "360", "GB/s"]
    assert count == "4 devices called like 'RTX 3060'"
    assert last == 'plan one with: apportion plan MODEL --devices "rtx-3060-8gb"'
    assert [line.split()[0] for line in listed(capsys, "models", "deepseek-r1:14b")[1:-2]] == [
        "deepseek-r1-distill-qwen-14b"
    ]


def test_figures_are_those_of_the_plan(capsys: pytest.CaptureFixture[str]):
    _, row, count, last = listed(capsys, "models", "llama-3.1-8b")
    # 8,030,261,248 parameters of 2 bytes
    assert row.split() == ["llama-3.1-8b", "8.03", "B", "32", "131,072", "15.0", "GiB", "yes"]
    assert count == "1 model called like 'llama-3.1-8b'"
    assert last == "plan one with: apportion plan llama-3.1-8b"


def test_sources_are_shown_on_request(capsys: pytest.CaptureFixture[str]):
    assert exit_code(["models", "qwen3-8b", "--details"]) == 0
    assert "qwen3-8b: Qwen/Qwen3-8B; github.com/" in capsys.readouterr().out
    assert exit_code(["devices", "gtx-970", "--details"]) == 0
    assert "gtx-970: GeForce GTX 970; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models", "lama-3.1-8b"), "unknown model 'lama-3.1-8b'; did you mean llama-3.1-8b"),
        (("devices", "rtx-9999"), "unknown device 'rtx-9999'"),
    ],
)
def test_what_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
):
    assert exit_code(list(arguments)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "text", "names"),
    [
        ("devices", "m2", {"m2", "m2-pro", "m2-max", "m2-ultra"}),
        ("devices", "rtx3060ti", {"rtx-3060-ti"}),
        ("models", "QWEN2.5 7b", {"qwen2.5-7b"}),
        ("models", "llama3.3", {"llama-3.3-70b"}),
    ],
)
def test_a_part_begins_a_word(capsys: pytest.CaptureFixture[str], verb: str, text: str, names: set[str]):
    """Not "p100-sxm2", and no "qwen-32b" for "qwen3"."""
    assert {line.split()[0] for line in listed(capsys, verb, text)[1:-2]} == names
