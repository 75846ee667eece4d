"""How a checkpoint is quantised, from its config's `quantization_config`.

Sources, as read in transformers 5.23 (utils/quantization_config.py, quantizers/, integrations/): GPTQ and AWQ keep a
16-bit scale and a zero point of `bits` for every `group_size` inputs of an output (GPTQ also a 32-bit group number for
every input); fp8 a 32-bit scale for every block or output; MXFP4 (OCP Microscaling Formats v1.0) an 8-bit scale for 32
elements, of experts alone; bitsandbytes a 32-bit scale for 64, or with double quantisation an 8-bit one, and a 32-bit
one for 256 of these; compressed-tensors as its `config_groups` say, with 16-bit scales (8-bit ones for 4-bit floats).
EXL3 (exllamav3 at 0c64750, modules/quant/exl3.py): tiles of 16 × 16 elements at `bits` on average, a 16-bit factor for
every input and output, groups cut at multiples of 128. MLX (mlx.nn.quantize): a 16-bit scale and a 16-bit bias a group,
of tables too. modelopt (TensorRT Model Optimizer): NVFP4 an 8-bit scale for 16 elements. auto-round: as GPTQ, without
group numbers. Quark, torchao and HQQ: as their configs say, HQQ and torchao's int4 with a 16-bit zero point.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import cast

from apportion.catalog.config_fields import ConfigFields
from apportion.types.errors import ModelError

SCALE_BITS = 16
SIDECAR = "hf_quant_config.json"
_KEPT_KEYS = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "llm_int8_skip_modules",
    "exclude",
    "exclude_modules",
    "skip_modules",
)
_REGULAR = re.compile(r"^\.\*|[\^$()\[\]|+\\]")
"""What a regular expression has and a name with * does not."""
_PREFIX = re.compile(r"^.*?\blayers\\?\.")
_SAME_MODULES = (
    (r"block_sparse_moe", "(?:block_sparse_moe|mlp)"),
    (r"(?<=\.)ffn(?=[.\\])", "mlp"),
    (r"(?<=\.)attn(?=[.\\])", "self_attn"),
)
"""Modules that transformers calls otherwise than files do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """Of matrices in layers: bits of an element, of its share of whatever is kept by group, and bytes beside an output
    row or an input column."""

    name: str
    bits: int
    group_bits: Fraction = Fraction(0)
    row_bytes: int = 0
    input_bytes: int = 0
    block_elements: int = 1
    """Along the inputs: matrices are not cut within a block."""
    experts_only: bool = False
    head_bits: Fraction | None = None
    """As `element_bits`; None where the head is not quantised."""
    embedding_bits: Fraction | None = None
    """Likewise of the table that tokens are looked up in."""
    kept: tuple[re.Pattern[str], ...] = ()
    """Names, or their beginnings or ends, of modules that are left as they are."""
    others: tuple[tuple[re.Pattern[str], "Quantisation"], ...] = ()
    """Modules that are quantised in another way."""

    @property
    def element_bits(self) -> Fraction:
        return self.bits + self.group_bits

    def keeps(self, module: str) -> bool:
        return any(pattern.match(module) for pattern in self.kept)

    def of(self, module: str) -> "Quantisation | None":
        """How a module is quantised; None where it is not."""
        other = next((method for pattern, method in self.others if pattern.match(module)), None)
        return other or (None if self.keeps(module) else self)


def read_quantisation(fields: ConfigFields) -> Quantisation | None:
    """None where nothing is quantised. Raises ModelError for a method that is not known."""
    name = next(
        (name for name in ("quantization_config", "quantization") if fields.get(name) is not None), None
    )
    own = _beside(fields.file) if name is None else ConfigFields(fields.file, fields.mapping(name), {})
    if own is None:
        return None
    method = _method(own)
    if method not in _METHODS:
        raise ModelError(
            f"{fields.file}: the checkpoint is quantised by the method '{method}', which cannot be planned; use one"
            f" of {', '.join(_METHODS)}, or its bf16, fp16 or fp32 version"
        )
    read = _METHODS[method](own)
    # Of DeepSeek-V4, whose config says so beside its fp8.
    fp4 = (
        ((_pattern(own, "mlp.experts"), MXFP4),)
        if fields.get("expert_dtype") == "fp4" and not read.others
        else ()
    )
    if fp4:
        read = replace(read, name=f"{read.name}+{MXFP4.name}")
    return replace(read, kept=(*read.kept, *_kept(own)), others=(*read.others, *fp4))


