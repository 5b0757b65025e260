"""What a replacement policy is: an order on blocks, and nothing else.

A policy ranks. It sees block ids, sizes, dirtiness, link rates and the accesses; it never sees leases, extents or budgets,
so the worst it can do is be slow. All calls come from under the store's lock, one at a time: they must be quick and must
not call back into the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from tierstore.catalog import BlockId
from tierstore.residency import Tier
from tierstore.trace import Link


class View(Protocol):
    """What a policy may ask about the store at any time."""

    def nbytes(self, block: BlockId) -> int:
        """Payload bytes of a block; 0 once it was deleted, when nothing else may be asked of it."""
        ...

    def is_dirty(self, block: BlockId, tier: Tier) -> bool:
        """Whether evicting the block's copy on that tier would need a write-back."""
        ...

    def is_writable(self, block: BlockId) -> bool:
        """False for frozen blocks."""
        ...

    def is_valid(self, block: BlockId, tier: Tier) -> bool:
        """Whether the tier holds the block's newest bytes."""
        ...

    def capacity_bytes(self, tier: Tier) -> int:
        """Bytes of blocks the tier can hold."""
        ...

    def is_held(self, block: BlockId, tier: Tier) -> bool:
        """Whether the block stays on that tier, however it is ranked."""
        ...

    def held_bytes(self, tier: Tier) -> int:
        """Of all blocks that stay on that tier."""
        ...

    def load_cost(self, block: BlockId, tier: Tier) -> float:
        """Seconds of link time to bring the block back to `tier` from the tier below."""
        ...

    def save_cost(self, block: BlockId, tier: Tier) -> float:
        """Seconds of link time to write the block back from `tier` to the tier below."""
        ...

    def seconds_per_byte(self, link: Link) -> float:
        """Seconds a byte takes to cross a link: as assumed, or as last measured."""
        ...

    def wrote_whole(self, position: int) -> bool:
        """Whether the access at a past position of the trace wrote all of its block: what this had held before was of no use."""
        ...

    def used_up(self, position: int) -> bool:
        """Whether the access at a past position of the trace left its block without content."""
        ...

    @property
    def seconds_between(self) -> float:
        """Seconds of computing from one access to the next, waits left out, on average of what was measured of late; 0 before."""
        ...

    def measure(self, wanted: bool) -> None:
        """Have computing and links measured from now on, or not any more. It costs each lease and each copy a little."""
        ...

    def computed(self, position: int) -> tuple[float, float] | None:
        """Seconds of computing at a past access: under its lease, and from then on to the next access. None: not measured, or not yet."""
        ...


@runtime_checkable
class Policy(Protocol):
    """The protocol. `PolicyBase` has a do-nothing answer for everything but `victims`.

    Three questions are asked only of policies that have them. `victims_for(tier, position)`: as `victims`, for a block needed at a
    position up to which all else has been seen to; a prefetch then waits for the first of these. `stays(block, tier, position, until)`:
    whether a block is to stay on a tier behind its use at a position, past or to come, and behind all that follow before `until`, each
    time until the next; None when that depends.
    `repeats(position)`: the position already past of which an expected one is the repetition; None when the policy cannot say.
    """

    def bind(self, view: View) -> None:
        """Called once, before anything else."""
        ...

    def accessed(self, block: BlockId, write: bool) -> None:
        """A lease took the block on the device. Called in trace order."""
        ...

    def touched(self, block: BlockId, tier: Tier) -> None:
        """The copy on `tier` served: on the GPU a lease, in RAM a load to the device."""
        ...

    def admitted(self, block: BlockId, tier: Tier) -> None:
        """The tier now has an extent for the block, filled or about to be."""
        ...

    def removed(self, block: BlockId, tier: Tier) -> None:
        """The tier no longer has it. Follows exactly one `admitted`."""
        ...

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        """The tier's admitted blocks, the one to evict first first. The scheduler skips what it may not evict.

        The iterator is dropped before the policy is called again, so it may walk the policy's own structures.
        """
        ...

    def next_use(self, block: BlockId) -> float:
        """Position in the trace of the block's next expected access; `math.inf` when none is known."""
        ...

    def expected(self, position: int) -> BlockId | None:
        """The block expected at a position of the trace not yet reached; None when the policy cannot say."""
        ...

    @property
    def epoch(self) -> int:
        """Changes whenever expectations given before no longer hold."""
        ...


class PolicyBase:
    """A policy that expects nothing. Subclasses rank in `victims`."""

    view: View

    def bind(self, view: View) -> None:
        self.view = view

    def accessed(self, block: BlockId, write: bool) -> None:
        pass

    def touched(self, block: BlockId, tier: Tier) -> None:
        pass

    def admitted(self, block: BlockId, tier: Tier) -> None:
        pass

    def removed(self, block: BlockId, tier: Tier) -> None:
        pass

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        raise NotImplementedError

    def next_use(self, block: BlockId) -> float:
        return math.inf

    def expected(self, position: int) -> BlockId | None:
        return None

    @property
    def epoch(self) -> int:
        return 0
