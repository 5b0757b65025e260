"""First in, first out: the oldest arrival leaves first, whatever happened to it since.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 5(2), 1966, section
"Class 1" of the algorithms compared there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tierstore.catalog import BlockId
from tierstore.policies.pertier import Change, PerTier, Ranking


class FifoRanking(Ranking):
    """A queue."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._queue: dict[BlockId, None] = {}

    def admit(self, block: BlockId, nbytes: int) -> None:
        self._queue[block] = None

    def forget(self, block: BlockId) -> None:
        del self._queue[block]

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        return iter(self._queue)


class Fifo(PerTier):
    """First in, first out, per tier."""

    ranking = FifoRanking