def _beside(file: Path) -> ConfigFields | None:
    """What Model Optimizer writes beside a config.json."""
    sidecar = file.with_name(SIDECAR)
    if file.name != "config.json" or not sidecar.is_file():
        return None
    own = ConfigFields(sidecar, ConfigFields.read(sidecar).mapping("quantization"), {})
    return own if own.get("quant_algo") is not None else None


def _method(own: ConfigFields) -> str:
    """By its own name, or by what only one method writes."""
    named = own.get("quant_method")
    if own.get("quant_algo") is not None and named in (None, "modelopt", "fp8"):
        return "modelopt"
    if named is None and own.get("bits") is not None and own.get("group_size") is not None:
        return "mlx"
    return str(named or "unknown").replace("_", "-").removeprefix("intel/")


def _kept(own: ConfigFields) -> tuple[re.Pattern[str], ...]:
    return tuple(_pattern(own, name) for key in _KEPT_KEYS for name in _names(own, key))


def _names(own: ConfigFields, key: str) -> list[str]:
    names = own.items(key) or []
    if not all(isinstance(name, str) for name in names):
        raise own.invalid(key, "a list of names")
    return cast(list[str], names)


def _pattern(own: ConfigFields, name: str) -> re.Pattern[str]:
    """As transformers matches them (`should_convert_module`): from the start to the end of a part, or at the end; and
    with * for any text, as Model Optimizer writes them. What stands before the layers differs between engines."""
    text = name.removeprefix("re:")
    if "*" in text and text == name and not _REGULAR.search(name):
        text = re.escape(name).replace(r"\*", ".*")
    text = _PREFIX.sub(r"layers\.", text, count=1)
    for theirs, ours in _SAME_MODULES:
        text = re.sub(theirs, ours, text)
    try:
        return re.compile(rf"(?:.*\.)?(?:{text})(?:(?<=\.)|(?=\.|$))|.*(?:{text})$")
    except re.error as error:
        raise ModelError(f"{own.file}: '{name}' in 'quantization_config' is no pattern ({error})") from None


def _gptq(own: ConfigFields) -> Quantisation:
    grouped = replace(_grouped("gptq", own), input_bytes=4)
    return replace(grouped, head_bits=grouped.element_bits) if own.flag("lm_head") else grouped


def _awq(own: ConfigFields) -> Quantisation:
    return _grouped("awq", own)


