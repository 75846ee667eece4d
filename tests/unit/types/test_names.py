"""One sentence for every name that is not known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apportion.types.names import near_names, unknown_name

KEYS = ("device", "link", "host")
ENGINES = ("vllm", "sglang", "llama.cpp", "accelerate", "exllamav3")


@pytest.mark.parametrize(
    ("asked", "known", "near"),
    [
        ("devices", KEYS, ["device"]),
        ("llamacpp", ENGINES, ["llama.cpp"]),
        ("LLAMA-CPP", ENGINES, ["llama.cpp"]),
        ("vlm", ENGINES, ["vllm"]),
        ("memory_bytes", ("memory", "reserved"), ["memory"]),
        ("mem", ("memory", "reserved", "mem_bytes_per_s"), ["memory", "mem_bytes_per_s"]),
        ("zzz", KEYS, []),
        ("", KEYS, []),
    ],
)
def test_near_names(asked: str, known: tuple[str, ...], near: list[str]) -> None:
    assert near_names(asked, known) == near


def test_what_is_meant_may_be_spelt_quite_differently() -> None:
    said = unknown_name("key", "vram", ("id", "memory"), meant={"vram": "memory"})
    assert said == "unknown key 'vram'; did you mean memory?"


def test_where_nothing_is_near_what_there_is_is_said() -> None:
    assert unknown_name("verb", "xyzzy", ("plan", "run")) == "unknown verb 'xyzzy'; there is plan, run"
    many = [f"card-{number}" for number in range(99)]
    assert unknown_name("card", "xyzzy", many).endswith("; there are 99, such as card-0, card-1, card-2")
    assert unknown_name("host", "a", ()) == "unknown host 'a'; there is none"


@given(asked=st.text(), known=st.lists(st.text(max_size=12), max_size=8))
def test_any_name_is_answered_in_one_line(asked: str, known: list[str]) -> None:
    assert set(near_names(asked, known)) <= set(known)
    assert unknown_name("name", asked, [name for name in known if name.isprintable()]).isprintable()
