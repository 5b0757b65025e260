"""In which order blocks should leave a tier, when the future is known: Belady's rule, and a plan that repeats every period.

[Note: Belady's rule ahead of time]
Belady's rule on a known future is a sequence of pairs: fetch this block for that position, and evict that one for it. A pair
may be carried out early, as soon as the use before it of the block to be evicted is over: the transfers stay the same, and
only their times change. So each tier has a cursor, the position up to which everything expected has been seen to, and blocks
are ranked by what comes behind the cursor, not behind the present.

[Note: Lag]
On a cycle the block that Belady's rule evicts is the one just used, so that its pair cannot be carried out early: the fetch begins when
the use before has ended, and hides behind nothing. With a lag of n, the blocks of the last n positions before the cursor stay, and
their extents are written back and filled again while the next n are computed on. It is the best rule for whoever must fetch n
positions ahead, and costs what n blocks less of room cost: nothing where the furthest block was used long ago.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from sortedcontainers import SortedDict, SortedList

from tierstore.catalog import BlockId

_NEIGHBOURS = 8


class Future(Protocol):
    """Which block is expected where. Positions are those of the trace."""

    def at(self, position: int) -> BlockId | None:
        """The block at a position, past or to come; None when that is not known."""
        ...

    def next_use(self, block: BlockId, position: int) -> float:
        """The first position from `position` on at which the block is expected; infinity without one."""
        ...

    def last_use(self, block: BlockId, position: int) -> float:
        """The last position before `position` at which the block was or is expected to be used; minus infinity without one."""
        ...


class Ranking(Protocol):
    """The blocks of one tier in the order in which they should leave. Positions at or behind the cursor are still to be served."""

    cursor: int

    def add(self, block: BlockId) -> None: ...

    def remove(self, block: BlockId) -> None: ...

    def move(self, forward: bool) -> None:
        """Move the cursor by one position."""
        ...

    def order(self, late: int = 0) -> Iterator[BlockId]:
        """The first to leave first, for a block needed at the cursor, or `late` positions before. Nothing may change meanwhile."""
        ...


class Belady:
    """Furthest next use first; the blocks of the last `lag` positions last. An access costs O(log n).

    Among a few neighbours at the far end, the one first whose return costs least per byte and position: keeping a block saves
    its return, and takes its bytes for as long as it waits.

    Args:
        future: What is expected.
        cursor: Where to begin.
        blocks: On the tier now.
        weigh: Seconds of link time per byte to lose a block and fetch it again.
        lag: See [Note: Lag].
    """

    def __init__(self, future: Future, cursor: int, blocks: Iterable[BlockId], weigh: Callable[[BlockId], float], lag: int = 0) -> None:
        self.cursor = cursor
        self._future = future
        self._weigh = weigh
        self._lag = lag
        self._key = {block: future.next_use(block, cursor) for block in blocks}
        self._sorted: SortedList[tuple[float, int]] = SortedList((key, block) for block, key in self._key.items())

    def __contains__(self, block: BlockId) -> bool:
        return block in self._key

    def add(self, block: BlockId) -> None:
        self._key[block] = key = self._future.next_use(block, self.cursor)
        self._sorted.add((key, block))

    def remove(self, block: BlockId) -> None:
        self._sorted.remove((self._key.pop(block), block))

    def move(self, forward: bool) -> None:
        passed = self.cursor if forward else self.cursor - 1
        self.cursor += 1 if forward else -1
        block = self._future.at(passed)
        if block is not None and block in self._key:
            self.remove(block)
            self.add(block)

    def furthest_first(self) -> Iterator[BlockId]:
        """By next use alone: in a tenth of the time, for blocks of which hardly any is to leave."""
        return (BlockId(number) for _, number in reversed(self._sorted))

    def order(self, late: int = 0) -> Iterator[BlockId]:
        recent = {self._future.at(self.cursor - late - back - 1) for back in range(self._lag)}
        last: list[BlockId] = []
        batch: list[tuple[float, float, BlockId]] = []
        for key, number in reversed(self._sorted):
            block = BlockId(number)
            if block in recent:
                last.append(block)
                continue
            batch.append((self._weigh(block) / max(1.0, key - self.cursor), -key, block))
            if len(batch) == _NEIGHBOURS:
                batch.sort()
                yield from (block for _, _, block in batch[: _NEIGHBOURS // 2])
                del batch[: _NEIGHBOURS // 2]
        batch.sort()
        yield from (block for _, _, block in batch)
        yield from last


class Fixed:
    """Some uses are followed by keeping the block until its next use, the same in every period; the others stream.

    Streamed blocks leave in the order of their last use, before all that are kept.

    Args:
        future, cursor, blocks, weigh: As for `Belady`.
        kept: Per position modulo `period`, whether the block used there stays until its next use.
        period: Of the trace.
    """

    def __init__(
        self,
        future: Future,
        cursor: int,
        blocks: Iterable[BlockId],
        weigh: Callable[[BlockId], float],
        kept: bytes,
        period: int,
    ) -> None:
        self.cursor = cursor
        self._future = future
        self._kept = kept
        self._period = period
        self._streamed: dict[BlockId, int] = {}
        self._order: SortedDict[int, BlockId] = SortedDict()  # position of the last use -> streamed block
        self._stays = Belady(future, cursor, (), weigh)
        for block in blocks:
            self.add(block)

    def add(self, block: BlockId) -> None:
        used = self._future.last_use(block, self.cursor)
        if used < 0 or self._future.next_use(block, self.cursor) == self.cursor:
            self._stays.add(block)  # it is about to be used
        else:
            self._add(block, int(used))

    def remove(self, block: BlockId) -> None:
        if block in self._streamed:
            del self._order[self._streamed.pop(block)]
        else:
            self._stays.remove(block)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._streamed or block in self._stays

    def _add(self, block: BlockId, used: int) -> None:
        if self._kept[used % self._period]:
            self._stays.add(block)
        else:
            self._streamed[block] = used
            self._order[used] = block

    def move(self, forward: bool) -> None:
        passed = self.cursor if forward else self.cursor - 1
        self.cursor += 1 if forward else -1
        self._stays.cursor = self.cursor
        block = self._future.at(passed)
        if block is None or block not in self:
            return
        self.remove(block)
        if forward:
            self._add(block, passed)
        else:
            self._stays.add(block)

    def order(self, late: int = 0) -> Iterator[BlockId]:
        yield from self._order.values()
        yield from self._stays.furthest_first()
