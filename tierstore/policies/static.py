"""Hold the best fixed part of a repeating trace, stream the rest through what is left.

For blocks touched once a period this is optimal to within one block, and unlike Belady's rule it never moves a held block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain

from tierstore.catalog import BlockId
from tierstore.policies.base import PolicyBase
from tierstore.policies.forecast import Forecast
from tierstore.residency import Tier

STREAMING_SHARE = 0.25
"""Share of a tier left for what streams; at least three of the largest streamed blocks."""


class Static(PolicyBase):
    """Chooses once per recognised period which blocks each tier keeps: those whose return costs most link time per byte."""

    def __init__(self) -> None:
        self.forecast = Forecast()
        # resident blocks, the least recently used first: those that stream, and those that are to stay
        self._streaming: dict[Tier, OrderedDict[BlockId, None]] = {Tier.GPU: OrderedDict(), Tier.RAM: OrderedDict()}
        self._staying: dict[Tier, OrderedDict[BlockId, None]] = {Tier.GPU: OrderedDict(), Tier.RAM: OrderedDict()}
        self._fixed: dict[Tier, set[BlockId]] = {Tier.GPU: set(), Tier.RAM: set()}
        self._chosen_epoch = -1

    @property
    def epoch(self) -> int:
        return self.forecast.epoch

    def accessed(self, block: BlockId, write: bool) -> None:
        self.forecast.append(block)
        if self.forecast.known and self._chosen_epoch != self.epoch:
            self._choose()

    def touched(self, block: BlockId, tier: Tier) -> None:
        line = self._line(block, tier)
        if block in line:
            line.move_to_end(block)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._line(block, tier)[block] = None

    def removed(self, block: BlockId, tier: Tier) -> None:
        del self._line(block, tier)[block]

    def next_use(self, block: BlockId) -> float:
        return self.forecast.next_use(block)

    def expected(self, position: int) -> BlockId | None:
        return self.forecast.expected(position)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return chain(self._streaming[tier], self._staying[tier])

    def _line(self, block: BlockId, tier: Tier) -> OrderedDict[BlockId, None]:
        return (self._staying if block in self._fixed[tier] else self._streaming)[tier]

    def _choose(self) -> None:
        """Fill each tier, the GPU first, with the blocks of the period that save most per byte."""
        self._chosen_epoch = self.epoch
        uses: dict[BlockId, int] = {}
        for block in self.forecast.window():
            uses[block] = uses.get(block, 0) + 1
        taken: set[BlockId] = set()
        for tier in (Tier.GPU, Tier.RAM):
            candidates = [block for block in uses if block not in taken and self.view.nbytes(block)]
            candidates.sort(key=lambda block: (-self._saving(block, uses[block], tier), block))
            largest = max((self.view.nbytes(block) for block in candidates), default=0)
            capacity = self.view.capacity_bytes(tier)
            room = capacity - max(int(capacity * STREAMING_SHARE), 3 * largest)
            if sum(self.view.nbytes(block) for block in candidates) <= capacity:
                room = capacity
            fixed: set[BlockId] = set()
            for block in candidates:
                if self.view.nbytes(block) <= room:
                    room -= self.view.nbytes(block)
                    fixed.add(block)
            self._fix(tier, fixed)
            taken |= fixed

    def _fix(self, tier: Tier, fixed: set[BlockId]) -> None:
        resident = [*self._streaming[tier], *self._staying[tier]]
        self._fixed[tier] = fixed
        self._streaming[tier] = OrderedDict((block, None) for block in resident if block not in fixed)
        self._staying[tier] = OrderedDict((block, None) for block in resident if block in fixed)

    def _saving(self, block: BlockId, uses: int, tier: Tier) -> float:
        cost = self.view.load_cost(block, tier)
        if self.view.is_writable(block):
            cost += self.view.save_cost(block, tier)
        return cost * uses / self.view.nbytes(block)
