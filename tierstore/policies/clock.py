"""CLOCK, also called second chance: first in, first out, but what was used since the hand last passed is passed over once.

F. J. Corbató, "A paging experiment with the Multics system", MIT Project MAC report MAC-M-384, 1968. Written as a queue whose front is the
hand: a block that is passed over goes to the back with its bit cleared. A block arrives with its bit clear, and the request
that brought it does not set it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

from tierstore.catalog import BlockId
from tierstore.policies.pertier import Change, PerTier, Ranking


class ClockRanking(Ranking):
    """A queue from the hand onwards, and the blocks whose bit is set."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._queue: OrderedDict[BlockId, None] = OrderedDict()
        self._used: set[BlockId] = set()

    def hit(self, block: BlockId) -> None:
        self._used.add(block)

    def admit(self, block: BlockId, nbytes: int) -> None:
        self._queue[block] = None

    def forget(self, block: BlockId) -> None:
        del self._queue[block]
        self._used.discard(block)

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        passed = []
        for block in self._queue:
            if block in self._used:
                note(partial(self._pass_over, block))
                passed.append(block)
            else:
                yield block
        yield from passed  # the second time round every bit is clear

    def _pass_over(self, block: BlockId) -> None:
        self._used.discard(block)
        self._queue.move_to_end(block)


class Clock(PerTier):
    """CLOCK per tier."""

    ranking = ClockRanking
