"""What a card's connector carries."""

LANE_BYTES_PER_S = {
    1: 2.5e9 / 8 * 8 / 10,
    2: 5e9 / 8 * 8 / 10,
    3: 8e9 / 8 * 128 / 130,
    4: 16e9 / 8 * 128 / 130,
    5: 32e9 / 8 * 128 / 130,
}
"""By generation, one way: signalling rate times line code, before packet overhead (PCI Express base specification)."""

REACHED_SHARE = 0.8
"""Of that, copies from pinned host memory: packets of 128 to 256 bytes with 20 to 28 of header and framing leave 0.82
to 0.93, acknowledgements take some more. An estimate until it is measured; a slot may be narrower than its card."""


def stream_bytes_per_s(generation: int, lanes: int) -> float | None:
    """None for a generation that is not known."""
    lane = LANE_BYTES_PER_S.get(generation)
    return None if lane is None else lanes * lane * REACHED_SHARE
