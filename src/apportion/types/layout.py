"""Sizes that the engine computes with and the cost model counts with."""

QUERY_TILE = 128
"""Most queries of one sequence that attention takes at once."""
BLOCKED_FEATURES = 512
"""From so many inputs and outputs on, fp32 products on a CPU are oneDNN's, whose code takes megabytes."""
WIDENED_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
"""Of packed weights that are widened at once: what fits a core's cache; what keeps a GPU busy."""
INT8_ROW_BYTES = 8
"""Beside each row of int8 weights: its scale and the sum of its elements (fp32 and int32)."""
