"""Where blocks are, and how room is made for them: the half of the scheduler that knows extents, links and the policy.

Pure: it books what it decides at once and hands out orders; the engine carries them out and reports back. All calls come
from under the store's lock.

[Note: Progress]
Room on the device can always be made, because a dirty copy can always leave: its write-back lands in RAM, and RAM makes
room for it by dropping clean copies and writing dirty ones to NVMe straight from where they are. Nothing in RAM waits for
the device, as a demanded block takes its extent on the device before it is read into a RAM that is full. What blocks this
is only what is bounded by its nature: transfers under way, and held blocks, which `check_hold` keeps from filling RAM.

[Note: How far ahead]
Prefetching as early as the rules of Cao et al. allow keeps a window of the nearest blocks, and on a cycle fetches every block
once a period. A policy that ranks for positions (`victims_for`) says whom the fetch for a position should cost its place, and a
fetch waits for just that block: see [Note: Patience]. Of any other policy, a prefetch that costs another block its place runs only
as far ahead as it takes to keep the link busy (`AHEAD_BYTES`, at least three blocks, at most a quarter of the tier). Into
space that is free, or held by what is never needed again, it runs as far as it can.

[Note: Patience]
Each tier has a cursor: up to there, all that is expected has been seen to. The block expected at the cursor, when it is missing, is
fetched as soon as the first blocks of the policy's order can leave. While one of them is still to be used before the cursor, or is
leased by its last use, or on its way, nothing else is evicted in its place: another victim would cost a transfer, waiting costs
none. What is leased for long, or held, is passed over. So too in RAM the clean copy of a block that is leased for writing is waited
for, though what it holds is about to be of no use: the block comes back changed, and would have to push out another one for its extent.

[Note: Room for what is yet to be written]
A block without content (a gradient between two backward passes) has no extent, and the room that it left looks free. It is not:
to fetch a block into it that is used only after the gradient is there would have that block leave again, and come a second time.
So what the cursor passes that is to be written whole is promised room, until it has an extent, and a fetch for a later position
takes only what is free beside that. So it is in RAM with a changed block on the device that has no extent below, and comes down after
the use that the cursor passes. What is to stay on the device is promised nothing, and an extent that waits in RAM for such a block
serves others, unless RAM has been filled for positions behind which the block does come down.

[Note: Written back behind its load]
While a load reads an extent in RAM, nothing may be written to it. But where copies are ordered by the device, a write-back from an extent
waits for all that was done in it, and so comes behind the load that filled it. So it is ordered at once, and whoever needs the room need
not wait until the host has heard of the load. Otherwise one who writes block after block waits for each of their loads, and runs ahead of
the device by no more than the few extents that take turns. A load into an extent that the block has left meanwhile, before it was written
anew in another one, is ordered before nothing of the kind: that one must have landed. Where copies are not ordered (the device is the
CPU), a load has landed when a lease is given.

[Note: Writing behind]
What a plan has leave a tier before its next use is written back as soon as its use is over, when fewer than `AT_LEAST` orders are under
way on that link. Written when its place is needed it would keep the next block waiting; and on the device, where room that comes free
may not be needed for long, it would go on taking two extents: its own, and the one in RAM that waits for it. That is as many bytes: it is
written back once either way. What may stay is left alone, as it may be written again before it leaves. And nothing is written to the
drive unless something has left RAM since the block was used the time before: the plan leaves room for the largest blocks, and others
may all fit there.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from tierstore.catalog import BlockId
from tierstore.clock import Clock
from tierstore.errors import CapacityError
from tierstore.extents import MEMORY_TIERS, Extents
from tierstore.policies.base import Policy
from tierstore.requests import LINK_OF, Action, Order, Record
from tierstore.residency import VALID, Event, State, Tier
from tierstore.trace import Kind, Link

AHEAD_BYTES = 256 << 20
AHEAD_BLOCKS = 3
AHEAD_SHARE = 4
NEVER = 1e300
"""A position later than any expected access, though not later than "never again"."""
_RANKED = VALID | {State.LOADING}
HORIZON = 1 << 16
"""Accesses looked ahead at most: a policy that always expects something must not keep the engine busy for ever."""
SCAN = 32
"""Expected accesses looked at per call of `look_ahead`: bounds the time under the lock."""

FIRST = 8
"""Victims looked at for one that may be dropped before anything is moved."""

AT_LEAST = 2


@dataclass(frozen=True)
class Limits:
    """What may be under way at once on one link. Of large transfers `AT_LEAST` may: one that waits behind another keeps the link busy."""

    max_bytes: int = 256 << 20
    max_orders: int = 8


COPIES = Limits(4 << 30, 64)
"""Of a link to or from the device. Who queues copies there is woken late when one has landed, or has kernels to queue meanwhile: as many
are queued at once as there is room for, in the order in which they are needed."""

LIMITS = {Link.H2D: COPIES, Link.D2H: COPIES, Link.NVME_READ: Limits(), Link.NVME_WRITE: Limits()}


class Placement(Extents):
    """Room and transfers for all blocks.

    Args:
        gpu_bytes, ram_bytes: Capacities of the arenas.
        has_nvme: Whether there is a tier below RAM.
        policy: Ranks victims; not yet bound.
        seconds_per_byte: Planning rates, per link, until they were measured.
        limits: What may be in flight, per link.
        clock: Stamps orders.
    """

    def __init__(
        self,
        *,
        gpu_bytes: int,
        ram_bytes: int,
        has_nvme: bool,
        policy: Policy,
        seconds_per_byte: Mapping[Link, float],
        limits: Mapping[Link, Limits],
        clock: Clock,
    ) -> None:
        super().__init__(gpu_bytes=gpu_bytes, ram_bytes=ram_bytes, has_nvme=has_nvme, policy=policy, seconds_per_byte=seconds_per_byte)
        self.orders: list[Order] = []
        self.flying: dict[int, Order] = {}
        self.evictions = {Tier.GPU: 0, Tier.RAM: 0}
        self.ram_hits = 0
        self.ram_misses = 0
        self.compactions = 0
        self._limits = limits
        self._clock = clock
        self._flying_bytes = dict.fromkeys(Link, 0)
        self._flying_orders = dict.fromkeys(Link, 0)
        self._cursor_epoch = -1
        self.last_used = -1  # position of the last access
        self._num_orders = 0
        self._asked = 0  # orders that were given before somebody last asked for anything
        self._left_ram_at = -1  # position at which something last left RAM that is nowhere above
        self._behind: dict[Tier, dict[BlockId, None]] = {Tier.GPU: {}, Tier.RAM: {}}  # see [Note: Writing behind]

    # -- room ------------------------------------------------------------------------------------------------------------

    def room(
        self,
        tier: Tier,
        nbytes: int,
        *,
        protect: Collection[Record] = (),
        before: float | None = None,
        low: bool = False,
    ) -> int | None:
        """An extent of `nbytes` on `tier`, or None when it is not there yet (or will not be, see `idle`).

        Decides what to evict: drops clean copies at once, orders write-backs of dirty ones, moves extents together when
        enough is free but scattered.

        Args:
            tier: GPU or RAM.
            nbytes: Wanted length.
            protect: Records not to evict.
            before: For a prefetch, the position at which the block is needed: nothing needed sooner is evicted for it.
            low: Place at the low end; see `is_low`.
        """
        arena = self.arenas[tier]
        promised = self.promised_bytes[tier] if self._is_ranked_for(before) else 0
        target = nbytes + promised
        while True:
            offset = arena.allocate(nbytes, low=low) if arena.free_bytes >= target or not promised else None
            if offset is not None:
                return offset
            if any(order.action is Action.COMPACT and order.tier is tier and order.hole >= 0 for order in self.flying.values()):
                return None  # its hole is counted as taken until the bytes have moved: evict nothing for what is coming
            coming, acted = self._evict(tier, target, protect, before)
            if acted:
                continue
            if coming:
                return None
            if arena.free_bytes >= nbytes + promised:
                leaves = self._have_leave(tier, nbytes, protect, before)
                if leaves is State.ABSENT:
                    continue
                if leaves is not None:
                    return None
                if self._compact(tier, nbytes, nearby=True):
                    return None
                target = arena.free_bytes + 1  # scattered over many extents, or between what cannot move: evict more
                coming, acted = self._evict(tier, target, protect, before)
                if acted:
                    continue
                if not coming:
                    self._compact(tier, nbytes)
            return None

    def _have_leave(self, tier: Tier, nbytes: int, protect: Collection[Record], before: float | None) -> State | None:
        """Have a copy leave that a plan has leave anyway, before anything is moved: a whole extent comes free, and nothing is lost.

        Returns:
            ABSENT: one was dropped. SAVING: a prefetch can wait for one that is as large as what is wanted. None: neither.
        """
        if before is not None and self._is_ranked_for(before):
            victims = self.policy.victims_for(tier, int(before))
        else:
            victims = self.policy.victims(tier)
        seen_to = max(self._cursor[tier], before or 0.0)
        found: State | None = None
        for number in itertools.islice(victims, FIRST):
            record = self.records.get(number)
            if record is None or record.leased or record in protect or not self._evictable(record, tier):
                continue
            if not self.policy.next_use(record.id) > seen_to or self._stays(record, tier) is not False:
                continue
            if tier is Tier.RAM and record.gpu.state is not State.ABSENT:
                continue  # what the device has too is not dropped here, so nothing would come free
            copy = record.copy(tier)
            if copy.state is State.CLEAN and copy.settled:
                self._let_go(tier, [record], (), ())
                return State.ABSENT
            if found is None and before is not None and record.nbytes >= nbytes:
                if copy.state is State.DIRTY and record.save_error is None:
                    self.save(record, tier, Kind.WRITE_BACK, protect=protect)
                if copy.state is State.SAVING:
                    found = State.SAVING
        return found

    def _is_ranked_for(self, before: float | None) -> bool:
        """Whether room is made for a prefetch at a position that the policy ranks victims for."""
        return before is not None and 0 <= before < NEVER and self.policy.ranks_ahead

    def _evict(self, tier: Tier, target: int, protect: Collection[Record], before: float | None) -> tuple[bool, bool]:
        """Start evictions until `target` bytes are free or coming. Returns (something is on its way, something was dropped)."""
        if before is not None and self._is_ranked_for(before):
            return self._evict_ahead(tier, target, protect, int(before))
        arena = self.arenas[tier]
        drops = self._unneeded(tier, target - arena.free_bytes, protect)
        missing = target - arena.free_bytes - sum(record.nbytes for record in drops)
        saves: list[Record] = []
        changing: list[Record] = []
        coming = False
        too_soon = 0
        if missing > 0:
            for record in self._ranked(tier):
                copy = record.copy(tier)
                if not self._evictable(record, tier) or self._needed(record, tier, protect):
                    continue
                if before is not None and self.policy.next_use(record.id) <= before:
                    too_soon += 1
                    if too_soon == SCAN:
                        break
                    continue
                if copy.state is State.SAVING or copy.readers:
                    coming = True
                elif copy.state is State.CLEAN:
                    if tier is Tier.RAM and record.writer is not None:
                        changing.append(record)
                        continue
                    drops.append(record)
                elif copy.state is State.DIRTY and record.save_error is None:
                    saves.append(record)
                else:
                    continue
                missing -= record.nbytes
                if missing <= 0:
                    break
        if missing > 0 and tier is Tier.RAM and before is None and self.has_nvme:
            for record in (*changing, *self._stale.values()):  # those will want it again, to be written back to
                if record.ram.settled and record not in drops and not self._needed(record, tier, protect):
                    drops.append(record)
                    missing -= record.nbytes
                    if missing <= 0:
                        break
        if missing > 0:
            drops.clear()  # all of it would not do: keep what somebody may want until more can leave
        return self._let_go(tier, drops, saves, protect if before is not None else ()) | coming, bool(drops)

    def _let_go(self, tier: Tier, drops: Collection[Record], saves: Collection[Record], protect: Collection[Record]) -> bool:
        """Drop clean copies and order dirty ones written back. Returns whether room is on its way."""
        coming = False
        if tier is Tier.RAM and (saves or any(record.ram.state is State.CLEAN and not record.gpu.valid for record in drops)):
            self._left_ram_at = self.last_used
        for record in drops:
            self.drop(record, tier)
            self.evictions[tier] += 1
        for record in saves:
            if self.save(record, tier, Kind.WRITE_BACK, protect=protect):
                coming = True
            elif self.flying:
                coming = True  # the link below is full: its next completion comes back here
        return coming

    def _evict_ahead(self, tier: Tier, target: int, protect: Collection[Record], position: int) -> tuple[bool, bool]:
        """As `_evict`, for a prefetch and a policy that ranks for positions. See [Note: Patience]."""
        missing = target - self.arenas[tier].free_bytes
        drops = self._unneeded(tier, missing, protect)
        missing -= sum(record.nbytes for record in drops)
        saves: list[Record] = []
        coming = False
        seen: set[BlockId] = set()
        for number in itertools.islice(self.policy.victims_for(tier, position), 2 * len(self._at[tier])):
            if missing <= 0:
                break
            record = self.records.get(number)
            if record is None or number in seen or record.copy(tier).state not in _RANKED or record.locked or record.hold is tier:
                continue
            seen.add(number)
            copy = record.copy(tier)
            if copy.moving or copy.state is State.LOADING or self.policy.next_use(record.id) <= position:
                break
            if (tier is Tier.GPU and record.leased) or self._needed(record, tier, protect):
                if self._just_used(record, protect):
                    break
                continue
            if tier is Tier.RAM and not self.backed(record):
                continue
            if tier is Tier.RAM and record.writer is not None:
                break  # it comes back, changed, and wants its extent again
            if copy.state is State.SAVING or copy.readers:
                coming = True
            elif copy.state is State.CLEAN:
                drops.append(record)
            elif record.save_error is None:
                saves.append(record)
            else:
                continue
            missing -= record.nbytes
        if missing > 0:
            return False, False
        return self._let_go(tier, drops, saves, protect) | coming, bool(drops)

    def _unneeded(self, tier: Tier, missing: int, protect: Collection[Record]) -> list[Record]:
        """Stale extents in RAM of blocks that are to stay on the device: nothing will be written back to them soon."""
        found: list[Record] = []
        if tier is Tier.RAM and self.has_nvme:
            for record in itertools.islice(self._stale.values(), SCAN):
                if missing <= 0:
                    break
                if not record.ram.settled or record in protect or not record.gpu.valid or not self._stays(record, Tier.GPU):
                    continue
                if not self._comes_down(record, self.policy.next_use(record.id)):
                    found.append(record)
                    missing -= record.nbytes
        return found

    def _comes_down(self, record: Record, position: float) -> bool:
        """Whether RAM, as it is filled by now, has to take the block after its use at `position`."""
        cursor = self._cursor[Tier.RAM]
        return 0 <= position < cursor and self.policy.stays(record.id, Tier.GPU, int(position), cursor) is False

    def _is_to_come(self, record: Record, position: int) -> bool:
        """Whether RAM has no extent of a block that comes down behind its expected use at `position`.

        See [Note: Room for what is yet to be written].
        """
        if not self.has_nvme or record.ram.state is not State.ABSENT:
            return False
        whole = record.blank or self.written_whole_next(record)
        if not (whole or record.gpu.state is State.DIRTY) or self.used_up(self.policy.repeats(position) or -1):
            return False
        if whole and self.policy.next_use(record.id) == position:
            return True
        return self.policy.stays(record.id, Tier.GPU, position) is False

    def _just_used(self, record: Record, protect: Collection[Record]) -> bool:
        """Whether what keeps the block may be over as soon as the last few accesses are."""
        return record.used_at >= self.last_used - len(self.leased) - len(protect)

    @staticmethod
    def _needed(record: Record, tier: Tier, protect: Collection[Record]) -> bool:
        """Whether a more urgent request needs this copy: what is on the device already needs none in RAM."""
        return record in protect and not (tier is Tier.RAM and record.gpu.valid)

    def _ranked(self, tier: Tier) -> Iterator[Record]:
        """What is resident, in the policy's order, each once; and behind that whatever the policy left out.

        A policy that forgets, repeats or invents blocks makes the store slow, never wrong, and never stuck.
        """
        at = self._at[tier]
        seen: set[BlockId] = set()
        for number in itertools.islice(self.policy.victims(tier), 2 * len(at)):
            record = self.records.get(number)
            if record is not None and number not in seen and record.copy(tier).state in _RANKED:
                seen.add(number)
                yield record
        for record in list(at.values()):
            if record.id not in seen and record.copy(tier).state in _RANKED:
                yield record

    def _evictable(self, record: Record, tier: Tier) -> bool:
        copy = record.copy(tier)
        if record.locked or record.hold is tier or copy.moving or copy.state is State.LOADING:
            return False
        if tier is Tier.GPU:
            return not record.leased
        return self.backed(record)

    def _compact(self, tier: Tier, nbytes: int, *, nearby: bool = False) -> bool:
        at = self._at[tier]

        def movable(offset: int) -> bool:
            record = at.get(offset)
            if record is None or record.locked or (tier is Tier.GPU and record.leased):
                return False
            return record.copy(tier).settled

        plan = self.arenas[tier].plan_compaction(nbytes, movable, nearby=nearby)
        if plan is None:
            return False
        moved = [(at.pop(move.source), move) for move in plan.moves]
        for record, move in moved:
            at[move.target] = record
            copy = record.copy(tier)
            copy.offset, copy.moving = move.target, True
            if tier is Tier.GPU:
                self.left_device.append(record.id)
        self.arenas[tier].apply(plan)
        self.compactions += 1
        self._order(
            Action.COMPACT,
            Kind.DEMAND,
            sum(move.nbytes for move in plan.moves),
            tier=tier,
            moves=tuple((record, move.source, move.target) for record, move in moved),
            hole=plan.hole,
        )
        return True

    # -- transfers -------------------------------------------------------------------------------------------------------

    def bring(self, record: Record, kind: Kind, *, protect: Collection[Record] = (), before: float | None = None) -> bool:
        """Do what can be done now to get the block onto the device. False: room is missing there."""
        gpu = record.gpu
        if gpu.valid or gpu.state is State.LOADING:
            return True
        if kind is Kind.PREFETCH and not record.ram.valid:
            return self.fetch(record, kind, protect=protect, before=before)
        if gpu.state is State.ABSENT:
            if kind is Kind.PREFETCH and not self.link_free(Link.H2D):
                return False
            # what a prefetch evicts must not in turn push out what is to be prefetched; a demand holds its extent by then
            kept = {record, *protect} if kind is Kind.PREFETCH else protect
            offset = self.room(Tier.GPU, record.nbytes, protect=kept, before=before, low=self.is_low(record, Tier.GPU))
            if offset is not None and kind is Kind.PREFETCH and record.ram.moving:
                self.arenas[Tier.GPU].release(offset)  # making room has moved the source; expectations may be others once it has arrived
            elif offset is not None:
                self.reserve(record, Tier.GPU, offset)
        if record.ram.valid:
            # who demands a copy into an extent that is his need not wait for others to land: it comes behind them
            if gpu.state is State.RESERVED and not record.ram.moving and (kind is Kind.DEMAND or self.link_free(Link.H2D)):
                self._load(record, kind)
        else:
            self.fetch(record, kind, protect=protect, before=before)
        return gpu.state is not State.ABSENT

    def make_room(self, record: Record, *, protect: Collection[Record] = ()) -> bool:
        """Reserve an extent on the device for a block that is not loaded, as its content does not matter. False: not yet."""
        if record.gpu.state is State.ABSENT:
            offset = self.room(Tier.GPU, record.nbytes, protect=protect, low=self.is_low(record, Tier.GPU))
            if offset is None:
                return False
            self.reserve(record, Tier.GPU, offset)
        return True

    def _load(self, record: Record, kind: Kind) -> None:
        self.start_load(record, Tier.GPU)
        record.ram.readers += 1
        if not record.read_for_load:
            self.ram_hits += 1
        record.read_for_load = False
        self.arrived(record, Tier.RAM)
        self.policy.touched(record.id, Tier.RAM)
        record.loads.add(self._num_orders)
        self._order(Action.H2D, kind, record.nbytes, record=record)

    def fetch(self, record: Record, kind: Kind, *, protect: Collection[Record] = (), before: float | None = None) -> bool:
        """Order the block from NVMe into RAM, if it is not there. False: room or a place on the link is missing."""
        ram = record.ram
        if ram.valid or ram.loading:
            return True
        if record.gpu.valid and record.nvme_version != record.version:
            return self.save(record, Tier.GPU, kind)
        if not ram.settled or record.nvme_writing or not self.link_free(Link.NVME_READ):
            return False
        if ram.state is State.ABSENT:
            offset = self.room(Tier.RAM, record.nbytes, protect=protect, before=before, low=self.is_low(record, Tier.RAM))
            if offset is None:
                return False
            self.reserve(record, Tier.RAM, offset)
        if record.nvme_version != record.version:
            raise AssertionError(f"no tier holds version {record.version} of block {record.block.name!r}")
        self.start_load(record, Tier.RAM)
        record.read_for_load = True
        self.ram_misses += 1
        self._order(Action.READ, kind, record.nbytes, record=record)
        return True

    def save(self, record: Record, tier: Tier, kind: Kind, *, protect: Collection[Record] = ()) -> bool:
        """Order the copy on `tier` written to the tier below. False: room or a place on the link is missing."""
        if tier is Tier.RAM:
            return self._save_ram(record, kind)
        ram = record.ram
        if not self.link_free(Link.D2H) or not (ram.settled or self._only_loaded_from(record)) or record.gpu.moving:
            return False
        if record.gpu.state is State.CLEAN:
            return True
        if ram.state is State.ABSENT:
            offset = self.room(Tier.RAM, record.nbytes, protect=protect, low=self.is_low(record, Tier.RAM))
            if offset is None:
                return False
            self.reserve(record, Tier.RAM, offset)
        self.start_load(record, Tier.RAM)
        record.gpu.apply(Event.SAVE)
        record.gpu.readers += 1
        self._order(Action.D2H, kind, record.nbytes, record=record)
        return True

    @staticmethod
    def _only_loaded_from(record: Record) -> bool:
        """Whether nothing reads an extent in RAM that is out of date but loads into the extent that the block has on the device.

        See [Note: Written back behind its load].
        """
        ram = record.ram
        return ram.state is State.STALE and ram.readers == len(record.loads) and not ram.moving

    def _save_ram(self, record: Record, kind: Kind) -> bool:
        ram = record.ram
        if record.nvme_writing or ram.moving or not self.link_free(Link.NVME_WRITE):
            return False
        ram.apply(Event.SAVE)
        ram.readers += 1
        record.nvme_writing = True
        self._order(Action.WRITE, kind, record.nbytes, record=record)
        return True

    # -- behind a use ----------------------------------------------------------------------------------------------------

    def over(self, record: Record, tier: Tier) -> None:
        """A copy's use is over for now: on the device nobody leases it any more, in RAM it has come back. See [Note: Writing behind]."""
        if self._leaves(record, tier):
            self._behind[tier][record.id] = None
        elif record.id in self.promised[Tier.RAM] and self.policy.stays(record.id, Tier.GPU, record.used_at, self._cursor[Tier.RAM]):
            self.take_back(record, Tier.RAM)  # another plan has it stay

    def write_behind(self, protect: Collection[Record]) -> None:
        """Order written back what is to leave anyway, as long as the links have nothing better to do.

        Args:
            protect: Records that somebody waits for.
        """
        for tier, link in ((Tier.GPU, Link.D2H), (Tier.RAM, Link.NVME_WRITE)):
            behind = self._behind[tier]
            for number in list(itertools.islice(behind, SCAN)):
                if self._flying_orders[link] >= AT_LEAST:
                    break
                record = self.records.get(number)
                if record is not None and record not in protect and not self._write_behind(record, tier):
                    break
                del behind[number]

    def _write_behind(self, record: Record, tier: Tier) -> bool:
        """Order a copy written back, if it is to leave. False: neither it nor one that was used later, for now."""
        if not self._leaves(record, tier):
            return True
        waits = self.policy.next_use(record.id) - record.used_at
        if waits <= 0:
            return False  # the policy has not been told of the use
        if self.written_whole_next(record) or (tier is Tier.RAM and self._left_ram_at < record.used_at - waits):
            return True
        if tier is Tier.GPU and record.ram.state is State.ABSENT and self.arenas[Tier.RAM].free_bytes < record.nbytes:
            return True  # nothing is to make room for it
        return self.save(record, tier, Kind.WRITE_BACK)

    def _leaves(self, record: Record, tier: Tier) -> bool:
        """Whether a dirty copy that nobody uses is to leave the tier before the block's next use, by a plan."""
        copy = record.copy(tier)
        if copy.state is not State.DIRTY or record.leased or record.locked or record.hold is tier or record.save_error is not None:
            return False
        return self._stays(record, Tier.GPU) is False and (tier is Tier.GPU or self._stays(record, Tier.RAM) is False)

    def _stays(self, record: Record, tier: Tier) -> bool | None:
        """Whether the block is to stay on the tier until its next use; None when the policy cannot say."""
        return self.policy.stays(record.id, tier, record.used_at)

    def give_home(self, record: Record, *, protect: Collection[Record] = ()) -> bool:
        """Do what can be done now to give an adopted block its home in RAM, without NVMe. Returns whether it has one.

        Args:
            record: The block; what it holds on the device or in RAM stays.
            protect: Records not to evict, `record` among them.
        """
        if self.has_nvme or not self.backed(record):
            return True
        if record.ram.state is State.ABSENT and record.gpu.state is State.CLEAN and not record.gpu.moving and not record.locked:
            offset = self.room(Tier.RAM, record.nbytes, protect=protect, low=self.is_low(record, Tier.RAM))
            if offset is None:
                return False
            if record.gpu.state is not State.CLEAN or record.gpu.moving:
                self.arenas[Tier.RAM].release(offset)
                return False
            self.reserve(record, Tier.RAM, offset)
        elif not record.ram.valid or record.ram.moving:
            return False
        self.settle(record)
        return True

    def save_down(self, record: Record, kind: Kind) -> bool:
        """One step of the newest copy towards the lowest tier. False: the link or the room for it is taken."""
        if record.locked:
            return True
        if record.gpu.state is State.DIRTY:
            return record.writer is not None or self.save(record, Tier.GPU, kind)
        if self.has_nvme and record.ram.state is State.DIRTY and not record.nvme_writing:
            return self.save(record, Tier.RAM, kind)
        return True

    def link_free(self, link: Link) -> bool:
        limits = self._limits[link]
        orders = self._flying_orders[link]
        return orders == 0 or (orders < limits.max_orders and (orders < AT_LEAST or self._flying_bytes[link] < limits.max_bytes))

    def _order(self, action: Action, kind: Kind, nbytes: int, *, record: Record | None = None, **details: object) -> None:
        order = Order(self._num_orders, action, kind, nbytes, self._clock.now_ns(), record, **details)  # type: ignore[arg-type]
        self._num_orders += 1
        if record is not None:
            order.offset_gpu, order.offset_ram, order.version = record.gpu.offset, record.ram.offset, record.version
            link = LINK_OF[action]
            self._flying_bytes[link] += nbytes
            self._flying_orders[link] += 1
        self.flying[order.number] = order
        self.orders.append(order)

    # -- the engine's reports --------------------------------------------------------------------------------------------

    def ordered(self, order: Order) -> None:
        """Device work that follows will see the order done. Called once, before or together with `done`."""
        record = order.record
        if order.action is Action.H2D:
            assert record is not None
            record.gpu.apply(Event.LOADED)
        elif order.action is Action.D2H:
            assert record is not None
            record.gpu.readers -= 1
            if record.gpu.state is State.SAVING:
                record.gpu.apply(Event.SAVED)
        elif order.tier is Tier.GPU:
            self._settle_moves(order)

    def done(self, order: Order) -> None:
        """The bytes have landed, and the host may reuse the source."""
        self._landed(order)
        record = order.record
        if order.action is Action.H2D:
            assert record is not None
            record.ram.readers -= 1
            record.loads.discard(order.number)
        elif order.action is Action.D2H:
            assert record is not None
            if order.version != record.version:
                self._outdated(record)
            else:
                record.ram.apply(Event.CREATED if self.has_nvme and record.nvme_version != record.version else Event.LOADED)
                self.over(record, Tier.RAM)
        elif order.action is Action.READ:
            assert record is not None
            if order.version != record.version:  # it was read to be held in RAM, and written on the device meanwhile
                self._outdated(record)
            else:
                record.ram.apply(Event.LOADED)
        elif order.action is Action.WRITE:
            assert record is not None
            record.ram.readers -= 1
            record.nvme_writing = False
            record.nvme_version = order.version
            if order.version == record.version and record.ram.state is State.SAVING:
                record.ram.apply(Event.SAVED)
        elif order.tier is Tier.RAM:
            self._settle_moves(order)
        if record is not None:
            self.clear_blank(record)

    def failed(self, order: Order, error: BaseException, *, hung: bool = False) -> None:
        """The order was not carried out; the newest copy is where it was. `ordered` was not called.

        Args:
            order, error: What and why.
            hung: It was given up, and may still do what it was to do. The extent it fills is `quarantined`.
        """
        record = order.record
        if record is None:
            raise error  # a move stopped half-way: which bytes are where is not known any more, and none may be served
        self._landed(order)
        if order.action in (Action.H2D, Action.READ):
            tier = Tier.GPU if order.action is Action.H2D else Tier.RAM
            if order.action is Action.H2D:
                record.ram.readers -= 1
                record.loads.discard(order.number)
            if hung or order.number >= record.asked:
                record.load_error = error
            if hung and order.action is Action.READ:
                self.quarantine(record)
            self._load_failed(record, tier)
        elif order.action is Action.D2H:
            record.gpu.readers -= 1
            self._save_failed(order, record, error, hung)
            if record.gpu.state is State.SAVING:
                record.gpu.apply(Event.SAVE_FAILED)
            self._load_failed(record, Tier.RAM)
        else:
            record.ram.readers -= 1
            record.nvme_writing = False
            self._save_failed(order, record, error, hung)
            if record.ram.state is State.SAVING:
                record.ram.apply(Event.SAVE_FAILED)
        self.clear_blank(record)

    def _outdated(self, record: Record) -> None:
        record.ram.apply(Event.OUTDATED)
        self.policy.removed(record.id, Tier.RAM)
        self.arrived(record, Tier.RAM)
        self._stale[record.id] = record

    def _save_failed(self, order: Order, record: Record, error: BaseException, hung: bool) -> None:
        if (hung or order.number >= self._asked) and not record.blank:
            record.save_error = error
            self.save_failed[record.id] = record

    def forgive(self, records: Collection[Record]) -> None:
        """Somebody asks for these: what failed may be tried again. So may what is under way by now and fails, but for what hangs:
        that has been waited for long enough.
        """
        for record in self.save_failed.values():
            record.save_error = None
        self.save_failed.clear()
        self._asked = self._num_orders
        for record in records:
            record.load_error = None
            record.asked = self._num_orders

    def _load_failed(self, record: Record, tier: Tier) -> None:
        copy = record.copy(tier)
        copy.apply(Event.LOAD_FAILED)
        self.policy.removed(record.id, tier)
        self.arrived(record, tier)
        if tier is Tier.RAM and not self.backed(record):
            # without NVMe the RAM extent is the block's home: it stays for the next write-back
            copy.apply(Event.LOAD)
            copy.apply(Event.OUTDATED)
            self._stale[record.id] = record
        else:
            self.drop(record, tier)

    def _landed(self, order: Order) -> None:
        del self.flying[order.number]
        if order.record is not None:
            link = LINK_OF[order.action]
            self._flying_bytes[link] -= order.nbytes
            self._flying_orders[link] -= 1

    def _settle_moves(self, order: Order) -> None:
        if order.hole < 0 or order.tier is None:
            return
        for record, _, _ in order.moves:
            record.copy(order.tier).moving = False
            self.clear_blank(record)
        self.arenas[order.tier].release(order.hole)
        order.hole = -1

    # -- ahead of need ---------------------------------------------------------------------------------------------------

    def look_ahead(self, now: int, protect: Collection[Record], claimed: Collection[Record] = (), *, to_device: bool = True) -> bool:
        """Order what the policy expects next.

        Args:
            now: Position of the next access.
            protect: Records not to evict.
            claimed: Records that somebody wants to himself; they are left alone.
            to_device: Also copies to the device. They are carried out in the order given, so none goes ahead of one that is demanded and
                cannot be ordered yet: its extent may come free late.

        Returns:
            Whether it stopped only to let others at the lock.
        """
        if self._cursor_epoch != self.policy.epoch:
            self._cursor_epoch = self.policy.epoch
            self._cursor = dict.fromkeys(self._cursor, now)
            for tier in MEMORY_TIERS:
                self.promised[tier].clear()
                self.promised_bytes[tier] = 0
        again = False
        for tier in MEMORY_TIERS if self.has_nvme or self.has_models else (Tier.GPU,):
            if tier is Tier.GPU and not to_device:
                continue
            position = max(self._cursor[tier], now)
            for _ in range(SCAN):
                number = self.policy.expected(position) if position - now < HORIZON else None
                if number is None:
                    break
                record = self.records.get(number)
                if record is not None and record not in claimed and not self._prefetch(record, tier, position, protect):
                    break
                position += 1
            else:
                again = True
            self._cursor[tier] = position
        return again

    def _prefetch(self, record: Record, tier: Tier, position: int, protect: Collection[Record]) -> bool:
        """Bring what is missing on `tier`; False: not now."""
        if tier is Tier.RAM and self._is_to_come(record, position):
            self.promise(record, tier, position)
        if record.gpu.valid or record.gpu.loading or record.locked or record.vacating:
            return True
        if record.blank or self.written_whole_next(record):
            if tier is Tier.GPU:
                self.promise(record, tier, position)
            return True
        if record.load_error is not None:
            return True
        if self.policy.ranks_ahead:
            before: float = position
        else:
            before = self._limit(record, tier, position)
        if tier is Tier.GPU:
            if not record.ram.valid or record.ram.moving:
                return False
            self.bring(record, Kind.PREFETCH, protect=protect, before=before)
        else:
            self.fetch(record, Kind.PREFETCH, protect=protect, before=before)
        if record.copy(tier).loading:
            self._note_ahead(record, tier)
        return record.gpu.loading if tier is Tier.GPU else record.ram.valid or record.ram.loading

    def _limit(self, record: Record, tier: Tier, position: int) -> float:
        """For a policy that cannot rank for positions: how far ahead a block may cost another its place. See [Note: How far ahead]."""
        depth = max(AHEAD_BLOCKS * record.nbytes, min(AHEAD_BYTES, self.capacity_bytes(tier) // AHEAD_SHARE))
        return position if self._ahead_bytes[tier] + record.nbytes <= depth else NEVER

    # -- what fits -------------------------------------------------------------------------------------------------------

    def check_hold(self, record: Record, tier: Tier) -> None:
        """Refuse a hold that would leave too little room for the other blocks to move through.

        Raises:
            CapacityError: `tier` cannot hold it beside what is held there.
        """
        if tier is Tier.NVME:
            return
        held = sum(other.nbytes for other in self.held.values() if other.hold is tier and other is not record) + record.nbytes
        largest = 0
        if tier is Tier.RAM and not self.has_nvme:
            if not self.backed(record):
                return  # it stays there anyhow
            held, largest = self.homes_bytes([record]) + record.nbytes, self.passing_bytes([record])
        elif tier is Tier.RAM:
            others = (other for other in self.records.values() if other is not record and other.hold is not tier)
            passing = (other.nbytes for other in others if self.backed(other))
            largest = max(passing, default=0)
        capacity = self.arenas[tier].capacity_bytes
        if held + largest > capacity:
            raise CapacityError(
                f"block {record.block.name!r} cannot be held on tier {tier.value!r}",
                need=f"{held} bytes held and {largest} for the largest other block to pass through",
                have=f"{capacity} bytes",
                remedy=f"unhold() another block or raise {tier.value}=",
                block=record.block.name,
                tier=tier.value,
            )