def _grouped(method: str, own: ConfigFields) -> Quantisation:
    """A group size of -1 is one group for an output."""
    bits = own.positive("bits")
    name = f"{method}-int{bits}"
    if own.get("group_size") == -1:
        return Quantisation(name=name, bits=bits, row_bytes=-(-(SCALE_BITS + bits) // 8))
    group = own.positive("group_size")
    return Quantisation(
        name=name, bits=bits, group_bits=Fraction(SCALE_BITS + bits, group), block_elements=group
    )


def _fp8(own: ConfigFields) -> Quantisation:
    block = own.items("weight_block_size")
    if block is None:
        return Quantisation(name="fp8", bits=8, row_bytes=4)
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise own.invalid("weight_block_size", "two positive whole numbers")
    rows, columns = cast(list[int], block)
    return Quantisation(name="fp8", bits=8, group_bits=Fraction(32, rows * columns), block_elements=columns)


def _mxfp4(_: ConfigFields) -> Quantisation:
    return Quantisation(
        name="mxfp4", bits=4, group_bits=Fraction(8, 32), block_elements=32, experts_only=True
    )


def _bitsandbytes(own: ConfigFields) -> Quantisation:
    if not own.flag("load_in_4bit"):
        return Quantisation(name="bnb-int8", bits=8, row_bytes=4)
    scale = 8 + Fraction(32, 256) if own.flag("bnb_4bit_use_double_quant") else Fraction(32)
    kind = own.get("bnb_4bit_quant_type") or "fp4"
    return Quantisation(name=f"bnb-{kind}", bits=4, group_bits=scale / 64, block_elements=64)


def _compressed(own: ConfigFields) -> Quantisation:
    schemes = [_scheme(own, group) for group in own.mapping("config_groups").values()]
    if len(set(schemes)) != 1:
        raise own.invalid("config_groups", "one scheme for all weights")
    (scheme,) = set(schemes)
    kept = any(pattern.match("lm_head") for pattern in _kept(own))
    return scheme if kept else replace(scheme, head_bits=scheme.element_bits)


def _scheme(own: ConfigFields, group: object) -> Quantisation:
    weights = cast(dict[str, object], group).get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise own.invalid("config_groups", "groups that each have 'weights'")
    scheme = ConfigFields(own.file, cast(dict[str, object], weights), {})
    bits, is_float = scheme.positive("num_bits"), scheme.get("type") == "float"
    name = f"fp{bits}" if is_float else f"ct-int{bits}"
    size = scheme.optional_positive("group_size")
    if size is None:
        return Quantisation(name=name, bits=bits, row_bytes=SCALE_BITS // 8)
    scale_bits = 8 if is_float and bits == 4 else SCALE_BITS
    zero_bits = 0 if scheme.get("symmetric") is not False else bits
    return Quantisation(
        name=name, bits=bits, group_bits=Fraction(scale_bits + zero_bits, size), block_elements=size
    )


def _exl3(own: ConfigFields) -> Quantisation:
    bits, head_bits = (_fraction(own, name) for name in ("bits", "head_bits"))
    return Quantisation(
        name=f"exl3-{float(bits):g}bpw",
        bits=int(bits),
        group_bits=bits - int(bits),
        row_bytes=2,
        input_bytes=2,
        block_elements=128,
        head_bits=head_bits,
    )


def _fraction(own: ConfigFields, name: str) -> Fraction:
    value = own.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1 <= value <= 16:
        raise own.invalid(name, "a number of bits")
    return Fraction(value)


def _modelopt(own: ConfigFields) -> Quantisation:
    """Of mixed precision the algorithm of most modules, and others by name."""
    algorithm = str(own.get("quant_algo")).upper()
    if algorithm != "MIXED_PRECISION":
        return _algorithm(own, algorithm, own.get("group_size"))
    layers = own.mapping("quantized_layers")
    methods = {name: _layer_algorithm(own, entry) for name, entry in layers.items()}
    others = tuple((_pattern(own, name), method) for name, method in methods.items())
    if own.get("quant_method") == "fp8":
        names = dict.fromkeys(("fp8", *(method.name for method in methods.values())))
        return replace(_fp8(own), name="+".join(names), others=others)
    kept = (re.compile(".*"),)
    first = next(iter(methods.values()), None)
    if first is None:
        raise own.invalid("quantized_layers", "modules with their algorithms")
    return replace(first, kept=kept, others=others)


def _layer_algorithm(own: ConfigFields, entry: object) -> Quantisation:
    fields = ConfigFields(own.file, cast(dict[str, object], entry) if isinstance(entry, dict) else {}, {})
    return _algorithm(own, str(fields.get("quant_algo")).upper(), fields.get("group_size"))


def _algorithm(own: ConfigFields, name: str, group_size: object) -> Quantisation:
    if name not in _ALGORITHMS:
        raise own.invalid("quant_algo", f"one of {', '.join((*_ALGORITHMS, 'MIXED_PRECISION'))}")
    method = _ALGORITHMS[name]
    if method.group_bits and isinstance(group_size, int) and group_size > 0:
        scale_bits = method.group_bits * method.block_elements
        return replace(method, group_bits=scale_bits / group_size, block_elements=group_size)
    return method


def blocks(name: str, bits: int, group: int, scale_bits: int = SCALE_BITS) -> Quantisation:
    return Quantisation(name=name, bits=bits, group_bits=Fraction(scale_bits, group), block_elements=group)


NVFP4, MXFP4, MXFP8 = blocks("nvfp4", 4, 16, 8), blocks("mxfp4", 4, 32, 8), blocks("mxfp8", 8, 32, 8)
FP8 = Quantisation(name="fp8", bits=8, row_bytes=4)
_ALGORITHMS = {
    **dict.fromkeys(("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8"), NVFP4),
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN"), FP8),
    "FP8_PB_WO": Quantisation(name="fp8", bits=8, group_bits=Fraction(32, 128 * 128), block_elements=128),
    **dict.fromkeys(("W4A16_AWQ", "W4A8_AWQ", "W4A16", "INT4_AWQ"), blocks("awq-int4", 4, 128)),
    **dict.fromkeys(
        ("INT8_SQ", "W8A8_SQ_PER_CHANNEL", "W8A16"), Quantisation(name="int8-sq", bits=8, row_bytes=4)
    ),
    **dict.fromkeys(("MXFP4", "W4A8_MXFP4_FP8", "W4A8_MXFP4_MXFP8"), MXFP4),
    "MXFP8": MXFP8,
}
"""Of Model Optimizer (modelopt/torch/export/model_config.py)."""
_MODES = {"mxfp4": MXFP4, "nvfp4": NVFP4, "mxfp8": MXFP8}


def _mlx(own: ConfigFields) -> Quantisation:
    """Tables are quantised too; modules by name may have other bits, or none."""
    whole = _mlx_module(own)
    values = own.all()
    entries = {name: own.mapping(name) for name, value in values.items() if isinstance(value, dict)}
    others = tuple(
        (_pattern(own, name), _mlx_module(ConfigFields(own.file, entry, {})))
        for name, entry in entries.items()
    )
    kept = tuple(_pattern(own, name) for name, value in values.items() if value is False)
    table = {part: _table_bits(whole, others, kept, part) for part in ("lm_head", "model.embed_tokens")}
    return replace(
        whole,
        others=others,
        kept=kept,
        head_bits=table["lm_head"],
        embedding_bits=table["model.embed_tokens"],
    )


def _table_bits(
    whole: Quantisation,
    others: tuple[tuple[re.Pattern[str], Quantisation], ...],
    kept: tuple[re.Pattern[str], ...],
    module: str,
) -> Fraction | None:
    method = replace(whole, others=others, kept=kept).of(module)
    return method and method.element_bits


def _mlx_module(own: ConfigFields) -> Quantisation:
    mode = own.get("mode") or "affine"
    if mode in _MODES:
        method = _MODES[str(mode)]
        return replace(method, name=f"mlx-{method.name}")
    if mode != "affine":
        raise own.invalid("mode", f"affine, {', '.join(_MODES)}")
    bits = own.positive("bits")
    return blocks(f"mlx-{bits}bit", bits, own.positive("group_size"), 2 * SCALE_BITS)


def _auto_round(own: ConfigFields) -> Quantisation:
    """As GPTQ or AWQ pack; modules of `extra_config` that stay at 16 bits are left out."""
    if str(own.get("data_type") or "int").startswith(("nv_fp", "nvfp")):
        return NVFP4
    if str(own.get("data_type") or "int").startswith("mx_fp"):
        return MXFP4 if own.positive("bits") == 4 else MXFP8
    method = _grouped("auto-round", own)
    kept: list[re.Pattern[str]] = []
    others: list[tuple[re.Pattern[str], Quantisation]] = []
    for name, entry in own.mapping("extra_config").items():
        part = ConfigFields(
            own.file, cast(dict[str, object], entry) if isinstance(entry, dict) else {}, own.all()
        )
        if part.positive("bits") >= SCALE_BITS:
            kept.append(_pattern(own, name))
        else:
            others.append((_pattern(own, name), _grouped("auto-round", part)))
    return replace(method, kept=tuple(kept), others=tuple(others))


def _hqq(own: ConfigFields) -> Quantisation:
    params = ConfigFields(own.file, own.mapping("quant_config"), {}).mapping("weight_quant_params")
    fields = ConfigFields(own.file, params, own.all())
    bits = fields.positive("nbits")
    if fields.get("group_size") is None:
        return Quantisation(name=f"hqq-int{bits}", bits=bits, row_bytes=4)
    return blocks(f"hqq-int{bits}", bits, fields.positive("group_size"), 2 * SCALE_BITS)


def _torchao(own: ConfigFields) -> Quantisation:
    """By the name of the type: Int4WeightOnlyConfig or int4_weight_only, with a group size beside it."""
    kind = own.get("quant_type")
    while isinstance(kind, dict) and "_type" not in kind:
        kind = next(iter(cast(dict[str, object], kind).values()), None)
    entry = cast(dict[str, object], kind) if isinstance(kind, dict) else {"_type": kind}
    name = str(entry.get("_type")).lower()
    data = entry.get("_data") or own.get("quant_type_kwargs")
    fields = ConfigFields(own.file, cast(dict[str, object], data) if isinstance(data, dict) else {}, {})
    found = re.search(r"int4|(?:nv|mx)fp4|(?:uint|int|float)(\d)", name)
    if found is None:
        raise own.invalid("quant_type", "a type with its bits, like Int4WeightOnlyConfig")
    bits = int(found[1] or 4)
    if bits == 8:
        return Quantisation(name=f"torchao-{'fp8' if 'float8' in name else 'int8'}", bits=8, row_bytes=4)
    if "fp4" in name:
        return replace(NVFP4 if "nv" in name else MXFP4, name="torchao-fp4")
    return blocks(f"torchao-int{bits}", bits, fields.optional_positive("group_size") or 128, 2 * SCALE_BITS)


def _quark(own: ConfigFields) -> Quantisation:
    """Of all layers, and others by name."""
    whole = _quark_weight(own, own.mapping("global_quant_config"))
    others = tuple(
        (_pattern(own, name), _quark_weight(own, cast(dict[str, object], entry)))
        for name, entry in own.mapping("layer_quant_config").items()
        if isinstance(entry, dict)
    )
    return replace(whole, others=others)


def _quark_weight(own: ConfigFields, group: dict[str, object]) -> Quantisation:
    weight: object = group.get("weight")
    if isinstance(weight, list) and weight:
        weight = cast(list[object], weight)[0]
    fields = ConfigFields(own.file, cast(dict[str, object], weight) if isinstance(weight, dict) else {}, {})
    dtype = str(fields.get("dtype") or "")
    digits = re.search(r"\d+", dtype)
    if digits is None or not 1 < int(digits[0]) <= SCALE_BITS:
        raise own.invalid("global_quant_config", "a 'weight' with its 'dtype'")
    bits, size = int(digits[0]), fields.optional_positive("group_size")
    name = f"quark-{'fp' if 'fp' in dtype else 'int'}{bits}"
    if size is None or fields.get("qscheme") != "per_group":
        return Quantisation(name=name, bits=bits, row_bytes=4)
    scale_bits = 8 if fields.get("scale_format") == "e8m0" else SCALE_BITS
    zero_bits = 0 if fields.get("symmetric") is not False else bits
    return blocks(name, bits, size, scale_bits + zero_bits)


_METHODS: dict[str, Callable[[ConfigFields], Quantisation]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "exl3": _exl3,
    "modelopt": _modelopt,
    "mlx": _mlx,
    "auto-round": _auto_round,
    "hqq": _hqq,
    "torchao": _torchao,
    "quark": _quark,
}
