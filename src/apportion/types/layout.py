"""Sizes that the engine computes with and the cost model counts with."""

QUERY_TILE = 128
"""Most queries of one sequence that attention takes at once, where it is not compiled."""
PREFILL_ROWS = 1024
"""Most query heads of a sequence's tokens that compiled attention takes at once."""
PREFILL_BLOCK_KEYS = 96
"""By so many keys. Whole panels of 16 lanes as of 8 and 4."""
WIDENED_ELEMENTS = 2**24
"""Of packed weights that a GPU widens at once: enough to keep it busy."""
INT8_ROW_BYTES = 4
"""Beside each row of int8 weights: its scale (fp32)."""
EXCHANGE_PIECE_BYTES = 2**16
"""Of a slot through which members of a group exchange; larger messages go in pieces. Small enough to stay in a core's
cache between writing and reading."""
