"""How a checkpoint is quantised, from its config's `quantization_config`.

Sources, as read in transformers 5.23 (utils/quantization_config.py, quantizers/, integrations/): GPTQ and AWQ keep a
16-bit scale and a zero point of `bits` for every `group_size` inputs of an output (GPTQ also a 32-bit group number for
every input); fp8 a 32-bit scale for every block or output; MXFP4 (OCP Microscaling Formats v1.0) an 8-bit scale for 32
elements, of experts alone; bitsandbytes a 32-bit scale for 64, or with double quantisation an 8-bit one, and a 32-bit
one for 256 of these; compressed-tensors as its `config_groups` say, with 16-bit scales (8-bit ones for 4-bit floats).
EXL3 (exllamav3 at 0c64750, modules/quant/exl3.py): tiles of 16 × 16 elements at `bits` on average, a 16-bit factor for
every input and output, groups cut at multiples of 128.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import cast

from apportion.catalog.config_fields import ConfigFields
from apportion.types.errors import ModelError

SCALE_BITS = 16


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
    kept: tuple[re.Pattern[str], ...] = ()
    """Names, or their beginnings or ends, of modules that are left as they are."""

    @property
    def element_bits(self) -> Fraction:
        return self.bits + self.group_bits

    def keeps(self, module: str) -> bool:
        return any(pattern.match(module) for pattern in self.kept)


def read_quantisation(fields: ConfigFields) -> Quantisation | None:
    """None where nothing is quantised. Raises ModelError for a method that is not known."""
    if fields.get("quantization_config") is None:
        return None
    own = ConfigFields(fields.file, fields.mapping("quantization_config"), {})
    method = str(own.get("quant_method") or own.get("quant_algo") or "unknown").replace("_", "-")
    if method not in _METHODS:
        raise ModelError(
            f"{fields.file}: the checkpoint is quantised by the method '{method}', which cannot be planned; use one"
            f" of {', '.join(_METHODS)}, or its bf16, fp16 or fp32 version"
        )
    return replace(_METHODS[method](own), kept=_kept(own))


def _kept(own: ConfigFields) -> tuple[re.Pattern[str], ...]:
    names = [
        name
        for key in ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")
        for name in own.items(key) or ()
    ]
    return tuple(_pattern(own, str(name)) for name in names)


def _pattern(own: ConfigFields, name: str) -> re.Pattern[str]:
    """As transformers matches them (`should_convert_module`): from the start to the end of a part, or at the end."""
    text = name.removeprefix("re:")
    try:
        return re.compile(rf"(?:{text})(?:(?<=\.)|(?=\.|$))|.*{re.escape(text)}$")
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


_METHODS: dict[str, Callable[[ConfigFields], Quantisation]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "fbgemm-fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed,
    "exl3": _exl3,
}
