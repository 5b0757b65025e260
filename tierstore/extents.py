"""Which extent belongs to which copy, and what a policy may know of it. Pure bookkeeping; `placement` decides.

[Note: Homes]
Without NVMe a block has its home in RAM: an extent that it keeps, from `put` to `delete`, so that what is dirty on the device can always
leave it. An adopted block needs none: it comes from its model file again. Before it is written for the first time it gets one
(`settle`), and no lease that writes is granted before that; from then on it is a block like any other. What still lies in its model file
passes through RAM, so beside all homes there must be room for the largest of those: who would take that room is refused.

Every change of a copy's state that takes or gives back an extent goes through here, so that arenas, records and the policy's view
of what is resident never part.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from sortedcontainers import SortedList

from tierstore.arena import Arena
from tierstore.catalog import BlockId
from tierstore.pace import Pace, Rates
from tierstore.policies.base import Policy
from tierstore.policies.guard import Guard
from tierstore.requests import Record
from tierstore.residency import Event, State, Tier
from tierstore.trace import Link

MEMORY_TIERS = (Tier.GPU, Tier.RAM)

REMEMBERED = 1 << 16
"""Positions remembered at which a block was written whole, or used up: as many as a forecast remembers accesses."""

SMALL = 2
"""A block is small when the largest is so many times its size."""


class Extents:
    """The extents of all blocks.

    Args:
        gpu_bytes, ram_bytes: Capacities of the arenas.
        has_nvme: Whether there is a tier below RAM.
        policy: Ranks victims; not yet bound.
        seconds_per_byte: Planning rates, per link, until they were measured.
    """

    def __init__(self, *, gpu_bytes: int, ram_bytes: int, has_nvme: bool, policy: Policy, seconds_per_byte: Mapping[Link, float]) -> None:
        self.records: dict[BlockId, Record] = {}
        self.leased: dict[BlockId, Record] = {}
        self.held: dict[BlockId, Record] = {}
        self._sizes: SortedList[int] = SortedList()  # of all that is not held
        self.blank_bytes = 0
        self.promised: dict[Tier, dict[BlockId, int]] = {Tier.GPU: {}, Tier.RAM: {}}  # see [Note: Room for what is yet to be written]
        self.promised_bytes = {Tier.GPU: 0, Tier.RAM: 0}
        self._whole_next: dict[BlockId, tuple[int, bool]] = {}  # what `written_whole_next` has found, and the policy's epoch then
        self._fresh_at: dict[int, None] = {}  # positions of the trace at which a block was written whole, the oldest first
        self._spent_at: dict[int, None] = {}  # and after which it had no content
        self.save_failed: dict[BlockId, Record] = {}
        self.arenas = {Tier.GPU: Arena(gpu_bytes), Tier.RAM: Arena(ram_bytes)}
        self.has_nvme = has_nvme
        self.has_models = False  # some blocks were adopted
        self.policy = Guard(policy)
        self._at: dict[Tier, dict[int, Record]] = {Tier.GPU: {}, Tier.RAM: {}}
        self._stale: dict[BlockId, Record] = {}
        self.quarantined: dict[int, int] = {}  # extents in RAM, offset to bytes; see `quarantine`
        self._cursor = {Tier.GPU: 0, Tier.RAM: 0}
        self._ahead: dict[Tier, dict[BlockId, int]] = {Tier.GPU: {}, Tier.RAM: {}}
        self._ahead_bytes = {Tier.GPU: 0, Tier.RAM: 0}
        self.left_device: list[BlockId] = []  # whose bytes on the device are not where they were, until the engine has seen it
        self.pace = Pace()
        self.rates = Rates(seconds_per_byte)
        self.policy.bind(self)

    # -- what a policy may ask (policies.base.View) ----------------------------------------------------------------------

    def nbytes(self, block: BlockId) -> int:
        record = self.records.get(block)
        return record.nbytes if record is not None else 0

    def is_dirty(self, block: BlockId, tier: Tier) -> bool:
        return self.records[block].copy(tier).state is State.DIRTY  # what is being saved has been paid for

    def is_writable(self, block: BlockId) -> bool:
        return not self.records[block].block.frozen

    def is_valid(self, block: BlockId, tier: Tier) -> bool:
        return tier in self.records[block].tiers

    def capacity_bytes(self, tier: Tier) -> int:
        return self.arenas[tier].capacity_bytes

    def is_held(self, block: BlockId, tier: Tier) -> bool:
        return block in self.held and self.held[block].hold is tier

    def held_bytes(self, tier: Tier) -> int:
        return sum(record.nbytes for record in self.held.values() if record.hold is tier)

    def load_cost(self, block: BlockId, tier: Tier) -> float:
        record = self.records[block]
        if record.blank or (tier is Tier.GPU and self.written_whole_next(record)):
            return 0.0
        if tier is Tier.RAM:
            return record.nbytes * self.seconds_per_byte(Link.NVME_READ)
        cost = record.nbytes * self.seconds_per_byte(Link.H2D)
        if self.backed(record) and record.ram.state in (State.ABSENT, State.RESERVED):
            cost += record.nbytes * self.seconds_per_byte(Link.NVME_READ)
        return cost

    def save_cost(self, block: BlockId, tier: Tier) -> float:
        return self.records[block].nbytes * self.seconds_per_byte(Link.D2H if tier is Tier.GPU else Link.NVME_WRITE)

    def wrote_whole(self, position: int) -> bool:
        return position in self._fresh_at

    def used_up(self, position: int) -> bool:
        return position in self._spent_at

    @property
    def seconds_between(self) -> float:
        return self.pace.seconds

    def measure(self, wanted: bool) -> None:
        self.pace.measuring = wanted
        self.rates.measure(wanted)

    def computed(self, position: int) -> tuple[float, float] | None:
        return self.pace.computed(position)

    def seconds_per_byte(self, link: Link) -> float:
        return self.rates.seconds_per_byte(link)

    def backed(self, record: Record) -> bool:
        """Whether the block may be without an extent in RAM: there is a tier below, or it lies in a model file. See [Note: Homes]."""
        return self.has_nvme or record.nvme_version == record.version

    def homes_bytes(self, besides: Collection[Record] = ()) -> int:
        """Bytes in RAM, without NVMe, that nothing passes through: homes, what is held there, and what hangs. See [Note: Homes].

        Args:
            besides: Blocks that do not count.
        """
        staying = (
            record.nbytes
            for record in self.records.values()
            if (record.hold is Tier.RAM or (record.ram.state is not State.ABSENT and not self.backed(record))) and record not in besides
        )
        return sum(staying) + sum(self.quarantined.values())

    def passing_bytes(self, besides: Collection[Record] = ()) -> int:
        """The largest block that passes through RAM, without NVMe, and has no place of its own there. See [Note: Homes]."""
        passing = (record for record in self.records.values() if self.backed(record) and record.hold is not Tier.RAM)
        return max((record.nbytes for record in passing if record not in besides), default=0)

    # -- blocks and their extents ----------------------------------------------------------------------------------------

    def add(self, record: Record) -> None:
        self.records[record.id] = record
        if record.hold is None:
            self._sizes.add(record.nbytes)

    def hold(self, record: Record, tier: Tier | None) -> None:
        """Note where a block is held; None: nowhere. Of one that was deleted meanwhile, nothing is noted."""
        if record.id not in self.records:
            return
        if (record.hold is None) is not (tier is None):
            if tier is None:
                self._sizes.add(record.nbytes)
            else:
                self._sizes.remove(record.nbytes)
        record.hold = tier
        if tier is None:
            self.held.pop(record.id, None)
        else:
            self.held[record.id] = record

    def is_low(self, record: Record, tier: Tier) -> bool:
        """From which end of a tier to place a block. See `arena`, [Note: Two ends]."""
        if record.hold is tier:
            return True
        return bool(self._sizes) and SMALL * record.nbytes <= self._sizes[-1]

    def remove(self, record: Record) -> None:
        """Forget a block; its copies are discarded. Nothing may be under way for it."""
        for tier in MEMORY_TIERS:
            if record.copy(tier).state is not State.ABSENT:
                self.discard(record, tier)
        self.save_failed.pop(record.id, None)
        if record.blank:
            self.blank_bytes -= record.nbytes
        for tier in MEMORY_TIERS:
            self.take_back(record, tier)
        self._whole_next.pop(record.id, None)
        self.held.pop(record.id, None)
        if record.hold is None:
            self._sizes.remove(record.nbytes)
        del self.records[record.id]

    def reserve(self, record: Record, tier: Tier, offset: int) -> None:
        copy = record.copy(tier)
        copy.apply(Event.RESERVE)
        copy.offset = offset
        self._at[tier][offset] = record
        self.take_back(record, tier)

    def start_load(self, record: Record, tier: Tier) -> None:
        """Bytes are about to arrive in the extent that `reserve` gave, or in the stale one."""
        copy = record.copy(tier)
        if copy.state is State.STALE:
            self._stale.pop(record.id, None)
        copy.apply(Event.LOAD)
        self.policy.admitted(record.id, tier)

    def drop(self, record: Record, tier: Tier, event: Event = Event.DROP) -> None:
        """Give the extent back; the bytes are elsewhere (DROP) or unwanted (DISCARD)."""
        copy = record.copy(tier)
        if copy.state is State.STALE:
            self._stale.pop(record.id, None)
        elif copy.state is not State.RESERVED:
            self.policy.removed(record.id, tier)
            self._forget_prefetched(record, tier)
        if tier is Tier.GPU:
            self.left_device.append(record.id)
            record.loads.clear()
        copy.apply(event)
        offset, copy.offset = copy.offset, -1
        del self._at[tier][offset]
        if tier is Tier.GPU or offset not in self.quarantined:
            self.arenas[tier].release(offset)

    def quarantine(self, record: Record) -> None:
        """The read into a block's extent in RAM was given up: bytes may still arrive in it, so it stays taken when dropped."""
        self.quarantined[record.ram.offset] = record.nbytes

    def end_quarantine(self, offset: int) -> None:
        """What was given up has returned."""
        del self.quarantined[offset]
        self.arenas[Tier.RAM].release(offset)

    def discard(self, record: Record, tier: Tier) -> None:
        self.drop(record, tier, Event.DISCARD)

    def supersede_ram(self, record: Record) -> None:
        """The block was written on the device: what RAM holds is out of date, its extent waits for the write-back."""
        if record.ram.valid:
            record.ram.apply(Event.SUPERSEDE)
            self.policy.removed(record.id, Tier.RAM)
            self.arrived(record, Tier.RAM)
            self._stale[record.id] = record

    def begin_fresh(self, record: Record) -> None:
        """A lease that writes all of the block begins in the extent reserved for it; what other tiers hold is out of date."""
        record.version += 1
        if record.blank:
            record.blank = False
            self.blank_bytes -= record.nbytes
        self._forget_failure(record)
        self.supersede_ram(record)
        record.gpu.apply(Event.WRITE)
        self.policy.admitted(record.id, Tier.GPU)

    def make_blank(self, record: Record) -> None:
        """Nobody wants the content of a block that nobody leases or saves. Without NVMe its home in RAM stays."""
        record.version += 1
        if not record.blank:
            record.blank = True
            self.blank_bytes += record.nbytes
        self._forget_failure(record)
        if record.gpu.state is not State.ABSENT:
            self.discard(record, Tier.GPU)
        self.supersede_ram(record)
        self._promise_again(record)
        self.clear_blank(record)

    def _forget_failure(self, record: Record) -> None:
        """What could not be saved nobody wants any more."""
        record.save_error = None
        self.save_failed.pop(record.id, None)

    def clear_blank(self, record: Record) -> None:
        """Give back what RAM still has of a block without content, once no transfer touches it any more."""
        if record.blank and self.has_nvme and record.ram.state is not State.ABSENT and record.ram.settled:
            self.discard(record, Tier.RAM)
            self._promise_again(record)

    def _promise_again(self, record: Record) -> None:
        """A block has lost its content behind the cursor, which will not come by again before the next use.

        Where the policy has not yet been told of its last use, this comes again when it has (`learned`).
        """
        next_use = self.policy.next_use(record.id)
        for tier in MEMORY_TIERS:
            self.take_back(record, tier)
            if record.used_at < next_use < self._cursor[tier]:
                self.promise(record, tier, int(next_use), self._cursor[tier])

    def note_fresh(self, position: int) -> None:
        """The access at a position of the trace wrote all of its block."""
        _remember(self._fresh_at, position)

    def note_spent(self, position: int) -> None:
        """The access at a position of the trace left its block without content."""
        _remember(self._spent_at, position)

    def written_whole_next(self, record: Record) -> bool:
        """Whether the block's next use is expected to write all of it, so that nobody wants what it holds until then."""
        if not self._fresh_at:
            return False
        epoch = self.policy.epoch
        known = self._whole_next.get(record.id)
        if known is None or known[0] != epoch:
            next_use = self.policy.next_use(record.id)
            whole = 0 <= next_use < math.inf and self.policy.repeats(int(next_use)) in self._fresh_at
            known = self._whole_next[record.id] = (epoch, whole)
        return known[1]

    def learned(self, record: Record) -> None:
        """The policy was told of an access to the block: what is expected of it is what comes behind that."""
        self._whole_next.pop(record.id, None)
        if record.blank and not self.wrote_whole(record.used_at):
            self._promise_again(record)

    def promise(self, record: Record, tier: Tier, position: int, until: float = 0.0) -> None:
        """A block is to be written whole at `position`, before what is fetched from here on is used: the tier will have to take it.

        In RAM, unless it stays on the device behind this use and those that follow before `until`.
        """
        promised = self.promised[tier]
        if record.id in promised or record.copy(tier).state is not State.ABSENT:
            return
        if tier is Tier.RAM and (not self.has_nvme or record.hold is Tier.GPU or self.policy.stays(record.id, Tier.GPU, position, until)):
            return  # it has its home there, or does not come there
        promised[record.id] = record.nbytes
        self.promised_bytes[tier] += record.nbytes

    def take_back(self, record: Record, tier: Tier) -> None:
        """It has an extent on the tier, or will not need one."""
        self.promised_bytes[tier] -= self.promised[tier].pop(record.id, 0)

    def declare(self, record: Record) -> None:
        """A block without content begins; without NVMe, in the extent in RAM that was reserved as its home."""
        record.blank = True
        self.blank_bytes += record.nbytes
        if not self.has_nvme:
            record.ram.apply(Event.LOAD)
            record.ram.apply(Event.OUTDATED)
            self._stale[record.id] = record

    def settle(self, record: Record) -> None:
        """An adopted block gets its home: the extent in RAM, reserved or clean. Without NVMe only. See [Note: Homes]."""
        record.nvme_version = -1
        if record.ram.state is State.RESERVED:
            record.ram.apply(Event.LOAD)
            record.ram.apply(Event.OUTDATED)
            self._stale[record.id] = record
            record.gpu.apply(Event.WRITE)  # for now it is the only copy

    def finish_make(self, record: Record, tier: Tier) -> None:
        """A `put` has filled the extent on `tier` that `start_load` announced."""
        lowest = tier is Tier.RAM and not self.has_nvme
        record.copy(tier).apply(Event.LOADED if lowest else Event.CREATED)
        if tier is Tier.GPU and not self.has_nvme:  # its home in RAM waits for the first write-back
            record.ram.apply(Event.LOAD)
            record.ram.apply(Event.OUTDATED)
            self._stale[record.id] = record

    def distrust_nvme(self, record: Record) -> bool:
        """What the shard holds may not be what was written: a copy in memory that is as new counts as dirty from now on.

        Where none is, or one is just being read, the shard stays the newest copy, to be checked when it is read.

        Returns:
            Whether newer or equal bytes are elsewhere.
        """
        if record.nvme_version != record.version:
            return True
        if record.ram.state is State.CLEAN:
            record.ram.apply(Event.WRITE)
        elif record.gpu.state is State.CLEAN and record.ram.state in (State.ABSENT, State.RESERVED):
            record.gpu.apply(Event.WRITE)
        else:
            return False
        record.nvme_version = -1
        return True

    def revive_ram(self, record: Record, event: Event) -> None:
        """The host wrote RAM's copy in place."""
        if record.ram.state is State.STALE:
            self._stale.pop(record.id, None)
            self.policy.admitted(record.id, Tier.RAM)
        record.ram.apply(event)

    def _forget_prefetched(self, record: Record, tier: Tier) -> None:
        """A block that left must be looked at again before its next use, unless it is to be written whole then."""
        self.arrived(record, tier)
        if record.blank:
            return
        next_use = self.policy.next_use(record.id)
        if next_use < self._cursor[tier]:
            self._cursor[tier] = int(max(0, next_use))

    def arrived(self, record: Record, tier: Tier) -> None:
        """What was fetched ahead for this tier has served, or has left unused."""
        ahead = self._ahead[tier].pop(record.id, 0)
        if ahead:
            self._ahead_bytes[tier] -= ahead

    def _note_ahead(self, record: Record, tier: Tier) -> None:
        self.arrived(record, tier)
        self._ahead[tier][record.id] = record.nbytes
        self._ahead_bytes[tier] += record.nbytes


def _remember(positions: dict[int, None], position: int) -> None:
    positions[position] = None
    if len(positions) > REMEMBERED:
        del positions[next(iter(positions))]
