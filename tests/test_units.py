"""Sizes: what is accepted, what is refused, and that writing and reading agree."""

from __future__ import annotations

import contextlib
import fractions
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.errors import SizeError
from tierstore.units import LinkRates, format_bytes, format_duration, format_rate, parse_size

UNITS = {
    "": 1,
    "B": 1,
    "k": 10**3,
    "K": 10**3,
    "kB": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "kiB": 2**10,
    "Ki": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "Gi": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        (7e9, 7_000_000_000),
        (np.int64(5), 5),
        ("7GB", 7_000_000_000),
        ("7GiB", 7 * 2**30),
        ("7G", 7_000_000_000),
        ("1.5GB", 1_500_000_000),
        (".5MB", 500_000),
        ("0.1 MB", 100_000),
        ("\t 7 GB\n", 7_000_000_000),
        ("1_000_000", 1_000_000),
        ("12_000 kB", 12_000_000),
        ("512", 512),
        ("512 B", 512),
        ("0", 0),
        ("1.0001 kB", 1000),
    ],
)
def test_accepted(size: object, nbytes: int) -> None:
    result = parse_size(size)
    assert result == nbytes
    assert type(result) is int


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("80%", 800), ("0%", 0), ("100 %", 1000), ("33.37%", 333), (" 5% ", 50)],
)
def test_percent(size: str, nbytes: int) -> None:
    assert parse_size(size, total=1000) == nbytes


NOT_SIZES = """
    7Gb|7b|7Gib|7gb|7 bananas|| |GB|-1|- 1|-7GB|+7GB|7 GB GB|7,5GB|1e9|7GBB|7BB|nan|inf|infinity|0x10|7iB|7i|7g|7m|7mB|1.5|1.5 B|.|1.
    |_1|1_|1__0|1_.5|1.5_GB|%|-5%|101%|1e1%|7%GB
""".strip().split("|")


@pytest.mark.parametrize(
    "size",
    [
        *NOT_SIZES,
        *("\N{ARABIC-INDIC DIGIT SEVEN}GB", "7\N{FULLWIDTH LATIN CAPITAL LETTER G}B", "7G\0B", "9" * 5000, "7" + " " * 5000 + "GB"),
        *(-1, -0.5, 1.5, float("nan"), float("inf"), float("-inf"), True, False, None, b"7GB", ["7GB"], 7j, fractions.Fraction(7, 2)),
    ],
    ids=lambda size: repr(size)[:20],
)
def test_refused(size: Any) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(size, total=10**12, what="gpu=")
    error = caught.value
    assert "gpu=" in str(error)
    assert '"7GB"' in str(error)
    assert '"7GiB"' in str(error)
    assert len(str(error)) < 500
    assert error.need
    assert error.have
    assert error.remedy
    assert error.size is size


@pytest.mark.parametrize(
    ("size", "because"),
    [("7Gb", "bits"), ("-1", "negative"), ("7 bananas", "'bananas' is not a unit"), ("101%", "at most 100%"), ("1.5", "fractions")],
)
def test_refusals_say_why(size: str, because: str) -> None:
    with pytest.raises(SizeError, match=because):
        parse_size(size, total=10)


def test_a_share_needs_a_whole() -> None:
    with pytest.raises(SizeError, match="no whole"):
        parse_size("80%")


BLANKS = st.text(" \t", max_size=3)


@given(value=st.integers(0, 10**15), unit=st.sampled_from(sorted(UNITS)), left=BLANKS, middle=BLANKS)
def test_units_multiply(value: int, unit: str, left: str, middle: str) -> None:
    assert parse_size(f"{left}{value}{middle}{unit}{left}") == value * UNITS[unit]
    assert parse_size(f"{value:_}{unit}") == value * UNITS[unit]


@given(thousandths=st.integers(0, 10**12), unit=st.sampled_from(sorted(unit for unit in UNITS if UNITS[unit] > 1)))
def test_decimals_are_exact(thousandths: int, unit: str) -> None:
    text = f"{thousandths // 1000}.{thousandths % 1000:03d}{unit}"
    assert parse_size(text) == thousandths * UNITS[unit] // 1000


@given(share=st.integers(0, 100), total=st.integers(0, 2**60))
def test_percent_never_exceeds_the_whole(share: int, total: int) -> None:
    assert parse_size(f"{share}%", total=total) == share * total // 100


@given(st.integers(0, 2**62))
def test_whole_numbers_pass_through(nbytes: int) -> None:
    assert parse_size(nbytes) == nbytes
    assert parse_size(str(nbytes)) == nbytes


@given(st.text(max_size=20) | st.from_regex(r"\A\s*[-+]?[0-9_.]{1,8}\s*[A-Za-z%]{0,4}\s*\Z"))
def test_any_text_is_a_size_or_a_size_error(text: str) -> None:
    with contextlib.suppress(SizeError):
        assert parse_size(text, total=10**9) >= 0


@given(st.integers(0, 999 * 10**15))
def test_what_is_written_can_be_read(nbytes: int) -> None:
    text = format_bytes(nbytes)
    assert abs(parse_size(text) - nbytes) <= nbytes * 0.0051
    number, unit = text.split(" ")
    assert len(number.replace(".", "")) <= 3
    assert unit in UNITS


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (7_000_000_000, "7.00 GB"),
        (8_589_934_592, "8.59 GB"),
        (-1_500_000, "-1.50 MB"),
        (123_456 * 10**15, "123456 PB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_format_rate() -> None:
    assert format_rate(54.5e9) == "54.5 GB/s"
    assert format_rate(0.0) == "0 B/s"


def test_link_rates_are_positive() -> None:
    assert LinkRates().h2d_bytes_per_s > 0
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="nvme_read_bytes_per_s"):
            LinkRates(nvme_read_bytes_per_s=rate)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 us"),
        (0.9994e-6, "1.00 us"),
        (12.34e-6, "12.3 us"),
        (0.99951e-3, "1.00 ms"),
        (0.6404, "640 ms"),
        (0.9996, "1.00 s"),
        (9.996, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (187.4, "3:07"),
        (3750, "1:02:30"),
        (360_000, "100:00:00"),
    ],
)
def test_durations_are_written_for_a_person(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
