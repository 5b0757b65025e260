"""What comes next, told from what came before.

[Note: How the future is known]
A training step repeats its accesses. `Forecast` keeps the trace and a pointer to the place in it that looks like the present:
the access after the most recent earlier occurrence of the last few accesses. As long as the trace goes on as it did there,
the pointer moves along, and the stretch between pointer and present is one period, expected to repeat for ever. When an access
differs (an evaluation between two steps), the pointer is searched anew: of the places that end on the same few accesses, the
one before which the trace agrees longest with the present, so that what a short context cannot tell apart, such as the passes
of one step with gradient accumulation, a long one does. Until a context of `TRUSTED_CONTEXT` accesses has matched, the forecast
knows nothing rather than something wrong.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from tierstore.catalog import BlockId

CONTEXT = 8
"""Accesses that always tell the place, if they occurred but once."""

CANDIDATES = 16
"""Recent occurrences of the last access looked at, beside those of longer contexts, when the pointer is searched."""

TRUSTED_CONTEXT = 2
"""Consecutive accesses that must have come as expected (or have matched in a search) before expectations are given."""

KEEP = 1 << 16
"""Accesses remembered: the longest period that can be recognised."""


TRUST = 0.6
TRUST_OVER = 64
"""Of about so many expectations, that share must have come true: a trace that is half random repeats itself by chance."""


class Forecast:
    """Recognises a repeating trace.

    Attributes:
        now: Number of accesses so far; the next access has this position.
        epoch: Changes whenever earlier answers no longer hold.
    """

    def __init__(self) -> None:
        self.now = 0
        self.epoch = 0
        self._sequence: list[BlockId] = []
        self._writes = bytearray()
        self._start = 0  # position of _sequence[0]
        self._positions: dict[BlockId, list[int]] = {}
        self._contexts: dict[tuple[int, int], int] = {}  # (length, hash) of a context -> position behind its last occurrence
        self._hashes = [0]  # of all accesses up to a position, kept as `_sequence` is
        self._pointer: int | None = None
        self._matched = 0
        self._trust = 1.0
        self._since = 0

    @property
    def known(self) -> bool:
        """Whether expectations are given at present."""
        return self._pointer is not None and self._matched >= TRUSTED_CONTEXT and self._trust >= TRUST

    @property
    def held(self) -> int:
        """For how many accesses all has come as expected."""
        return self.now - self._since

    @property
    def period(self) -> int | None:
        """Accesses after which the trace is expected to repeat."""
        return self.now - self._pointer if self._pointer is not None and self.known else None

    def append(self, block: BlockId, write: bool = False) -> bool:
        """Record an access. Returns whether earlier expectations still hold."""
        was_known = self.known
        expected = self._at(self._pointer) if self._pointer is not None else None
        held = expected == block
        if expected is not None and self._matched >= TRUSTED_CONTEXT:
            self._trust += (held - self._trust) / TRUST_OVER
        self._sequence.append(block)
        self._writes.append(write)
        self._hashes.append((self._hashes[-1] * _BASE + block + 1) % _MODULUS)
        self._positions.setdefault(block, []).append(self.now)
        self.now += 1
        if held and self._pointer is not None:
            self._pointer += 1
            self._matched += 1
        else:
            self._search()
        self._remember_contexts()
        if len(self._sequence) > KEEP + KEEP // 2:
            self._prune()
        if held and was_known == self.known:
            return True
        if was_known or self.known:
            self.epoch += 1
            self._since = self.now
        return False

    def window(self) -> Sequence[BlockId]:
        """The accesses expected next, one period of them; empty when nothing is known."""
        if not self.known or self._pointer is None:
            return ()
        return self._sequence[self._pointer - self._start :]

    def written(self) -> Sequence[int]:
        """Of the accesses of `window`, whether each may write."""
        return self._writes[self._pointer - self._start :] if self.known and self._pointer is not None else b""

    def expected(self, position: int) -> BlockId | None:
        """The block expected at `position`, up to one period ahead."""
        return self.at(position) if self.known and self.now <= position < self.now + (self.period or 0) else None

    def at(self, position: int) -> BlockId | None:
        """The block accessed at `position`, or expected there however far ahead; None when that is not known, or not any more."""
        if position < self.now:
            return self._at(position) if position >= self._start else None
        if not self.known or self._pointer is None:
            return None
        return self._at(self._pointer + (position - self.now) % (self.now - self._pointer))

    def repeats(self, position: int) -> int | None:
        """The past position of which the one given, not past, is expected to be the repetition."""
        if not self.known or self._pointer is None:
            return None
        return self._pointer + (position - self.now) % (self.now - self._pointer)

    def next_use(self, block: BlockId, position: int | None = None) -> float:
        """Position of the block's first expected access at or behind `position`, which is not past; infinity without one."""
        if not self.known or self._pointer is None:
            return math.inf
        positions = self._positions.get(block)
        if not positions or positions[-1] < self._pointer:
            return math.inf
        if position is None or position <= self.now:
            return self.now + positions[bisect_left(positions, self._pointer)] - self._pointer
        place = self._pointer + (position - self.now) % (self.now - self._pointer)
        index = bisect_left(positions, place)
        if index == len(positions):
            return position + (self.now - place) + positions[bisect_left(positions, self._pointer)] - self._pointer
        return position + positions[index] - place

    def last_use(self, block: BlockId, position: int) -> float:
        """The last position before `position` at which the block was accessed or is expected to be; minus infinity without one."""
        positions = self._positions.get(block)
        if not positions:
            return -math.inf
        if position <= self.now or not self.known or self._pointer is None:
            index = bisect_left(positions, position)
            return positions[index - 1] if index else -math.inf
        ahead = (position - self.now) % (self.now - self._pointer)
        index = bisect_left(positions, self._pointer + ahead)
        if index and positions[index - 1] >= self._pointer:
            return position - (self._pointer + ahead - positions[index - 1])
        if positions[-1] < self._pointer:
            return positions[-1]
        return position - ahead - (self.now - positions[-1])

    def _at(self, position: int) -> BlockId:
        return self._sequence[position - self._start]

    def _context(self, length: int, end: int) -> int:
        """A hash of the `length` accesses before index `end`."""
        return (self._hashes[end] - self._hashes[end - length] * _POWERS[length]) % _MODULUS

    def _remember_contexts(self) -> None:
        end = len(self._sequence)
        for length in _LENGTHS:
            if end < length:
                break
            self._contexts[length, self._context(length, end)] = self.now

    def _search(self) -> None:
        self._pointer, self._matched = None, 0
        end = len(self._sequence)
        candidates = [position + 1 for position in self._positions[self._sequence[-1]][-1 - CANDIDATES : -1]]
        candidates += [self._contexts.get((length, self._context(length, end)), -1) for length in _LENGTHS if length <= end]
        for candidate in candidates:
            if self._start < candidate < self.now:
                matched = self._agreement(candidate - self._start, end)
                if (matched, candidate) > (self._matched, self._pointer or 0):
                    self._pointer, self._matched = candidate, matched

    def _agreement(self, earlier: int, later: int) -> int:
        """How many accesses before two indices are the same, at most about `_LONGEST`."""
        agreed, length = 0, 1
        growing = True
        while length:
            same = agreed + length <= earlier and self._context(length, earlier - agreed) == self._context(length, later - agreed)
            agreed += length * same
            growing = growing and same and length < _LONGEST
            length = length * 2 if growing else length // 2
        return agreed

    def _prune(self) -> None:
        cut = len(self._sequence) - KEEP
        del self._sequence[:cut]
        del self._writes[:cut]
        del self._hashes[:cut]
        self._start += cut
        self._contexts = {context: position for context, position in self._contexts.items() if position >= self._start}
        for block in list(self._positions):
            kept = [position for position in self._positions[block] if position >= self._start]
            if kept:
                self._positions[block] = kept
            else:
                del self._positions[block]
        if self._pointer is not None and self._pointer < self._start:
            self._pointer, self._matched = None, 0
            self.epoch += 1


_LENGTHS = (2, CONTEXT, 64)
_LONGEST = 1 << 16
_MODULUS = (1 << 31) - 1
_BASE = 1_234_567_891
_POWERS = {1 << exponent: pow(_BASE, 1 << exponent, _MODULUS) for exponent in range(_LONGEST.bit_length())}
