"""What comes next, told from what came before.

[Note: How the future is known]
A training step repeats its accesses. `Forecast` keeps the trace and a pointer to the place in it that looks like the present:
the access after the most recent earlier occurrence of the last few accesses. As long as the trace goes on as it did there,
the pointer moves along, and the stretch between pointer and present is one period, expected to repeat. When an access differs
(an evaluation between two steps), the pointer is searched anew by the longest recent context; until a context of
`TRUSTED_CONTEXT` accesses has matched, the forecast knows nothing rather than something wrong.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

from tierstore.catalog import BlockId

CONTEXT = 8
"""Accesses compared at most when the pointer is searched."""

TRUSTED_CONTEXT = 2
"""Consecutive accesses that must have come as expected (or have matched in a search) before expectations are given."""

KEEP = 1 << 16
"""Accesses remembered: the longest period that can be recognised."""


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
        self._start = 0  # position of _sequence[0]
        self._positions: dict[BlockId, list[int]] = {}
        self._contexts: dict[int, int] = {}  # hash of a context -> position behind its last occurrence
        self._pointer: int | None = None
        self._matched = 0

    @property
    def known(self) -> bool:
        """Whether expectations are given at present."""
        return self._pointer is not None and self._matched >= TRUSTED_CONTEXT

    @property
    def period(self) -> int | None:
        """Accesses after which the trace is expected to repeat."""
        return self.now - self._pointer if self._pointer is not None and self.known else None

    def append(self, block: BlockId) -> bool:
        """Record an access. Returns whether earlier expectations still hold."""
        was_known = self.known
        expected = self._at(self._pointer) if self._pointer is not None else None
        held = expected == block
        self._sequence.append(block)
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
        return False

    def window(self) -> Sequence[BlockId]:
        """The accesses expected next, one period of them; empty when nothing is known."""
        if not self.known or self._pointer is None:
            return ()
        return self._sequence[self._pointer - self._start :]

    def expected(self, position: int) -> BlockId | None:
        """The block expected at `position`, up to one period ahead."""
        if not self.known or self._pointer is None or not 0 <= position - self.now < self.now - self._pointer:
            return None
        return self._at(self._pointer + position - self.now)

    def next_use(self, block: BlockId) -> float:
        """Position of the block's next expected access; infinity when the period does not contain it."""
        if not self.known or self._pointer is None:
            return math.inf
        positions = self._positions.get(block, ())
        index = bisect_left(positions, self._pointer)
        if index == len(positions):
            return math.inf
        return self.now + positions[index] - self._pointer

    def _at(self, position: int) -> BlockId:
        return self._sequence[position - self._start]

    def _remember_contexts(self) -> None:
        for length in _LENGTHS:
            if len(self._sequence) >= length:
                self._contexts[hash(tuple(self._sequence[-length:]))] = self.now

    def _search(self) -> None:
        self._pointer, self._matched = None, 0
        for length in _LENGTHS:
            if len(self._sequence) < length:
                continue
            found = self._contexts.get(hash(tuple(self._sequence[-length:])))
            if found is not None and self._start <= found < self.now:
                self._pointer, self._matched = found, length
                return

    def _prune(self) -> None:
        cut = len(self._sequence) - KEEP
        del self._sequence[:cut]
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


_LENGTHS = (CONTEXT, TRUSTED_CONTEXT, 1)
