"""`apportion` alone: this machine, and what one would type next. Nothing is measured."""

from collections.abc import Sequence
from importlib.util import find_spec

from apportion.probe.local import cuda_memories
from apportion.probe.processor import memory_bytes, num_cores

_MODELS = {
    "llama-3.3-70b": 70.6e9,
    "qwen3-32b": 32.8e9,
    "qwen3-14b": 14.8e9,
    "llama-3.1-8b": 8.03e9,
    "llama-3.2-3b": 3.21e9,
    "llama-3.2-1b": 1.24e9,
    "qwen2.5-0.5b": 0.494e9,
}
"""Of the catalogue, with their parameters."""
_ROOM = 0.6
"""Of the memory, that weights may take of a model which fits without a doubt."""


def welcome() -> str:
    cards, memory = cuda_memories(), memory_bytes()
    lines = [
        "Apportion divides one large language model among the devices you have.",
        "",
        f"this machine: {_machine(cards, memory)}",
        "",
        "Would a model run here, and how fast?",
        f"  apportion plan {_fitting(cards, memory)}",
        "On devices that you name, also ones you do not have:",
        '  apportion plan llama-3.3-70b --weights int4 --devices "2x rtx-3090"',
        '  apportion plan qwen3-32b --weights int4 --devices "rtx-3060-12gb + cpu:48GiB"',
        *_running(),
        "How fast is this machine really? (15 s, once; later plans start from it)",
        "  apportion probe",
        "",
        "apportion --help lists all commands, apportion plan --help the options of one.",
    ]
    return "\n".join(lines)


def _machine(cards: Sequence[tuple[str, int]], memory: int) -> str:
    cores = num_cores()
    parts = [f"{cores} CPU core{'s' if cores > 1 else ''}", f"{memory / 2**30:.0f} GiB"]
    parts += [f"{name} ({size / 2**30:.0f} GiB)" for name, size in cards] or ["no NVIDIA GPU"]
    return ", ".join(parts)


def _fitting(cards: Sequence[tuple[str, int]], memory: int) -> str:
    """The largest model that fits in the devices that a plan takes unless told otherwise: 16 bits a weight on cards,
    32 on a CPU."""
    room, weight_bytes = (sum(size for _, size in cards), 2) if cards else (memory, 4)
    fitting = (name for name, number in _MODELS.items() if number * weight_bytes <= room * _ROOM)
    return next(fitting, "demo")


def _running() -> list[str]:
    if find_spec("torch") is None:
        return ["Text from a model needs the engine: pip install torch==2.13.0 'apportion[run]'"]
    return ["Text from a small model that comes along:", '  apportion run demo "ROMEO:" --max-tokens 60']
