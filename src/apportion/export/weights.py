"""In words: what the weights of a plan become in an engine, which has one format for all of them."""

from apportion.cost.formats import weight_formats
from apportion.types.plan import Plan

NEAREST: dict[str, dict[str, str]] = {
    "vLLM": {
        "int8": "a checkpoint quantised to INT8 W8A8 (llm-compressor)",
        "int4": "an AWQ or GPTQ checkpoint of 4 bits",
    },
    "SGLang": {
        "int8": "a checkpoint quantised to INT8 W8A8 (--quantization w8a8_int8)",
        "int4": "an AWQ or GPTQ checkpoint of 4 bits",
    },
    "llama.cpp": {"int8": "a Q8_0 file (8.5 bits)", "int4": "a Q4_0 file (4.5 bits)"},
    "Ollama": {"int8": "a Q8_0 file (8.5 bits)", "int4": "a Q4_0 file (4.5 bits)"},
    "MLX": {
        "int8": "a checkpoint converted with -q --q-bits 8",
        "int4": "a checkpoint converted with -q (4.5 bits)",
    },
    "accelerate": {
        "int8": "bitsandbytes' load_in_8bit",
        "int4": "bitsandbytes' load_in_4bit (nf4, 4.5 bits with its scales)",
    },
    "exllamav3": {"int8": "an EXL3 checkpoint of 8.0 bits", "int4": "an EXL3 checkpoint of 4.5 bits"},
}
"""By engine and format of ours."""
_OWN_FILES = {"llama.cpp": "a GGUF file", "exllamav3": "an EXL3 checkpoint"}


def one_weight_format(plan: Plan) -> str:
    """The narrowest of the stages' formats: what holds a stage in it does not hold it in a wider one."""
    return min(plan.weight_formats_in_use, key=lambda name: (weight_formats(plan.model)[name], name))


def weight_bits(plan: Plan) -> float:
    """Of a parameter in that format."""
    return weight_formats(plan.model)[one_weight_format(plan)]


def is_gguf(plan: Plan) -> bool:
    """Whether the plan is of a GGUF file as it is."""
    stored = plan.model.stored
    return stored is not None and stored.container == "gguf" and stored.format == one_weight_format(plan)


def model_place(plan: Plan, engine: str) -> tuple[str, str]:
    """What the commands' MODEL is, in words, and a file or folder that may be it."""
    name = plan.model.name
    if engine in ("llama.cpp", "ollama"):
        kind = f" in {one_weight_format(plan)}" if is_gguf(plan) else ""
        called = ", or what Ollama calls it" if engine == "ollama" else ""
        return f"a GGUF file of {name}{kind}{called}", f"./{name}.gguf"
    return f"the folder of {name}'s checkpoint, or its id on the Hugging Face hub", name


def weight_notes(plan: Plan, engine: str) -> list[str]:
    """One sentence where the engine's weights are not those of the plan."""
    name = one_weight_format(plan)
    notes: list[str] = []
    if name in NEAREST[engine]:
        notes.append(
            f"the nearest to the plan's {name} weights is {NEAREST[engine][name]}: give {engine} that"
        )
    if plan.model.stored is not None and plan.model.stored.format == name:
        notes += _stored_notes(plan, engine)
    return notes


def takers(plan: Plan) -> tuple[str, ...]:
    """Engines, by the name that `--to` takes, that have such weights, or take the plan's files as they are."""
    if plan.model.stored is None or plan.model.stored.format != one_weight_format(plan):
        return ("llama.cpp", "ollama", "vllm", "sglang", "exllamav3", "accelerate")
    if is_gguf(plan):
        return ("llama.cpp", "ollama")
    exl3 = one_weight_format(plan).startswith("exl3")
    return ("exllamav3",) if exl3 else ("vllm", "sglang", "accelerate")


def _stored_notes(plan: Plan, engine: str) -> list[str]:
    if engine.lower() in takers(plan):
        return []
    kind = _OWN_FILES.get(engine, "a checkpoint")
    return [
        f"{engine} does not take the plan's {one_weight_format(plan)} {'GGUF file' if is_gguf(plan) else 'checkpoint'} "
        f"as it is: give it {kind} of about {weight_bits(plan):.2g} bits a parameter"
    ]
