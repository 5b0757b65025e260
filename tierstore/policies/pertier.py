"""Runs an algorithm of the literature, which knows one cache and one request at a time, on each memory tier.

[Note: Asking is not evicting]
The algorithms change their state while they search a victim: a hand moves on, a bit is cleared, a block changes queues. The
scheduler asks for victims more often than it evicts one (it waits for a write-back and asks again, or skips a leased block), so
searching must change nothing. A ranking therefore notes, ahead of each victim, what the search would have changed on its way there, and
these changes are made once that victim leaves. What was passed over because it could not leave stays where it was.

[Note: Hits in RAM]
RAM serves loads to the device. A block read from NVMe into RAM is loaded at once, and that load is the request that missed: only
later ones are hits. A block that came as a write-back answered no request: its first load is a hit. When a block is written on the device,
RAM's copy is out of date and gone; the write-back brings it as if it were new.

[Note: Bytes]
The papers count blocks of one size. Here queues are measured in bytes against the tier's capacity, and as many victims are taken
as it needs to make room. With blocks of one size, every ranking is the paper's algorithm, victim for victim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

from tierstore.catalog import BlockId
from tierstore.policies.base import PolicyBase, View
from tierstore.residency import Tier

Change = Callable[[], None]
"""Something that the search for a victim would have changed. See [Note: Asking is not evicting]."""


class Ranking:
    """One algorithm on one tier. Every block named here but in `missed` and `admit` is in the tier.

    Args:
        capacity_bytes: What the tier can hold.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes

    def missed(self, block: BlockId) -> None:
        """Somebody asks for a block that is not here. It will probably be admitted."""

    def hit(self, block: BlockId) -> None:
        """Somebody asks for a block that is here."""

    def admit(self, block: BlockId, nbytes: int) -> None:
        raise NotImplementedError

    def evict(self, block: BlockId) -> None:
        """The block leaves as a victim of `order`; the changes noted before it are made."""
        self.forget(block)

    def forget(self, block: BlockId) -> None:
        """The block leaves for another reason: it was deleted, moved by hand, or is out of date."""
        raise NotImplementedError

    def order(self, note: Callable[[Change], None]) -> Iterator[BlockId]:
        """Every block, first to leave first, as if each left when it was named. Changes nothing; notes changes."""
        raise NotImplementedError


class _OneTier:
    """A ranking, and what is remembered of the last time it was asked.

    Attributes:
        unserved: Blocks whose load is still the request that missed. See [Note: Hits in RAM].
    """

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.inside: set[BlockId] = set()
        self.unserved: set[BlockId] = set()
        self._noted: list[Change] = []
        self._named: dict[BlockId, int] = {}  # block -> number of changes noted before it
        self._made = 0

    def order(self) -> Iterator[BlockId]:
        self.settle()
        for block in self.ranking.order(self._noted.append):
            self._named[block] = len(self._noted)
            yield block

    def settle(self) -> None:
        """Forget the last search: what it found need not hold any longer."""
        self._noted, self._named, self._made = [], {}, 0

    def leave(self, block: BlockId, *, valid: bool) -> None:
        self.inside.remove(block)
        self.unserved.discard(block)
        until = self._named.pop(block, None)
        if until is None or not valid:
            self.settle()
            self.ranking.forget(block)
            return
        for change in self._noted[self._made : until]:
            change()
        self._made = max(self._made, until)
        self.ranking.evict(block)


class PerTier(PolicyBase):
    """A policy made of one ranking per memory tier. Expects nothing, so it never prefetches on its own."""

    ranking: ClassVar[type[Ranking]]

    def bind(self, view: View) -> None:
        self.view = view
        self._tiers = {tier: _OneTier(self.ranking(view.capacity_bytes(tier))) for tier in (Tier.GPU, Tier.RAM)}

    def accessed(self, block: BlockId, write: bool) -> None:
        for tier in (Tier.GPU, Tier.RAM):
            here = self._tiers[tier]
            if block in here.inside:
                return
            here.settle()
            here.ranking.missed(block)

    def touched(self, block: BlockId, tier: Tier) -> None:
        here = self._tiers[tier]
        if block not in here.inside:
            return
        if block in here.unserved:
            here.unserved.discard(block)
            return
        here.settle()
        here.ranking.hit(block)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        here = self._tiers[tier]
        here.settle()
        here.inside.add(block)
        if tier is Tier.RAM and not self.view.is_valid(block, Tier.GPU):
            here.unserved.add(block)
        here.ranking.admit(block, self.view.nbytes(block))

    def removed(self, block: BlockId, tier: Tier) -> None:
        self._tiers[tier].leave(block, valid=self.view.is_valid(block, tier))

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return self._tiers[tier].order()
