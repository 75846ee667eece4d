"""What is measured of a CPU, and what is assumed of it until then."""

from dataclasses import dataclass

LAYER_OVERHEAD_S, STEP_OVERHEAD_S = 2e-5, 2e-4
"""What a layer takes beside its products and attention; batch and Python of a step. benchmarks/prediction.py shows how
they fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuRates:
    """What so many of its threads reach together; `flops_per_s` by weight format."""

    read_bytes_per_s: float
    flops_per_s: dict[str, float]
    copied_bytes_per_s: float
    """Out of the page cache, by one of them."""
    cached_read_bytes_per_s: float
    """Of what is in the last cache, by one of them."""
    cached_copied_bytes_per_s: float
    """Out of the page cache into memory that is in the last cache, by one of them."""


def rates_per_format(fp32_flops_per_s: float) -> dict[str, float]:
    """FLOP/s by weight format: weights are widened in registers, so all are at least as fast as fp32
    (benchmarks/linear_formats.py)."""
    return dict.fromkeys(("fp32", "bf16", "fp16", "int8"), fp32_flops_per_s)
