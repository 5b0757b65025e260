"""S3-FIFO: a small queue that sifts newcomers, a main queue for what was used in it, and a ghost queue that remembers the sifted.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, K. V. Rashmi, "FIFO queues are all you need for cache eviction", SOSP 2023, section 4.1 and algorithm 1.

Where the paper leaves it open: shares are of the tier's bytes; the ghost queue remembers blocks of as many bytes as the main
queue may hold; the main queue is full when it holds more than its share, and what then leaves it is the eviction that was asked for.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial

from tierstore.catalog import BlockId
from tierstore.policies.pertier import Change, PerTier, Ranking

TENTHS_SMALL = 1
"""Tenths of the tier that are the small queue's share; the main queue has the rest."""

MAX_USES = 3
"""Uses counted of a block at most."""


class S3FifoRanking(Ranking):
    """The three queues, each with the bytes of its blocks, oldest first."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._small: OrderedDict[BlockId, int] = OrderedDict()
        self._main: OrderedDict[BlockId, int] = OrderedDict()
        self._ghosts: OrderedDict[BlockId, int] = OrderedDict()
        self._small_bytes = self._main_bytes = self._ghost_bytes = 0
        self._uses: dict[BlockId, int] = {}

    def hit(self, block: BlockId) -> None:
        self._uses[block] = min(self._uses[block] + 1, MAX_USES)

    def admit(self, block: BlockId, nbytes: int) -> None:
        self._uses[block] = 0
        if block in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(block)
            self._main[block] = nbytes
            self._main_bytes += nbytes
        else:
            self._small[block] = nbytes
            self._small_bytes += nbytes

    def evict(self, block: BlockId) -> None:
        if block in self._small:
            self._ghosts[block] = self._small[block]
            self._ghost_bytes += self._small[block]
            while 10 * self._ghost_bytes > (10 - TENTHS_SMALL) * self.capacity_bytes:
                self._ghost_bytes -= self._ghosts.popitem(last=False)[1]
        self.forget(block)

    def forget(self, block: BlockId) -> None:
        del self._uses[block]
        if block in self._small:
            self._small_bytes -= self._small.pop(block)
        else:
            self._main_bytes -= self._main.pop(block)

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        small, main = _Queue(self._small), _Queue(self._main)
        small_bytes, main_bytes = self._small_bytes, self._main_bytes
        uses: dict[BlockId, int] = {}  # of blocks that have been passed over
        while small.length or main.length:
            if small.length and (not main.length or 10 * small_bytes >= TENTHS_SMALL * self.capacity_bytes):
                block, nbytes = small.take()
                small_bytes -= nbytes
                if self._uses[block] <= 1:
                    yield block
                    continue
                note(partial(self._promote, block))
                uses[block] = 0
                main.append(block, nbytes)
                main_bytes += nbytes
                if 10 * main_bytes <= (10 - TENTHS_SMALL) * self.capacity_bytes:
                    continue
            while True:
                block, nbytes = main.take()
                left = uses.get(block, self._uses[block])
                if left == 0:
                    break
                note(partial(self._requeue, block))
                uses[block] = left - 1
                main.append(block, nbytes)
            main_bytes -= nbytes
            yield block

    def _promote(self, block: BlockId) -> None:
        nbytes = self._small.pop(block)
        self._small_bytes -= nbytes
        self._main[block] = nbytes
        self._main_bytes += nbytes
        self._uses[block] = 0

    def _requeue(self, block: BlockId) -> None:
        self._main.move_to_end(block)
        self._uses[block] -= 1


class _Queue:
    """A queue to try things on: takes from another, which it leaves as it is, and appends to itself."""

    def __init__(self, blocks: OrderedDict[BlockId, int]) -> None:
        self.length = len(blocks)
        self._from = iter(blocks.items())
        self._appended: deque[tuple[BlockId, int]] = deque()

    def take(self) -> tuple[BlockId, int]:
        self.length -= 1
        return next(self._from, None) or self._appended.popleft()

    def append(self, block: BlockId, nbytes: int) -> None:
        self.length += 1
        self._appended.append((block, nbytes))


class S3Fifo(PerTier):
    """S3-FIFO per tier."""

    ranking = S3FifoRanking
