"""What is assumed of a CPU until it is measured."""

LAYER_OVERHEAD_S, STEP_OVERHEAD_S = 2.2e-4, 8e-4
"""Python and kernel launches of a layer; message, batch and waking up for a step. benchmarks/prediction.py shows
how they fit."""
INT8_SHARE = 0.75
"""Products of int8 weights, relative to fp32 ones."""


def rates_per_format(fp32_flops_per_s: float) -> dict[str, float]:
    """FLOP/s by weight format. 16-bit weights, widened in registers, are as fast as fp32 ones
    (benchmarks/linear_formats.py)."""
    alike = dict.fromkeys(("fp32", "bf16", "fp16"), fp32_flops_per_s)
    return {**alike, "int8": fp32_flops_per_s * INT8_SHARE}
