"""The extent allocator of one memory tier. Pure bookkeeping: it never touches the bytes.

[Note: Two ends]
Held blocks and small ones (`Extents.is_low`) grow from the low end, everything else is placed at the high end of the smallest hole that
takes it. So what cannot move gathers on one side; and gradients among the state of an optimizer, six times as large, lie in a stack,
which leaves whole extents of that size as it grows smaller, instead of holes everywhere. What fragmentation remains is mended by moving
unleased extents (`plan_compaction`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sortedcontainers import SortedDict, SortedList

FEW_EXTENTS = 64
"""Up to here a compaction is planned by looking at the whole arena. With more it would take milliseconds under the lock."""

NEARBY_HOLES = 4
NEARBY_EXTENTS = 32
"""With more: how many of the largest holes are looked at first, and extents around each."""


@dataclass(frozen=True, slots=True)
class Move:
    """Move the extent at `source` to `target`, both byte offsets; the ranges may overlap."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Compaction:
    """Moves, to be carried out in order, that leave the one hole `[hole, hole + hole_bytes)`."""

    moves: tuple[Move, ...]
    hole: int
    hole_bytes: int


class Arena:
    """Hands out extents of `[0, capacity_bytes)`. Sizes are multiples of the caller's alignment. Not thread-safe.

    Attributes:
        capacity_bytes: Length of the arena.
        free_bytes: Bytes in no extent.
        peak_bytes: The most that was ever allocated at once.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.free_bytes = capacity_bytes
        self.peak_bytes = 0
        self._extents: SortedDict[int, int] = SortedDict()  # offset -> bytes
        self._holes: SortedDict[int, int] = SortedDict()  # offset -> bytes
        self._by_size: SortedList[tuple[int, int]] = SortedList()  # (bytes, offset)
        if capacity_bytes:
            self._add_hole(0, capacity_bytes)

    @property
    def used_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest extent that `allocate` could hand out."""
        return self._by_size[-1][0] if self._by_size else 0

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of every extent, by offset."""
        return iter(self._extents.items())

    def allocate(self, nbytes: int, *, low: bool = False) -> int | None:
        """Take an extent; None when no single hole is large enough.

        Args:
            nbytes: Its length, at least 1.
            low: Place it as low as possible (held blocks) instead of at the high end of the best hole.
        """
        if nbytes > self.largest_hole:
            return None
        if low:
            offset: int = next(start for start, length in self._holes.items() if length >= nbytes)
            hole_bytes = self._take_hole(offset)
            if hole_bytes > nbytes:
                self._add_hole(offset + nbytes, hole_bytes - nbytes)
        else:
            start: int
            hole_bytes, start = self._by_size[self._by_size.bisect_left((nbytes, 0))]
            self._take_hole(start)
            offset = start + hole_bytes - nbytes
            if hole_bytes > nbytes:
                self._add_hole(start, hole_bytes - nbytes)
        self._extents[offset] = nbytes
        self.free_bytes -= nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return offset

    def release(self, offset: int) -> None:
        """Give the extent that begins at `offset` back."""
        nbytes = self._extents.pop(offset)  # a KeyError here is a double free
        self.free_bytes += nbytes
        start, end = offset, offset + nbytes
        index = self._holes.bisect_left(offset)
        if index < len(self._holes):
            after, length = self._holes.peekitem(index)
            if after == end:
                self._take_hole(after)
                end += length
        if index > 0:
            before, length = self._holes.peekitem(index - 1)
            if before + length == start:
                self._take_hole(before)
                start = before
        self._add_hole(start, end - start)

    def plan_compaction(self, nbytes: int, movable: Callable[[int], bool], *, nearby: bool = False) -> Compaction | None:
        """The cheapest moves found that leave a hole of at least `nbytes`; None when no moves can. Moves nothing.

        Args:
            nbytes: Wanted length.
            movable: Whether the extent at this offset may be moved.
            nearby: In an arena of many extents, only moves around its largest holes: few bytes, found in no time.
        """
        if nbytes > self.free_bytes:
            return None
        if len(self._extents) > FEW_EXTENTS:
            plan = self._plan_nearby(nbytes, movable)
            if nearby or plan is not None:
                return plan
        regions = self._regions(movable)
        best: tuple[int, int, int, int] | None = None  # cost, region, first, last
        for number, region in enumerate(regions):
            for first, last, cost in _cheapest_runs(region, nbytes):
                if best is None or cost < best[0]:
                    best = (cost, number, first, last)
        if best is not None:
            _, number, first, last = best
            return _slide(regions[number][first : last + 1], ())
        return self._plan_relocation(nbytes, regions)

    def apply(self, plan: Compaction) -> None:
        """Book a compaction: every moved extent at its new place, and the hole as one extent of its own.

        The hole is not free until `release(plan.hole)`, which the caller does once the bytes have really moved.
        """
        for move in plan.moves:
            del self._extents[move.source]
        for move in plan.moves:
            self._extents[move.target] = move.nbytes
        self._extents[plan.hole] = plan.hole_bytes
        self.free_bytes -= plan.hole_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        self._find_holes(
            min([plan.hole, *(min(move.source, move.target) for move in plan.moves)]),
            max([plan.hole + plan.hole_bytes, *(max(move.source, move.target) + move.nbytes for move in plan.moves)]),
        )

    def _find_holes(self, low: int, high: int) -> None:
        """Book the holes between extents anew, where nothing outside of [low, high) has changed."""
        before = self._extents.bisect_left(low) - 1
        position = sum(self._extents.peekitem(before)) if before >= 0 else 0
        after = self._extents.bisect_left(high)
        end = self._extents.peekitem(after)[0] if after < len(self._extents) else self.capacity_bytes
        for offset in list(self._holes.irange(position, end, inclusive=(True, False))):
            self._take_hole(offset)
        for offset in [*self._extents.irange(position, end, inclusive=(True, False)), end]:
            if offset > position:
                self._add_hole(position, offset - position)
            position = offset + self._extents.get(offset, 0)

    def _add_hole(self, offset: int, nbytes: int) -> None:
        self._holes[offset] = nbytes
        self._by_size.add((nbytes, offset))

    def _take_hole(self, offset: int) -> int:
        nbytes: int = self._holes.pop(offset)
        self._by_size.remove((nbytes, offset))
        return nbytes

    def _plan_nearby(self, nbytes: int, movable: Callable[[int], bool]) -> Compaction | None:
        """The cheapest of the moves around the largest holes, each grown over the smaller of its two neighbours; None if none will do."""
        best: tuple[int, int, int] | None = None  # bytes to move, first and end of the stretch
        for hole_bytes, hole in self._by_size[-NEARBY_HOLES:]:
            low, high, free, cost = hole, hole + hole_bytes, hole_bytes, 0
            for _ in range(NEARBY_EXTENTS):
                left, right = self._before(low, movable), self._behind(high, movable)
                if free >= nbytes or not (left or right):
                    break
                if right is None or (left is not None and left[1] <= right[1]):
                    assert left is not None
                    low, taken, gained = left
                else:
                    high, taken, gained = right
                cost, free = cost + taken, free + gained
            if free >= nbytes and (best is None or cost < best[0]):
                best = cost, low, high
        if best is None:
            return None
        _, low, high = best
        pieces = [_Piece(offset, self._extents[offset], True) for offset in self._extents.irange(low, high, inclusive=(True, False))]
        pieces += [_Piece(offset, self._holes[offset], False) for offset in self._holes.irange(low, high, inclusive=(True, False))]
        return _slide(sorted(pieces, key=lambda piece: piece.offset), ())

    def _before(self, low: int, movable: Callable[[int], bool]) -> tuple[int, int, int] | None:
        """What a stretch from `low` on could take in below it: (where it then begins, bytes of the extent, bytes of the hole)."""
        index = self._extents.bisect_left(low) - 1
        if index < 0:
            return None
        offset, nbytes = self._extents.peekitem(index)
        if not movable(offset):
            return None
        start = sum(self._extents.peekitem(index - 1)) if index else 0
        return start, nbytes, offset - start

    def _behind(self, high: int, movable: Callable[[int], bool]) -> tuple[int, int, int] | None:
        """What a stretch up to `high` could take in above it, likewise: (where it then ends, ...)."""
        nbytes = self._extents.get(high)
        if nbytes is None or not movable(high):
            return None
        gained = self._holes.get(high + nbytes, 0)
        return high + nbytes + gained, nbytes, gained

    def _regions(self, movable: Callable[[int], bool]) -> list[list[_Piece]]:
        """Maximal stretches without immovable extents, each as pieces in address order."""
        pieces = [_Piece(offset, length, False) for offset, length in self._holes.items()]
        pieces += [_Piece(offset, length, True) for offset, length in self._extents.items()]
        pieces.sort(key=lambda piece: piece.offset)
        regions: list[list[_Piece]] = [[]]
        for piece in pieces:
            if piece.taken and not movable(piece.offset):
                regions.append([])
            else:
                regions[-1].append(piece)
        return [region for region in regions if region]

    def _plan_relocation(self, nbytes: int, regions: list[list[_Piece]]) -> Compaction | None:
        """No region has enough free space of its own: move extents out of one into holes elsewhere."""
        order = sorted(range(len(regions)), key=lambda index: -sum(piece.nbytes for piece in regions[index] if not piece.taken))
        for number in order:
            region = regions[number]
            missing = nbytes - sum(piece.nbytes for piece in region if not piece.taken)
            elsewhere = [piece for other, pieces in enumerate(regions) if other != number for piece in pieces]
            holes = [(piece.nbytes, piece.offset) for piece in elsewhere if not piece.taken]
            out: list[Move] = []
            for piece in sorted((piece for piece in region if piece.taken), key=lambda piece: -piece.nbytes):
                if missing <= 0:
                    break
                fitting = min((hole for hole in holes if hole[0] >= piece.nbytes), default=None)
                if fitting is None:
                    continue
                holes.remove(fitting)
                if fitting[0] > piece.nbytes:
                    holes.append((fitting[0] - piece.nbytes, fitting[1] + piece.nbytes))
                out.append(Move(piece.offset, fitting[1], piece.nbytes))
                missing -= piece.nbytes
            if missing <= 0:
                return _slide(region, out)
        return None


@dataclass(frozen=True, slots=True)
class _Piece:
    offset: int
    nbytes: int
    taken: bool


def _cheapest_runs(region: Sequence[_Piece], nbytes: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, bytes to move) of each minimal run of pieces whose holes together hold `nbytes`."""
    first = free = cost = 0
    for last, piece in enumerate(region):
        if piece.taken:
            cost += piece.nbytes
            continue
        free += piece.nbytes
        while free >= nbytes:
            yield first, last, cost
            if region[first].taken:
                cost -= region[first].nbytes
            else:
                free -= region[first].nbytes
            first += 1


