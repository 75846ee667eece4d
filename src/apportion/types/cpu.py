"""What is assumed of a CPU until it is measured."""

LAYER_OVERHEAD_S, STEP_OVERHEAD_S = 1.1e-4, 8e-4
"""Python and kernel launches of a layer; message, batch and waking up for a step. benchmarks/prediction.py shows
how they fit."""


def rates_per_format(fp32_flops_per_s: float) -> dict[str, float]:
    """FLOP/s by weight format: weights are widened in registers, so all are as fast as fp32
    (benchmarks/linear_formats.py)."""
    return dict.fromkeys(("fp32", "bf16", "fp16", "int8"), fp32_flops_per_s)
