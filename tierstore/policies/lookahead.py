"""Evict what is needed furthest away, weighed by what its return costs.

Belady's rule (A study of replacement algorithms for a virtual-storage computer, 1966) on the forecast of a repeating trace.
Two things are added to it: a copy that must be written back before its extent can be reused costs more than one that is
merely dropped, and bytes, not blocks, are what space is made of. Until a period is recognised it is LRU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator

from sortedcontainers import SortedList

from tierstore.catalog import BlockId
from tierstore.policies.base import PolicyBase
from tierstore.policies.forecast import Forecast
from tierstore.residency import Tier


class Lookahead(PolicyBase):
    """The default policy.

    Resident blocks of each tier are kept sorted by next use. Only the block just accessed changes its place, so an access
    costs O(log n); when expectations change, the order is rebuilt at the next question.
    """

    def __init__(self) -> None:
        self.forecast = Forecast()
        self._recent: dict[Tier, OrderedDict[BlockId, None]] = {Tier.GPU: OrderedDict(), Tier.RAM: OrderedDict()}
        self._sorted: dict[Tier, SortedList[tuple[float, int]]] = {Tier.GPU: SortedList(), Tier.RAM: SortedList()}
        self._key: dict[Tier, dict[BlockId, float]] = {Tier.GPU: {}, Tier.RAM: {}}
        self._built_epoch = -1

    @property
    def epoch(self) -> int:
        return self.forecast.epoch

    def accessed(self, block: BlockId, write: bool) -> None:
        held = self.forecast.append(block)
        if held and self._built_epoch == self.epoch:
            for tier in (Tier.GPU, Tier.RAM):
                if block in self._key[tier]:
                    self._place(block, tier)

    def touched(self, block: BlockId, tier: Tier) -> None:
        if block in self._recent[tier]:
            self._recent[tier].move_to_end(block)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._recent[tier][block] = None
        if self._built_epoch == self.epoch:
            self._place(block, tier)

    def removed(self, block: BlockId, tier: Tier) -> None:
        del self._recent[tier][block]
        if self._built_epoch == self.epoch:
            self._sorted[tier].remove((self._key[tier].pop(block), block))

    def next_use(self, block: BlockId) -> float:
        return self.forecast.next_use(block)

    def expected(self, position: int) -> BlockId | None:
        return self.forecast.expected(position)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        if not self.forecast.known:
            return iter(self._recent[tier])
        if self._built_epoch != self.epoch:
            self._rebuild()
        return self._by_worth(tier)

    def _place(self, block: BlockId, tier: Tier) -> None:
        keys = self._key[tier]
        if block in keys:
            self._sorted[tier].remove((keys[block], block))
        keys[block] = self.forecast.next_use(block)
        self._sorted[tier].add((keys[block], block))

    def _rebuild(self) -> None:
        for tier in (Tier.GPU, Tier.RAM):
            keys = {block: self.forecast.next_use(block) for block in self._recent[tier]}
            self._key[tier] = keys
            self._sorted[tier] = SortedList((key, block) for block, key in keys.items())
        self._built_epoch = self.epoch

    def _by_worth(self, tier: Tier) -> Iterator[BlockId]:
        """Furthest next use first; among a few neighbours at that end, the cheapest to lose first.

        Worth is (seconds of link time to lose the copy and fetch it again) per (byte x accesses until it is needed): what
        keeping it saves, over the space and time it occupies meanwhile.
        """
        batch: list[tuple[float, float, BlockId]] = []
        for key, number in reversed(self._sorted[tier]):
            block = BlockId(number)
            batch.append((self._worth(block, key, tier), -key, block))
            if len(batch) == _NEIGHBOURS:
                batch.sort()
                yield from (block for _, _, block in batch[: _NEIGHBOURS // 2])
                del batch[: _NEIGHBOURS // 2]
        batch.sort()
        yield from (block for _, _, block in batch)

    def _worth(self, block: BlockId, next_use: float, tier: Tier) -> float:
        if next_use == math.inf:
            return -1.0 if not self.view.is_dirty(block, tier) else 0.0
        cost = self.view.load_cost(block, tier)
        if self.view.is_dirty(block, tier):
            cost += self.view.save_cost(block, tier)
        return cost / (self.view.nbytes(block) * max(1.0, next_use - self.forecast.now))


_NEIGHBOURS = 8