def _slide(run: Sequence[_Piece], out: Sequence[Move]) -> Compaction:
    """Move `out` away, then slide what is left of the run to its low end, so that one hole remains at the high end."""
    gone = {move.source for move in out}
    position = run[0].offset
    moves = list(out)
    for piece in run:
        if not piece.taken or piece.offset in gone:
            continue
        if piece.offset != position:
            moves.append(Move(piece.offset, position, piece.nbytes))
        position += piece.nbytes
    end = run[-1].offset + run[-1].nbytes
    return Compaction(tuple(moves), position, end - position)


def pack(gaps: Sequence[int], sizes: Sequence[int], *, effort: int = 5_000) -> bool:
    """Whether extents of `sizes` can be placed into gaps of the given lengths, whatever else is moved.

    First each extent, the largest first, goes into the tightest gap that takes it. Where that fails other choices are
    searched, for at most `effort` steps. A no is certain; where the search runs out, the answer is yes: "perhaps".
    """
    left = sorted((size for size in sizes if size), reverse=True)
    room = sorted(gaps)
    if sum(left) > sum(room) or (left and left[0] > room[-1]):
        return False
    if len(room) <= 1 or len(left) <= 1 or _fits_tightly(room, left):
        return True
    return _search(room, left, effort)


def _fits_tightly(gaps: Sequence[int], sizes: Sequence[int]) -> bool:
    room = SortedList(gaps)
    for size in sizes:
        index = room.bisect_left(size)
        if index == len(room):
            return False
        gap = room.pop(index)
        room.add(gap - size)
    return True


def _search(gaps: Sequence[int], sizes: Sequence[int], effort: int) -> bool:
    """Depth-first over the gap of each extent; gaps of equal length are tried once."""
    room = list(gaps)
    placed: list[int] = []  # the gap of each extent so far
    untried = [_choices(room, sizes[0])]
    for _ in range(effort):
        if untried[-1]:
            gap = untried[-1].pop()
            room[gap] -= sizes[len(placed)]
            placed.append(gap)
            if len(placed) == len(sizes):
                return True
            untried.append(_choices(room, sizes[len(placed)]))
        else:
            untried.pop()
            if not placed:
                return False
            gap = placed.pop()
            room[gap] += sizes[len(placed)]
    return True


def _choices(room: Sequence[int], size: int) -> list[int]:
    """Gaps that take `size`, one of each length, the tightest last."""
    by_length = {length: gap for gap, length in enumerate(room) if length >= size}
    return [by_length[length] for length in sorted(by_length, reverse=True)]
