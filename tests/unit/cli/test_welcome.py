"""`apportion` alone, and what its help says."""

import re
import shlex
import time

import pytest

from apportion.catalog.known_models import known_config
from apportion.cli import welcome
from apportion.cli.main import VERBS, exit_code

GIB = 2**30


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  apportion ")]


def machine(monkeypatch: pytest.MonkeyPatch, cards: tuple[tuple[str, int], ...], gib: float) -> str:
    monkeypatch.setattr(welcome, "cuda_memories", lambda: cards)
    monkeypatch.setattr(welcome, "memory_bytes", lambda: round(gib * GIB))
    return welcome.welcome()


def test_alone_it_shows_this_machine_and_what_to_type_next(capsys: pytest.CaptureFixture[str]):
    begun_s = time.process_time()
    assert exit_code([]) == 0
    assert time.process_time() - begun_s < 1
    shown = capsys.readouterr().out
    assert re.search(r"this machine: \d+ CPU cores?, \d+ GiB, ", shown)
    lines = shown.splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80
    asked = commands(shown)
    assert {words[0] for words in asked} == {"plan", "run", "probe"}
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("cards", "gib", "model"),
    [
        ((), 1, "demo"),  # 494 M parameters in fp32 are 1.84 GiB
        ((), 23, "llama-3.2-3b"),  # 3.21 B are 12.0 of 23 · 0.6; 8.03 B would be 29.9
        ((("A card", 24 * GIB),), 64, "llama-3.2-3b"),  # 16 bits: 8.03 B are 15.0 GiB of 24 · 0.6 = 14.4
        ((("A card", 24 * GIB),) * 2, 64, "qwen3-14b"),  # 27.6 of 28.8
    ],
)
def test_the_first_command_is_for_a_model_that_fits(
    cards: tuple[tuple[str, int], ...], gib: float, model: str, monkeypatch: pytest.MonkeyPatch
):
    assert commands(machine(monkeypatch, cards, gib))[0] == ["plan", model]
    assert model == "demo" or known_config(model) is not None


def test_cards_are_named(monkeypatch: pytest.MonkeyPatch):
    assert ", Big Card (24 GiB)\n" in machine(monkeypatch, (("Big Card", 24 * GIB),), 64)
    assert ", no NVIDIA GPU\n" in machine(monkeypatch, (), 64)


def test_without_the_engine_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(welcome, "find_spec", lambda _: None)
    shown = machine(monkeypatch, (), 64)
    assert "pip install" in shown
    assert "run" not in {words[0] for words in commands(shown)}


def test_the_plans_it_shows_work_as_they_stand(capsys: pytest.CaptureFixture[str]):
    planned = [words for words in commands(welcome.welcome()) if words[0] == "plan" and "--devices" in words]
    assert len(planned) == 2
    for words in planned:
        assert exit_code([*words, "--no-calibration"]) == 0
        assert "Proven" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_whole_sentences(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """No default in brackets, which typer would take for markup and drop."""
    monkeypatch.setenv("COLUMNS", "80")
    exit_code([verb, "--help"])
    shown = capsys.readouterr().out
    assert not re.search(r" \.(\s|$)", shown)
    assert max(map(len, shown.splitlines())) <= 80
    if verb == "plan":
        for default in ("4096", "Default: 1.", "512", "128"):
            assert default in shown
