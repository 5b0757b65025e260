"""SIEVE: a queue in order of arrival whose hand passes over what was used, and leaves it where it is.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key Eviction Algorithm for Web Caches",
NSDI 2024, section 3 and algorithm 1. The hand goes from the oldest block to the newest and begins again at the oldest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

from sortedcontainers import SortedDict

from tierstore.catalog import BlockId
from tierstore.policies.pertier import Change, PerTier, Ranking


class SieveRanking(Ranking):
    """Blocks by number of arrival; the hand is the number from which the search goes on."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._queue: SortedDict[int, BlockId] = SortedDict()
        self._number: dict[BlockId, int] = {}
        self._arrivals = 0
        self._hand = 0
        self._visited: set[BlockId] = set()

    def hit(self, block: BlockId) -> None:
        self._visited.add(block)

    def admit(self, block: BlockId, nbytes: int) -> None:
        self._number[block] = self._arrivals
        self._queue[self._arrivals] = block
        self._arrivals += 1

    def evict(self, block: BlockId) -> None:
        self._hand = self._number[block] + 1
        self.forget(block)

    def forget(self, block: BlockId) -> None:
        del self._queue[self._number.pop(block)]
        self._visited.discard(block)
        if not self._queue or self._queue.peekitem()[0] < self._hand:
            self._hand = 0  # beyond the newest: what arrives next is not what the hand comes to first

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        passed = []
        queue = self._queue
        for number in chain(queue.irange(minimum=self._hand), queue.irange(maximum=self._hand, inclusive=(True, False))):
            block = queue[number]
            if block in self._visited:
                note(partial(self._visited.discard, block))
                passed.append(block)
            else:
                yield block
        yield from passed


class Sieve(PerTier):
    """SIEVE per tier."""

    ranking = SieveRanking
