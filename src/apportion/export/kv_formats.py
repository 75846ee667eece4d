"""What engines call the formats of keys and values."""

from apportion.types.errors import PlanError
from apportion.types.plan import Plan

_HALVES = ("fp32", "bf16", "fp16")
_GGML = {name: name for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")}
KV_NAMES: dict[str, dict[str, str]] = {
    # Of 16 bits f16 is the fast one on CUDA; the plan's 32 bits hold it too.
    "llama.cpp": dict.fromkeys(_HALVES, "f16") | _GGML,
    "Ollama": {**dict.fromkeys(_HALVES, "f16"), "q8_0": "q8_0", "q4_0": "q4_0"},
    "vLLM": dict.fromkeys(_HALVES, "auto") | {"fp8": "fp8"},
    "SGLang": dict.fromkeys(_HALVES, "auto") | {"fp8": "fp8_e4m3"},
    "exllamav3": dict.fromkeys(_HALVES, "16") | {"q8_0": "8", "fp8": "8", "q4_0": "4"},
    "accelerate": dict.fromkeys(_HALVES, "auto"),
    "MLX": dict.fromkeys(_HALVES, "auto"),
}
"""By engine, of those it has: exllamav3's count bits, without the scales."""


def kv_name(plan: Plan, engine: str) -> str:
    """Raises PlanError for a format that the engine does not have."""
    names = KV_NAMES[engine]
    if plan.kv_format not in names:
        known = ", ".join(name for name in names if name != "fp32")
        raise PlanError(f"{engine} has no KV cache in {plan.kv_format}; plan again with --kv-format {known}")
    return names[plan.kv_format]
