"""Every planned sequence at once, each to the end of its context: nobody runs out, and the plan's figure is met."""

from dataclasses import replace

import pytest
from contract import Case, drive

from apportion.types.cluster import StreamSource


def check(case: Case, seed: int = 1, rounds: int = 1) -> None:
    held = drive(case, seed, rounds)
    assert {name: one for name, one in held.items() if not one.exact} == {}


@pytest.mark.parametrize(
    ("weight_format", "kv_format"), [("fp32", "fp32"), ("fp16", "fp16"), ("int8", "bf16")]
)
def test_a_pipeline_with_an_uneven_group_holds_what_is_planned(weight_format: str, kv_format: str):
    shape = {"hidden_size": 512, "context_tokens": 96, "layers": (4, 9), "concurrency": 6}
    check(Case(weight_format=weight_format, kv_format=kv_format, **shape))


def test_a_small_model_in_three_stages_holds_what_is_planned():
    """As large as the bundled one."""
    check(
        Case(
            hidden_size=256,
            weight_format="fp32",
            vocab_rows=1024,
            groups=((1,), (1,), (1,)),
            layers=(3, 5, 4),
            concurrency=1,
            context_tokens=152,
            chunk_tokens=16,
        )
    )


@pytest.mark.parametrize("stream_from", ["host memory", "disk"])
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_layers_that_are_all_streamed_take_buffers_alone(weight_format: str, stream_from: StreamSource):
    check(
        Case(
            hidden_size=1024,
            weight_format=weight_format,
            vocab_rows=24000,
            context_tokens=96,
            chunk_tokens=32,
            layers=(2, 3),
            concurrency=6,
            streamed=(2, 3),
            stream_from=stream_from,
        )
    )


@pytest.mark.nightly
@pytest.mark.parametrize("kv_format", ["fp32", "fp16"])
@pytest.mark.parametrize("weight_format", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    "case",
    [
        Case(
            hidden_size=256,
            weight_format="",
            vocab_rows=1000,
            layers=(6, 12),
            concurrency=2,
            context_tokens=48,
            chunk_tokens=16,
        ),
        Case(hidden_size=512, weight_format="", concurrency=4, context_tokens=700, chunk_tokens=256),
        Case(hidden_size=768, weight_format="", groups=((2, 1), (1,)), vocab_rows=16000),
        Case(
            hidden_size=1024, weight_format="", groups=((1,), (1,), (1,)), layers=(1, 4, 3), chunk_tokens=128
        ),
        Case(hidden_size=1024, weight_format="", groups=((3, 2, 1),), layers=(6,), concurrency=32),
    ],
    ids=["tiny", "long", "group first", "pipeline", "one group"],
)
def test_any_division_holds_what_is_planned(case: Case, weight_format: str, kv_format: str):
    case = replace(case, weight_format=weight_format, kv_format=kv_format)
    held = drive(case, seed=2, rounds=2)
    assert {name: one for name, one in held.items() if not (one.exact and one.kept)} == {}
