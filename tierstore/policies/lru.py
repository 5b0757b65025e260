"""Least recently used, per tier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tierstore.catalog import BlockId
from tierstore.policies.base import PolicyBase
from tierstore.residency import Tier


class Lru(PolicyBase):
    """Evicts what was used longest ago. Knows nothing of the future, so it never prefetches on its own."""

    def __init__(self) -> None:
        self._order: dict[Tier, OrderedDict[BlockId, None]] = {Tier.GPU: OrderedDict(), Tier.RAM: OrderedDict()}

    def touched(self, block: BlockId, tier: Tier) -> None:
        if block in self._order[tier]:
            self._order[tier].move_to_end(block)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._order[tier][block] = None

    def removed(self, block: BlockId, tier: Tier) -> None:
        del self._order[tier][block]

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return iter(self._order[tier])
