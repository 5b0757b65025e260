"""Blocks that lie in model files: where each tensor is, and which requests bring a payload in. Pure.

[Note: Over-reading]
Writers of model files align nothing, and direct I/O takes whole pages only. So what lies near together in a file is read in one run
from the page where it begins to the page where it ends, in pieces of one transfer slot, and each tensor's bytes are moved from there
to their place in the payload. Ranges with no more than `GAP_BYTES` between them make one run: to read a gap costs less than to ask twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tierstore.catalog import PAGE, Block, round_up

GAP_BYTES = 128 << 10


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file, as it was when it was adopted.

    Attributes:
        path: Absolute, with no link in it.
        nbytes: Its length.
        modified_ns: When it was last written, in ns since 1970.
        header_sum: xxh3_64 of its header, the eight bytes of its length included.
        header_bytes: Length of that.
    """

    path: str
    nbytes: int
    modified_ns: int
    header_sum: int
    header_bytes: int


@dataclass(frozen=True, slots=True)
class Adopted:
    """Where a block's tensors lie.

    Attributes:
        files: Those that hold some of it.
        places: For each tensor of the block: its file (an index of `files`), and its first byte from the file's start.
    """

    files: tuple[ModelFile, ...]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of a file, from `begin` on, that belong at `target` of the payload."""

    file: int
    begin: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One request: whole pages of a file. See [Note: Over-reading].

    Attributes:
        file: An index of `Adopted.files`.
        begin, nbytes: Multiples of 4096; they may reach beyond the file's end.
        needed: Bytes from `begin` to the end of the last that is wanted.
        parts: What of it goes where.
    """

    file: int
    begin: int
    nbytes: int
    needed: int
    parts: tuple[Range, ...]


def ranges(block: Block, adopted: Adopted, start: int = 0, stop: int | None = None) -> list[Range]:
    """The parts of files that make up payload bytes [start, stop), by file and place; neighbours in both are one."""
    stop = block.nbytes if stop is None else stop
    found: list[Range] = []
    for spec, (file, begin) in zip(block.tensors, adopted.places, strict=True):
        low, high = max(spec.offset, start), min(spec.offset + spec.nbytes, stop)
        if low < high:
            found.append(Range(file, begin + low - spec.offset, low, high - low))
    found.sort(key=lambda one: (one.file, one.begin))
    merged: list[Range] = []
    for one in found:
        last = merged[-1] if merged else None
        if last and (last.file, last.begin + last.nbytes, last.target + last.nbytes) == (one.file, one.begin, one.target):
            merged[-1] = Range(last.file, last.begin, last.target, last.nbytes + one.nbytes)
        else:
            merged.append(one)
    return merged


def gaps(block: Block, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of payload bytes [start, stop) that belong to no tensor: zeros, where checksums are taken."""
    stop = block.nbytes if stop is None else stop
    end = 0
    for low, high in [*((spec.offset, spec.offset + spec.nbytes) for spec in block.tensors), (block.nbytes, block.nbytes)]:
        if max(end, start) < min(low, stop):
            yield max(end, start), min(low, stop)
        end = max(end, high)


def pieces(wanted: Sequence[Range], max_bytes: int) -> list[Piece]:
    """Requests for these ranges, as `ranges` returns them, of at most `max_bytes` each (a multiple of 4096)."""
    found: list[Piece] = []
    run: list[Range] = []
    for one in wanted:
        if run and (one.file != run[-1].file or one.begin - (run[-1].begin + run[-1].nbytes) > GAP_BYTES):
            found += _cut(run, max_bytes)
            run = []
        run.append(one)
    found += _cut(run, max_bytes)
    return found


def _cut(run: Sequence[Range], max_bytes: int) -> Iterator[Piece]:
    """Pieces of about the same length."""
    if not run:
        return
    first = run[0].begin // PAGE * PAGE
    total = round_up(run[-1].begin + run[-1].nbytes, PAGE) - first
    count = -(-total // max_bytes)
    length = round_up(-(-total // count), PAGE)
    index = 0
    for begin in range(first, first + total, length):
        end = min(begin + length, first + total)
        parts: list[Range] = []
        while index < len(run):
            one = run[index]
            low, high = max(one.begin, begin), min(one.begin + one.nbytes, end)
            if low < high:
                parts.append(Range(one.file, low, one.target + low - one.begin, high - low))
            if one.begin + one.nbytes > end:
                break
            index += 1
        if parts:
            last = parts[-1]
            yield Piece(run[0].file, begin, end - begin, last.begin + last.nbytes - begin, tuple(parts))
