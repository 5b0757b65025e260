"""ARC: two LRU lists, of blocks used once and of blocks used again, whose shares follow the hits on what each let go last.

N. Megiddo, D. S. Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003, section III and figure 4.

Where the paper leaves it open: lists and the target `p` are measured in bytes, and one step of `p` is a step for each byte of the
block asked for. The remembered blocks are trimmed when the new block has arrived rather than before, which comes to the same. What
arrives unasked (a write-back, a hint) moves the target when it arrives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from tierstore.catalog import BlockId
from tierstore.policies.pertier import Change, PerTier, Ranking


class _List:
    """Blocks from least to most recently used, and their bytes."""

    def __init__(self) -> None:
        self.blocks: OrderedDict[BlockId, int] = OrderedDict()
        self.nbytes = 0

    def append(self, block: BlockId, nbytes: int) -> None:
        self.blocks[block] = nbytes
        self.nbytes += nbytes

    def remove(self, block: BlockId) -> int:
        nbytes = self.blocks.pop(block)
        self.nbytes -= nbytes
        return nbytes

    def first(self) -> BlockId:
        return next(iter(self.blocks))


class ArcRanking(Ranking):
    """The paper's T1 and T2 (once, again), B1 and B2 (what left them), and p (the target for T1)."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._once, self._again = _List(), _List()
        self._left_once, self._left_again = _List(), _List()
        self._target = 0.0
        self._wanted: BlockId | None = None  # whom the next victim makes room for, as far as is known
        self._felt: set[BlockId] = set()  # of those that left: whose return has moved the target already

    def missed(self, block: BlockId) -> None:
        self._wanted = block
        self._adapt(block)

    def hit(self, block: BlockId) -> None:
        nbytes = (self._once if block in self._once.blocks else self._again).remove(block)
        self._again.append(block, nbytes)

    def admit(self, block: BlockId, nbytes: int) -> None:
        self._adapt(block)
        for left in (self._left_once, self._left_again):
            if block in left.blocks:
                self._forget_left(left, block)
                self._again.append(block, nbytes)
                break
        else:
            self._once.append(block, nbytes)
        self._trim(self._left_once, self.capacity_bytes - self._once.nbytes)
        others = self._once.nbytes + self._again.nbytes + self._left_once.nbytes
        self._trim(self._left_again, 2 * self.capacity_bytes - others)

    def evict(self, block: BlockId) -> None:
        if block in self._once.blocks:
            self._left_once.append(block, self._once.remove(block))
        else:
            self._left_again.append(block, self._again.remove(block))

    def forget(self, block: BlockId) -> None:
        (self._once if block in self._once.blocks else self._again).remove(block)

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        once, again = iter(self._once.blocks.items()), iter(self._again.blocks)
        once_bytes, again_count = self._once.nbytes, len(self._again.blocks)
        # on a tie the paper takes from T1 for a block that B2 remembers
        tie = self._wanted is not None and self._wanted in self._left_again.blocks
        while once_bytes or again_count:
            if once_bytes and (not again_count or once_bytes > self._target or (tie and once_bytes == self._target)):
                block, nbytes = next(once)
                once_bytes -= nbytes
                yield block
            else:
                again_count -= 1
                yield next(again)

    def _adapt(self, block: BlockId) -> None:
        """Move the target towards the list whose loss is felt, once per return."""
        once, again = self._left_once, self._left_again
        if block in self._felt:
            return
        if block in once.blocks:
            self._felt.add(block)
            step = max(again.nbytes / once.nbytes, 1.0) * once.blocks[block]
            self._target = min(self._target + step, float(self.capacity_bytes))
        elif block in again.blocks:
            self._felt.add(block)
            step = max(once.nbytes / again.nbytes, 1.0) * again.blocks[block]
            self._target = max(self._target - step, 0.0)

    def _trim(self, left: _List, limit_bytes: int) -> None:
        while left.blocks and left.nbytes > limit_bytes:
            self._forget_left(left, left.first())

    def _forget_left(self, left: _List, block: BlockId) -> None:
        left.remove(block)
        self._felt.discard(block)


class Arc(PerTier):
    """ARC per tier."""

    ranking = ArcRanking
