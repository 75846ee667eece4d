"""The engines a plan can be exported to, by the name that `--to` takes."""

from collections.abc import Callable
from dataclasses import replace

from apportion.export.accelerate import to_accelerate
from apportion.export.exllamav3 import to_exllamav3
from apportion.export.launch import Export
from apportion.export.llama_cpp import to_llama_cpp
from apportion.export.price import price
from apportion.export.sglang import to_sglang
from apportion.export.vllm import to_vllm
from apportion.types.plan import Plan

ENGINES: dict[str, Callable[[Plan], Export]] = {
    "vllm": to_vllm,
    "sglang": to_sglang,
    "llama.cpp": to_llama_cpp,
    "accelerate": to_accelerate,
    "exllamav3": to_exllamav3,
}


def export(plan: Plan, engine: str) -> Export:
    """The plan in that engine's terms; the last note is the predicted cost, where it can be computed."""
    exported = ENGINES[engine](plan)
    if exported.division is None:
        return exported
    return replace(exported, notes=(*exported.notes, price(plan, exported.division).sentence()))
