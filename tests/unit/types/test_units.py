"""Quantities as people write them: one reading each, or one line that says how to write it."""

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apportion.types import units

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("6GiB", 6 * GIB),
        ("6 GB", 6 * GIB),
        ("6g", 6 * GIB),
        ("6G", 6 * GIB),
        ("6 gigabytes", 6 * GIB),
        ("1.5GiB", 1.5 * GIB),
        ("600MiB", 600 * 2**20),
        ("600 mb", 600 * 2**20),
        ("1073741824", GIB),
        ("1e9", 10**9),
        ("2 bytes", 2),
    ],
)
def test_sizes(text: str, size_bytes: float) -> None:
    assert units.parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "bits_per_s"),
    [
        ("1Gbit", 1e9),
        ("1Gbps", 1e9),
        ("1gbps", 1e9),
        ("1Gb", 1e9),
        ("1Gb/s", 1e9),
        ("1 Gbit/s", 1e9),
        ("1 gbit/s", 1e9),
        ("1 Gigabit/s", 1e9),
        ("1 gigabit per second", 1e9),
        ("gigabit ethernet", 1e9),
        ("100 Mbps", 1e8),
        ("2.5GbE", 2.5e9),
        ("2.5 GbE", 2.5e9),
        ("2.5gbe", 2.5e9),
        ("10G Ethernet", 1e10),
        ("10 Gigabit Ethernet", 1e10),
        ("25GB/s", 2e11),
        ("25 GBps", 2e11),
        ("25 GByte/s", 2e11),
        ("1 GiB/s", 8 * GIB),
        ("800 kB/s", 6.4e6),
        ("500 B/s", 4e3),
        ("Thunderbolt 4", 16.4e9),
    ],
)
def test_bandwidths(text: str, bits_per_s: float) -> None:
    assert units.parse_bandwidth(text) == pytest.approx(bits_per_s / 8, rel=1e-12)


@pytest.mark.parametrize("text", ["1gb/s", "25gb/s", "1GB", "1gb", "10 mb/s"])
def test_what_may_be_bits_or_bytes_is_asked(text: str) -> None:
    with pytest.raises(ValueError, match=r"may be bits or bytes; write \d+[GM]bit/s or \d+[GM]B/s"):
        units.parse_bandwidth(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0.3ms", 3e-4),
        ("300us", 3e-4),
        ("300 µs", 3e-4),
        ("300 μs", 3e-4),
        ("2s", 2.0),
        ("2 seconds", 2.0),
        ("1min", 60.0),
        (".5 ms", 5e-4),
        ("0", 0.0),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert units.parse_seconds(text) == pytest.approx(seconds, rel=1e-12)


def test_a_number_alone_is_of_seconds_only_where_that_is_meant() -> None:
    assert units.parse_seconds("0.5", bare=True) == 0.5
    with pytest.raises(ValueError, match=r"'0\.5' lacks a unit; write it like 0\.3ms"):
        units.parse_seconds("0.5")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8192", 8192),
        ("8k", 8192),
        ("8K", 8192),
        ("128k", 131072),
        ("1M", 2**20),
        ("1.5k", 1536),
        ("8 Ki", 8192),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert units.parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "per_s"),
    [
        ("2", 2.0),
        ("2/s", 2.0),
        ("2 /s", 2.0),
        ("2 req/s", 2.0),
        ("2rps", 2.0),
        ("120/min", 2.0),
        ("7200 per hour", 2.0),
    ],
)
def test_rates(text: str, per_s: float) -> None:
    assert units.parse_per_second(text) == pytest.approx(per_s, rel=1e-12)


def test_arithmetic_and_shares() -> None:
    assert units.parse_flops_per_s("12 TFLOPS") == 12e12
    assert units.parse_flops_per_s("40 TOPS") == 40e12
    assert units.parse_share("5%") == 0.05


@pytest.mark.parametrize(
    ("parse", "text", "said"),
    [
        (units.parse_bytes, "6GiBs", "unknown unit 'GiBs'; did you mean GiB"),
        (units.parse_bytes, "lots", "'lots' is not a size; write it like 600MiB"),
        (units.parse_bytes, "-3GiB", "'-3GiB' is not a size"),
        (units.parse_bytes, "0GiB", "'0GiB' is not a positive size"),
        (units.parse_bandwidth, "1 Gbits/sc", "did you mean Gbit/s"),
        (units.parse_bandwidth, "10", "'10' lacks a unit; write it like 1Gbit/s, 2.5GbE or 25GB/s"),
        (units.parse_bandwidth, "0Gbit", "'0Gbit' is not > 0"),
        (units.parse_seconds, "3 mss", "unknown unit 'mss'; did you mean ms"),
        (units.parse_seconds, "nan", "'nan' is not a time"),
        (units.parse_count, "8kk", "unknown unit 'kk'"),
        (units.parse_count, "0.3k", "'0.3k' is not a whole number"),
        (units.parse_count, "0", "'0' is not a whole number from 1"),
        (units.parse_per_second, "2/fortnight", "unknown unit '/fortnight'"),
        (units.parse_share, "5", "'5' is not a percentage"),
    ],
)
def test_what_cannot_be_read_is_said(parse, text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(text)


PARSERS = [
    units.parse_bytes,
    units.parse_count,
    units.parse_bandwidth,
    units.parse_seconds,
    units.parse_per_second,
    units.parse_flops_per_s,
    units.parse_share,
]


@given(
    text=st.text() | st.from_regex(r"\A\d{1,4}(\.\d)? ?[kKMGTmunbBitps/ei%]{0,6}\Z"),
    parse=st.sampled_from(PARSERS),
)
@example(text="9" * 400, parse=units.parse_bytes)
@example(text="1e308 TiB", parse=units.parse_bytes)
@example(text="1e308 TB/s", parse=units.parse_bandwidth)
@example(text="1e308 h", parse=units.parse_seconds)
def test_any_text_is_a_finite_figure_or_a_value_error(text: str, parse) -> None:
    try:
        figure = parse(text)
    except ValueError:
        return
    assert math.isfinite(figure)
    assert figure >= 0


@given(size_bytes=st.integers(1, 2**50))
def test_sizes_survive_being_shown(size_bytes: int) -> None:
    """To the digit that is shown."""
    assert units.parse_bytes(units.format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.05, abs=0.5)


@given(seconds=st.floats(1e-6, 1e4))
def test_times_survive_being_shown(seconds: float) -> None:
    assert units.parse_seconds(units.format_seconds(seconds)) == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("parse", "text", "write"),
    [
        (units.parse_bytes, "1,5GiB", "'1,5GiB' has a comma; write 1.5GiB"),
        (units.parse_bytes, "1,024 MiB", "'1,024 MiB' has a comma; write 1024 MiB or 1.024 MiB"),
        (units.parse_count, "8,192", "'8,192' has a comma; write 8192 or 8.192"),
        (units.parse_count, "1,048,576", "'1,048,576' has a comma; write 1048576"),
        (units.parse_bandwidth, "2,5Gbit/s", "'2,5Gbit/s' has a comma; write 2.5Gbit/s"),
        (units.parse_seconds, "0,3ms", "'0,3ms' has a comma; write 0.3ms"),
        (units.parse_share, "12,5%", "'12,5%' has a comma; write 12.5%"),
        (units.parse_per_second, "1,5/s", "'1,5/s' has a comma; write 1.5/s"),
    ],
)
def test_commas_in_numbers_are_told_from_points(parse, text, write):
    with pytest.raises(ValueError, match=f"^{re.escape(write)}$"):
        parse(text)
