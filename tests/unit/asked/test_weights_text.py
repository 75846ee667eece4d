"""What `--weights` understands, and what it says of the rest."""

import pytest

from apportion.asked.weights import parse_weights
from apportion.catalog.known_models import known_config
from apportion.catalog.model_config import read_model_spec
from apportion.catalog.named_weights import named_weights
from apportion.types.errors import UsageError

MODEL = read_model_spec(known_config("llama-3.2-1b"))


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("4bit", ("int4",)),
        ("4-bit", ("int4",)),
        ("8 Bit", ("int8",)),
        ("FP16", ("fp16",)),
        ("float16,half,f16", ("fp16",)),
        ("BFloat16, INT4", ("bf16", "int4")),
        ("Auto", ("bf16",)),
    ],
)
def test_our_formats_in_other_spellings(text: str, formats: tuple[str, ...]):
    assert parse_weights(text, MODEL, "bf16") == formats


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("q4", "q4_k_m, q4_0 or int4"),
        ("int8,Q8", "q8_0 or int8"),
        ("q6", "q6_k"),
        ("16bit", "bf16 or fp16"),
        ("fp4", "nvfp4 or mxfp4"),
        ("6-bit", "mlx-6bit"),
    ],
)
def test_what_stands_for_several_is_told_with_all_of_them(text: str, meant: str):
    with pytest.raises(UsageError, match=f"did you mean {meant}") as caught:
        parse_weights(text, MODEL, "bf16")
    for name in meant.replace(" or ", ", ").split(", "):
        assert named_weights(name) == name or parse_weights(name, MODEL, "bf16") == (name,)
    assert "\n" not in str(caught.value)


def test_what_is_near_nothing_is_told_with_what_there_is():
    with pytest.raises(UsageError, match=r"there is fp32, .* auto, or a file's, like q4_k_m"):
        parse_weights("xyz", MODEL, "bf16")
