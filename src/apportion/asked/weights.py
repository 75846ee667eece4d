"""What `--weights` asks for: the formats among which each stage's is chosen."""

from apportion.cost.formats import weight_formats, widest_first
from apportion.types.cluster import Cluster
from apportion.types.errors import UsageError
from apportion.types.model import ModelSpec
from apportion.types.names import letters, near_names, one_of, unknown_name
from apportion.types.units import WEIGHT_BITS

AUTO = "auto"
_SPELT = {
    **{name: name for name in (*WEIGHT_BITS, AUTO)},
    **dict.fromkeys(("f32", "float32", "single", "32bit"), "fp32"),
    **dict.fromkeys(("f16", "float16", "half"), "fp16"),
    **dict.fromkeys(("bfloat16", "brainfloat16"), "bf16"),
    **dict.fromkeys(("i8", "8bit"), "int8"),
    **dict.fromkeys(("i4", "4bit"), "int4"),
}
"""Spellings of our formats, without case and punctuation."""
_MEANT = {
    "q2": ["q2_k"],
    "q3": ["q3_k_m"],
    "q4": ["q4_k_m", "q4_0", "int4"],
    "q5": ["q5_k_m", "q5_0"],
    "q6": ["q6_k"],
    "q8": ["q8_0", "int8"],
    "16bit": ["bf16", "fp16"],
    "fp4": ["nvfp4", "mxfp4"],
    "gguf": ["q4_k_m", "q8_0"],
    "exl2": ["exl3-4bpw"],
    "exl3": ["exl3-4bpw"],
}
"""What is short for several formats, or says which kind of file but not how many bits."""


def with_asked_weights(model: ModelSpec, text: str | None) -> ModelSpec:
    """The model as if its files were in the format that is named, where it is one of quantised files. Raises
    UsageError for two of these."""
    from apportion.catalog.named_weights import named_weights, with_named_weights

    known = weight_formats(model)
    asked = [part for part in _parts(text) if part not in known] if text is not None else []
    named = dict.fromkeys(name for part in asked if (name := named_weights(part)) is not None)
    if len(named) > 1:
        raise UsageError(f"--weights: {' and '.join(named)} are two formats of files; name one of them")
    for name in named:
        model = with_named_weights(model, name)
    return model


def parse_weights(text: str, model: ModelSpec, own_format: str) -> tuple[str, ...]:
    """ "int8,auto" -> ("bf16", "int8") for a model whose own format is bf16; widest first. Raises UsageError."""
    from apportion.catalog.named_weights import named_weights

    known = weight_formats(model)
    names = [
        own_format if name == AUTO else name if name in known else named_weights(name) or name
        for name in _parts(text)
    ]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--weights: {_unknown(unknown[0], [*known, AUTO], files=model.stored is None)}")
    return widest_first(model, names)


def _parts(text: str) -> list[str]:
    """Our own formats as we spell them; an empty text is a part too."""
    return [_SPELT.get(letters(part), part.strip()) for part in text.split(",")]


def _unknown(name: str, known: list[str], *, files: bool) -> str:
    """`files`: whether formats of files can be asked for, as the model has none of its own."""
    from apportion.catalog.named_weights import NAMED_WEIGHTS

    if not files:
        return unknown_name("weight format", name, known)
    near = _MEANT.get(letters(name)) or near_names(name, [*known, *NAMED_WEIGHTS])
    if near:
        return f"unknown weight format '{name}'; did you mean {one_of(near)}?"
    return f"{unknown_name('weight format', name, known)}, or a file's, like q4_k_m, awq or mlx-4bit"


def chosen_formats(model: ModelSpec, cluster: Cluster, text: str | None) -> tuple[str, ...]:
    """`text` is what was typed. Raises UsageError."""
    own_format = model.stored.format if model.stored else _float_format(model, cluster)
    if text is not None:
        return parse_weights(text, model, own_format)
    if model.stored is None and any(device.kind == "cpu" for device in cluster.devices):
        return ("fp32",)
    return (own_format,)


def changed_formats(model: ModelSpec, text: str | None) -> tuple[str, ...] | None:
    """None where nothing was typed. Raises UsageError."""
    if text is None:
        return None
    return parse_weights(text, model, model.stored.format if model.stored else model.checkpoint_format)


def _float_format(model: ModelSpec, cluster: Cluster) -> str:
    """Older GPUs have no bf16: the same weights then go in fp16, and only where that lacks a rate in fp32."""
    formats = dict.fromkeys((model.checkpoint_format, "fp16", "fp32"))
    common = (name for name in formats if all(name in device.flops_per_s for device in cluster.devices))
    return next(common, model.checkpoint_format)
