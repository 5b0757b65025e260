"""Sizes and rates: what a person may write for a number of bytes, and how tierstore writes them back."""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass
from fractions import Fraction

from tierstore.errors import SizeError

SIZE_EXAMPLES = 'a whole number of bytes, or text such as "7GB" (7 x 10^9), "7GiB" (7 x 2^30), "7G" (the same as "7GB") or "80%"'

# A bare prefix is decimal: drives and graphics cards are sold by powers of ten, and the smaller reading never overcommits.
_UNIT_BYTES = {
    **{prefix: 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T", "P"))},
    **{prefix + "i": 1024**power for power, prefix in enumerate(("K", "M", "G", "T", "P"), start=1)},
    "K": 1000,
    "ki": 1024,
}
_SIZE = re.compile(r"\s*(?P<number>[0-9][0-9_]*(?:\.[0-9][0-9_]*)?|\.[0-9][0-9_]*)\s*(?P<unit>%|[A-Za-z]*)\s*", re.ASCII)

# Longer text is no size anybody meant; the bound keeps a hostile string from costing time or flooding the message.
_MAX_TEXT = 64


def parse_size(size: object, *, total: int | None = None, what: str = "size") -> int:
    """Turn what a person wrote into bytes.

    Args:
        size: A whole number of bytes, or text: a number, then a unit. `kB MB GB TB PB` are powers of 1000, `KiB MiB GiB TiB PiB` powers
            of 1024, a bare `G` means `GB`, `%` is a share of `total`. Blanks around either part and underscores between digits are fine.
        total: Bytes that `"100%"` stands for; None where a share makes no sense.
        what: What is being sized, for the message (`"gpu="`).

    Returns:
        Bytes, not negative; fractions of a byte that a unit or percentage leaves are dropped.

    Raises:
        SizeError: It is not a size. Nothing is guessed: a lowercase `b` means bits and is refused.
    """
    if isinstance(size, str):
        return _parse_text(size, total, what)
    if isinstance(size, float) and math.isfinite(size) and size.is_integer():
        size = int(size)  # 7e9 is how many people write it
    if isinstance(size, bool):
        raise _refuse(size, what)
    try:
        value = operator.index(size)  # type: ignore[arg-type]  # anything that is not a whole number raises here
    except TypeError:
        raise _refuse(size, what) from None
    if value < 0:
        raise _refuse(size, what, because="a size is not negative")
    return value


def _parse_text(text: str, total: int | None, what: str) -> int:
    match = _SIZE.fullmatch(text) if len(text) <= _MAX_TEXT else None
    if match is None:
        raise _refuse(text, what, because="a size is not negative" if text.strip().startswith("-") else "")
    number, unit = match["number"], match["unit"]
    if "__" in number or re.search(r"_(\.|$)", number):
        raise _refuse(text, what, because="underscores stand between digits")
    value = Fraction(number)
    if unit == "%":
        if total is None:
            raise _refuse(text, what, because="there is no whole that a percentage could be taken of")
        if value > 100:
            raise _refuse(text, what, because="a share is at most 100%")
        return int(value * total / 100)
    if unit.endswith("b"):
        raise _refuse(text, what, because="a lowercase b stands for bits; write B for bytes")
    scale = _UNIT_BYTES.get(unit.removesuffix("B"))
    if scale is None:
        raise _refuse(text, what, because=f"{unit!r} is not a unit")
    if scale == 1 and value.denominator != 1:
        raise _refuse(text, what, because="there are no fractions of a byte")
    return int(value * scale)


def _refuse(given: object, what: str, *, because: str = "") -> SizeError:
    shown = repr(given)
    if len(shown) > _MAX_TEXT:
        shown = shown[: _MAX_TEXT - 3] + "..."
    problem = f"{what} {shown} is not a size" + (f": {because}" if because else "")
    return SizeError(problem, need=SIZE_EXAMPLES, have=shown, remedy="write it in one of these forms", size=given)


def format_bytes(nbytes: float) -> str:
    """Write bytes for a person: three significant digits, powers of 1000 (`"7.00 GB"`)."""
    if abs(nbytes) < 1000:
        return f"{nbytes:.0f} B"
    units = ("kB", "MB", "GB", "TB", "PB")
    power = 1
    # 999.6 MB would be written as "1000 MB": it belongs to the next unit.
    while abs(nbytes) / 1000**power >= 999.5 and power < len(units):
        power += 1
    value = nbytes / 1000**power
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f} {units[power - 1]}"


def format_rate(bytes_per_s: float) -> str:
    """Write a rate for a person (`"13.0 GB/s"`)."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_duration(seconds: float) -> str:
    """Write a duration for a person: three significant digits below a minute (`"640 ms"`), then `"3:07"` or `"1:02:30"`."""
    if seconds >= 59.95:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
    value, unit = (seconds, "s") if seconds >= 0.9995 else (seconds * 1e3, "ms") if seconds >= 0.9995e-3 else (seconds * 1e6, "us")
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f} {unit}"


@dataclass(frozen=True, slots=True)
class LinkRates:
    """How fast the links are, in bytes per second.

    The defaults are for planning where nothing was measured: a laptop with its GPU on eight PCIe 4 lanes and one PCIe 4 drive, whose
    sustained writes are slower than its advertised ones.
    """

    h2d_bytes_per_s: float = 13e9
    d2h_bytes_per_s: float = 13e9
    nvme_read_bytes_per_s: float = 7e9
    nvme_write_bytes_per_s: float = 2e9

    def __post_init__(self) -> None:
        for name in self.__slots__:
            rate = getattr(self, name)
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"{name} must be positive and finite, not {rate!r}")
