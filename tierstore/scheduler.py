"""What to load, evict, move and write back next, and who may use what. Pure: no torch, no asyncio, no I/O.

The scheduler is a function of its state and of events (requests, releases, the engine's reports) to orders and resolved
requests. `advance` decides; it books every decision at once, so no order it hands out can be stale when it is carried out.

[Note: Who goes first]
Requests are served in order of arrival, except that owners who already hold leases come before those who hold none: others
wait for what they hold. A request that lacks space keeps later ones from taking any. A later request for the same block
never overtakes a conflicting earlier one, unless its owner already holds the block. When nothing is under way and nothing can
be served although every holder of leases would release them when served, the holders wait for one another: the youngest of
them fails with `DeadlockError`.

[Note: Leases of one owner]
Owners are threads, or asyncio tasks. Inside its own lease an owner may take any block again: reading inside reading, reading
or writing inside writing. Writing inside one's own read lease raises, as two owners doing so would wait for each other.

[Note: Blank blocks]
Gradients are written whole, read once and then worth nothing. To load what is to be overwritten, to write back what is used up, or to
save either for a commit would move twice the bytes for nobody. So a lease may be `fresh` in a block: it gets an extent, and no content;
and a block may be `spent` by a lease: at its end the content is dropped on every tier and the block is blank until its next fresh
lease. Where another lease of the same owner is still out, it stays; likewise when an exception leaves the lease, which then
leaves blank what was to be written whole and perhaps was not. What is blank has no version that anybody could ask for: commits pass it
by, reading it raises.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence

from tierstore.catalog import Block, BlockId
from tierstore.clock import Clock
from tierstore.errors import BlockExistsError, BlockNotFoundError, CapacityError
from tierstore.extents import MEMORY_TIERS
from tierstore.fitness import Prospect, check_fits, deadlock, lacks_room, scattered, takes_passage
from tierstore.leases import Leases, no_content
from tierstore.pace import Span
from tierstore.placement import Placement
from tierstore.requests import (
    HostAccess,
    Lease,
    Make,
    Order,
    Owner,
    Place,
    Record,
    Request,
    Save,
    Use,
    Vacate,
    alone,
    claim,
)
from tierstore.residency import State, Tier
from tierstore.trace import Kind, Trace
from tierstore.waiting import Claims, Waiting

HINT_LIFE = 256
"""Accesses for which a prefetched hint is kept from being evicted by later hints."""

_GPU = Tier.GPU
"""Python 3.11 takes 0.1 µs to find a member of an enum, and every lease asks for this one."""

BURST = 64
"""Blocks of a commit or flush looked at per call: bounds the time under the lock."""

LESSON = 16
"""Accesses a policy is told of per call, likewise: it may think about each."""

BACKLOG = 1024
"""Accesses that may wait for that. A policy that is slower still holds up those who make them."""


SAVING_COMMITS = 1
"""Commits still being saved beyond which nobody begins to write: their blocks, and what is newer, are on the drive side by side.
See `nvme.space`, [Note: The bound]."""


class Scheduler(Leases):
    """Leases, requests and their order; `placement` decides about space.

    Not thread-safe: every call comes from under the store's lock.
    """

    def __init__(self, placement: Placement, clock: Clock) -> None:
        super().__init__(placement)
        self.trace = Trace()
        self.names: dict[str, Record] = {}
        self.hits = 0
        self.misses = 0
        self.resolved: list[Request] = []
        self.waiting = Waiting()
        self._clock = clock
        self._sequence = itertools.count()
        self._ids = itertools.count()
        self._accesses: deque[tuple[BlockId, bool]] = deque()
        self._hints: dict[Record, int] = {}
        self._hinted: dict[Record, int] = {}
        self._now = 0
        self._starved = False
        self._coming_down = False  # of what is demanded, something is still on its way from the device to RAM
        self.closing = False  # nothing is fetched ahead any more
        self._favourite = -1
        self._tried: set[int] = set()
        self._locked: dict[Record, None] = {}
        self._left: dict[Record, None] = {}  # see `_unreserve`
        self._hosts = 0

    # -- asking ----------------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Record:
        try:
            record = self.names[name]
        except (KeyError, TypeError):
            near = ", ".join(itertools.islice((repr(known) for known in self.names), 5)) or "no blocks at all"
            blocks = [record.block for record in self.names.values()]
            home = next((block.name for block in blocks if any(tensor.name == name for tensor in block.tensors)), None)
            remedy = "put() it first" if home is None else f"it is a tensor of block {home!r}"
            raise BlockNotFoundError(f"no block {name!r}", have=near, remedy=remedy, block=name) from None
        return record

    def try_use(
        self,
        owner: Owner,
        records: tuple[Record, ...],
        writes: frozenset[int],
        fresh: frozenset[int] = frozenset(),
        spent: frozenset[int] = frozenset(),
    ) -> Lease | None:
        """The fast path: a lease if every block is ready and nobody waits for it; else None.

        Raises:
            LeaseError, FrozenError: The lease can never be given.
        """
        self.check_use(owner, records, writes, fresh)
        if self._stalled and owner not in self._owned:
            return None
        for record in records:
            write = record.id in writes
            if not (self._ready(record, owner, write) or self._blank_and_free(record, fresh)) or self._conflict(record, owner, write):
                return None
        if self.waiting and any(self._contended(record, owner, record.id in writes) for record in records):
            return None
        if fresh and not all(self._ready(record, owner, record.id in writes) or self._take_room(record) for record in records):
            return None  # `submit` comes next, and goes on with what was reserved
        return self._grant(owner, records, writes, fresh, spent)

    def submit(self, request: Request) -> None:
        """Queue a request; `advance` serves it.

        Raises:
            CapacityError: It can never be served.
            BlockNotFoundError: A block was deleted meanwhile.
        """
        for record in request.records:
            if record.id not in self.placement.records:
                raise self._gone(record)
        request.sequence = next(self._sequence)
        request.queued_ns = self._clock.now_ns()
        if isinstance(request, Use | Place) or (isinstance(request, Make) and request.tier is Tier.GPU):
            try:
                check_fits(self.placement, request, self._owned.get(request.owner, {}))
            except CapacityError:
                if isinstance(request, Make):
                    self.forget(request.records[0])
                elif isinstance(request, Use) and request.fresh:
                    self._unreserve(request)  # what `try_use` had begun
                raise
        self.placement.forgive(request.records if isinstance(request, Use | Place) else ())
        self._tried.clear()
        self.waiting.add(request)

    def cancel(self, request: Request) -> None:
        """Withdraw a request that was not resolved."""
        if not self.waiting.remove(request):
            return
        if isinstance(request, Save):
            self._end_save(request)
        self._unreserve(request)
        self._tried.clear()
        if isinstance(request, Make):
            self.forget(request.records[0])

    def release(self, lease: Lease) -> None:
        """End a lease; what it could write is dirty from now on."""
        self._tried.clear()
        for record in self._end_lease(lease):
            if record.hold is Tier.NVME and not record.vacating:
                self.vacate_later(record)

    def try_blank(self, record: Record) -> bool:
        """Drop a block's content now, if nobody leases or waits for it and no transfer touches it. Returns whether it is blank."""
        if record.blank:
            return True
        if self.waiting.unbegun_commits:  # the content is that of its instant
            return False
        free = not (record.leased or record.locked or record.commit_pending or record.nvme_writing)
        if not free or not (record.gpu.settled and record.ram.settled) or self.waiting.wanting(record):
            return False
        self._tried.clear()
        self.placement.make_blank(record)
        return True

    @property
    def busy(self) -> bool:
        """Somebody waits, or hints are to be followed."""
        return bool(self.waiting or self._hints)

    @property
    def num_unlearned(self) -> int:
        """Accesses the policy has not been told of."""
        return len(self._accesses)

    def hint(self, records: Iterable[Record]) -> None:
        """A caller expects to use these soon."""
        for record in records:
            record.load_error = None
            self._hints[record] = self.trace.num_accesses

    def new_record(self, block: Block) -> Record:
        """Book a name. The caller submits a `Make` next.

        Raises:
            BlockExistsError: The name is taken.
            CapacityError: The block is larger than a tier it must pass through.
        """
        self._check_new(block)
        record = Record(BlockId(next(self._ids)), block)
        record.locked = True
        self.names[block.name] = record
        self.placement.add(record)
        return record

    def _check_new(self, block: Block) -> None:
        if block.name in self.names:
            remedy = (
                "write() new values, or delete() it first; after a commit the blocks are there when the store is opened (store.committed)"
            )
            raise BlockExistsError(f"block {block.name!r} is already in the store", remedy=remedy, block=block.name)
        for tier, arena in self.placement.arenas.items():
            held = self.placement.held_bytes(tier) if tier is Tier.RAM else 0
            if block.nbytes + held > arena.capacity_bytes:
                raise CapacityError(
                    f"block {block.name!r} is larger than tier {tier.value!r}",
                    need=f"{block.nbytes} bytes",
                    have=f"{arena.capacity_bytes - held} bytes for blocks",
                    remedy=f"use smaller blocks or raise {tier.value}=",
                    block=block.name,
                    tier=tier.value,
                )

    def recover(self, block: Block) -> Record:
        """Book a block that the directory already holds."""
        record = Record(BlockId(next(self._ids)), block)
        record.born = -1
        record.nvme_version = record.version
        self.names[block.name] = record
        self.placement.add(record)
        return record

    def adopt(self, blocks: Sequence[Block]) -> list[Record]:
        """Book blocks that lie in model files: all or none.

        Raises:
            BlockExistsError: A name is taken.
            CapacityError: A block is larger than a tier it must pass through.
        """
        for block in blocks:
            self._check_new(block)
        largest = max(blocks, key=lambda block: block.nbytes, default=None)
        homes = 0 if self.placement.has_nvme else self.placement.homes_bytes()
        capacity = self.placement.arenas[Tier.RAM].capacity_bytes
        if largest is not None and largest.nbytes + homes > capacity:
            raise CapacityError(
                f"block {largest.name!r} could not pass through tier 'ram'",
                need=f"{largest.nbytes} bytes",
                have=f"{capacity - homes} bytes beside what is there for good",
                remedy="raise ram=, delete() other blocks, or name a directory with nvme=",
                block=largest.name,
                tier="ram",
            )
        records = [self.recover(block) for block in blocks]
        self.placement.has_models |= bool(records)
        for record in records:
            record.born = next(self._sequence)
        return records

    def forget(self, record: Record) -> None:
        """Remove a block on which nothing is under way."""
        if self.names.get(record.block.name) is record:
            del self.names[record.block.name]
        self._hints.pop(record, None)
        self._hinted.pop(record, None)
        self._left.pop(record, None)
        if record.id in self.placement.records:
            self.placement.remove(record)
        for request in list(self.waiting.wanting(record)):
            self._resolve(request, self._gone(record))

    @staticmethod
    def _gone(record: Record) -> BlockNotFoundError:
        name = record.block.name
        return BlockNotFoundError(
            f"block {name!r} was deleted, or its put() given up, before the call's turn", remedy="put() it again", block=name
        )

    def give_back(self, lease: Lease) -> None:
        """End a lease that came too late, or that an exception left.

        Nothing of it is used up: what that was for has not happened. Of what was to be written whole nobody knows how much was, so
        it has no content.
        """
        lease.spent = frozenset(record.id for record, version in lease.begun if record.version == version)
        self.release(lease)

    def set_hold(self, record: Record, tier: Tier | None) -> None:
        self._tried.clear()
        self.waiting.doubt()
        self.placement.hold(record, tier)

    def vacate_later(self, record: Record) -> None:
        """Empty the upper tiers of a block in the background."""
        record.vacating = True
        self.submit(Vacate(owner=("vacate", record.id), records=(record,), background=True))

    # -- deciding --------------------------------------------------------------------------------------------------------

    def advance(self) -> tuple[list[Order], bool]:
        """Serve what can be served. Returns the orders to carry out, and whether to call again soon."""
        self._learn()
        self._clear_left()
        protect = self._serve_all()
        claimed = {record for request in self.waiting.values() for record in alone(request)}
        again = self._serve_hints(protect, claimed) if not self.closing else False
        if not self._starved and not self.closing:
            again |= self.placement.look_ahead(self._now, protect, claimed, to_device=not self._coming_down)
            self.placement.write_behind(protect)
        orders, self.placement.orders = self.placement.orders, []
        return orders, again or bool(self._accesses)

    def _learn(self) -> None:
        """Tell the policy of the accesses since the last call, a lesson at a time."""
        policy = self.placement.policy
        records = self.placement.records
        behind = len(self._accesses)
        for _ in range(min(behind, max(LESSON, behind - BACKLOG))):
            number, write = self._accesses.popleft()
            self._now += 1
            policy.accessed(number, write)
            record = records.get(number)
            if record is not None:
                policy.touched(number, _GPU)
                self.placement.learned(record)

    def _serve_all(self) -> set[Record]:
        """Serve until nothing changes: what was granted or refused may let others go on. Returns as `_serve`."""
        while True:
            num_resolved = len(self.resolved)
            protect = self._serve()
            resolved = self.resolved[num_resolved:]
            if resolved and (self._at_standstill or not all(_is_granted_use(request) for request in resolved)):
                continue  # a lease by itself lets nobody else go on, but a standstill is judged on a look that changed nothing
            if not self._break_standstill():
                return protect

    def _serve(self) -> set[Record]:
        """One pass over the waiting requests. Returns the records they need, which nothing less urgent may evict."""
        protect: set[Record] = set()
        claims = Claims()
        self._starved = self._coming_down = False
        for request in self.waiting.in_order(self._owned.keys(), self._favourite):
            if request.resolved:
                continue
            if isinstance(request, Save):
                self._serve_save(request)
                continue
            owner = request.owner
            reads, writes = claim(request)
            contended = claims.contended(owner, reads, writes)
            claims.add(owner, reads, writes)
            if (contended and not self._owns(owner, contended)) or self._blocked(request, writes):
                request.cause = "lease"
                for record in request.records:
                    if record.commit_pending:
                        request.cause = "commit"
            elif error := self._failure_of(request):
                self._resolve(request, error)
            elif self._starved and self._stalled and owner not in self._owned and isinstance(request, Use):
                request.cause = "space"
            elif self._try_serve(request, protect):
                self._resolve(request, None)
            else:
                protect.update(self._needs(request))
        return protect

    def _needs(self, request: Request) -> Iterable[Record]:
        """The blocks of which a waiting request needs the copies that there are: not those that it has an extent to write anew in."""
        fresh = request.fresh if isinstance(request, Use) else frozenset()
        return (record for record in request.records if not self._waits_fresh(record, fresh)) if fresh else request.records

    def _blocked(self, request: Request, writes: frozenset[int]) -> bool:
        """Whether a lease, a host access or a commit stands against the request."""
        if isinstance(request, Make):
            return False
        overtake = request.sequence == self._favourite
        return any(self._conflict(record, request.owner, record.id in writes, overtake=overtake) for record in request.records)

    @property
    def _stalled(self) -> bool:
        """A request lacks space and only the release of leases can give it some: nobody new may take leases."""
        return self._starved and not self.placement.flying

    def _failure_of(self, request: Request) -> BaseException | None:
        """What keeps the request from ever being served: a failed transfer that it depends on."""
        for record in request.records:
            if record.load_error is not None and isinstance(request, Use | Place) and not _may_be_blank(request, record):
                return record.load_error
            if record.blank and isinstance(request, Use | Place | HostAccess) and not _may_be_blank(request, record):
                return no_content(record)
            comes_from_device = isinstance(request, Place) and request.tier is Tier.RAM and not record.ram.valid
            if record.save_error is not None and (isinstance(request, Vacate) or comes_from_device):
                return record.save_error
        return takes_passage(self.placement, request)

    def _try_serve(self, request: Request, protect: set[Record]) -> bool:
        """Serve a request without conflicts, or do what brings it nearer. A `Use` protects its own blocks too."""
        if isinstance(request, Use):
            if self._grantable(request):
                return True
            protect.update(self._needs(request))  # in place: a copy for each who waits would cost the square of their number
            settled = self._bring_all(request, protect)
            return (settled or bool(request.fresh)) and self._grantable(request)  # room may be all that was missing
        request.cause = "space"  # and no longer a lease
        record = request.records[0]
        if isinstance(request, Place):
            return self._serve_place(request, record, protect)
        if isinstance(request, Vacate):
            return self._serve_vacate(request, record)
        if isinstance(request, Make):
            return self._serve_make(request, record, protect)
        assert isinstance(request, HostAccess)
        if request.write and not request.removing and not self._give_home(record, protect | {record}):
            return False
        if request.write:
            return record.gpu.settled and record.ram.settled and not record.nvme_writing
        return self._steady(record) is not None

    def _grantable(self, request: Use) -> bool:
        """Whether every block is where the lease needs it."""
        return all(
            self._ready(record, request.owner, record.id in request.writes) or self._waits_fresh(record, request.fresh)
            for record in request.records
        )

    @staticmethod
    def _steady(record: Record) -> Tier | None:
        """Where the host reads the newest bytes best."""
        found = (tier for tier in (Tier.RAM, Tier.GPU, Tier.NVME) if tier in record.tiers)
        return next((tier for tier in found if tier is Tier.NVME or not record.copy(tier).moving), None)

    def _bring_all(self, request: Use, protect: set[Record]) -> bool:
        """Returns whether an adopted block has got its home."""
        settled = False
        nvme = request.cause == "nvme"  # who waited for the drive first did not wait for the last copy only
        space = request.cause == "space"  # likewise: the copy that the room was for is the end of that wait
        fresh_first = sorted(request.records, key=lambda record: record.id not in request.fresh) if request.fresh else request.records
        for record in fresh_first:
            gpu = record.gpu
            if record.id in request.writes and not self._has_home(record):
                settled |= self._give_home(record, protect)
                space = space or not (settled or record.ram.loading)
            if gpu.valid or gpu.loading:
                continue
            fresh = record.id in request.fresh
            nvme = nvme or not (record.ram.valid or record.coming_down or fresh)
            if self._starved and gpu.state is State.ABSENT:
                space = True
            elif fresh:
                if self.placement.make_room(record, protect=protect):
                    protect.discard(record)  # what RAM holds of it may have to make room for the others
                else:
                    self._starved = space = True
            elif not self.placement.bring(record, Kind.DEMAND, protect=protect):
                self._starved = space = True
            elif gpu.state is State.RESERVED and record.coming_down:
                self._coming_down = True
        request.cause = "nvme" if nvme else "space" if space else "copy"
        return settled

    def _give_home(self, record: Record, protect: set[Record]) -> bool:
        """Have an adopted block keep an extent in RAM before it is written, without NVMe. Returns whether it does."""
        if not self._has_home(record) and not self.placement.give_home(record, protect=protect) and not record.gpu.valid:
            self.placement.fetch(record, Kind.DEMAND, protect=protect)
        return self._has_home(record)

    def _serve_place(self, request: Place, record: Record, protect: set[Record]) -> bool:
        if request.tier is Tier.GPU:
            if record.gpu.valid:
                return True
            if not self._starved or record.gpu.state is not State.ABSENT:
                self._starved |= not self.placement.bring(record, Kind.DEMAND, protect=protect | {record})
            return False
        if record.ram.valid:
            return True
        if record.writer is None:
            self.placement.fetch(record, Kind.DEMAND, protect=protect | {record})
        return False

    def _serve_vacate(self, request: Vacate, record: Record) -> bool:
        if request.background and (record.leased or any(isinstance(other, Use) for other in self.waiting.wanting(record))):
            return True
        if record.leased or record.locked:
            return False
        placement = self.placement
        if record.gpu.state is State.DIRTY:
            placement.save(record, Tier.GPU, Kind.WRITE_BACK)
        elif record.gpu.state in (State.CLEAN, State.RESERVED) and record.gpu.settled:
            placement.drop(record, Tier.GPU)
        if placement.backed(record) and record.gpu.state is State.ABSENT:
            if record.ram.state is State.DIRTY:
                placement.save(record, Tier.RAM, Kind.WRITE_BACK)
            elif record.ram.state in (State.CLEAN, State.STALE, State.RESERVED) and record.ram.settled:
                placement.drop(record, Tier.RAM)
        return record.gpu.state is State.ABSENT and (not placement.backed(record) or record.ram.state is State.ABSENT)

    def _serve_make(self, request: Make, record: Record, protect: set[Record]) -> bool:
        tiers = [request.tier] if request.tier is not Tier.NVME else []
        if not self.placement.has_nvme and Tier.RAM not in tiers:
            tiers.append(Tier.RAM)  # without NVMe every block has its home in RAM
        for tier in tiers:
            if record.copy(tier).state is State.ABSENT:
                offset = None if tier is Tier.GPU and self._starved else self.placement.room(tier, record.nbytes, protect=protect)
                if offset is None:
                    self._starved |= tier is Tier.GPU
                    return False
                self.placement.reserve(record, tier, offset)
        return True

    # -- commit and flush ------------------------------------------------------------------------------------------------

    def _serve_save(self, request: Save) -> None:
        if not request.started:
            if request.commit and (self._locked or any(record.writer is not None for record in self.placement.leased.values())):
                request.cause = "lease"
                return
            self.waiting.begin(request)
            for record in self.placement.records.values():
                if not request.covers(record):
                    continue
                if request.commit:
                    request.versions[record] = record.version
                if not self._saved(record):
                    request.pending[record] = record.version
                    record.commit_pending += request.commit
        self._strike_off(request)
        for record in dict.fromkeys([*self._urgent(request), *itertools.islice(request.pending, BURST)]):
            if record.save_error is not None:
                self._resolve(request, record.save_error)
                return
            if not self.placement.save_down(record, Kind.WRITE_BACK):
                if self.placement.save_failed and not self.placement.flying:  # what is full of these will stay so
                    self._resolve(request, next(iter(self.placement.save_failed.values())).save_error)
                    return
                break
        if request.started and not request.pending:
            self._resolve(request, None)

    def _strike_off(self, save: Save) -> None:
        """Forget what is saved by now, or was written anew or deleted meanwhile, until something is left to do."""
        while True:
            first = dict.fromkeys([*self._urgent(save), *itertools.islice(save.pending, BURST)])
            ended = [
                record
                for record in first
                if self._saved(record) or record.version != save.pending[record] or record.id not in self.placement.records
            ]
            for record in ended:
                self.saved_for(save, record)
            if len(ended) < BURST:
                return

    def _urgent(self, save: Save) -> list[Record]:
        """What somebody waits to write, and may once it is saved."""
        if not save.commit:
            return []
        return [record for request in self.waiting.values() for record in request.records if record in save.pending]

    def saved_for(self, request: Save, record: Record) -> None:
        if request.pending.pop(record, None) is not None and request.commit:
            record.commit_pending -= 1

    def _end_save(self, request: Save) -> None:
        for record in list(request.pending):
            self.saved_for(request, record)

    def _saved(self, record: Record) -> bool:
        """Whether the newest content is on the lowest tier."""
        if self.placement.has_nvme or record.nvme_version == record.version:
            return record.nvme_version == record.version
        return record.gpu.state not in (State.DIRTY, State.SAVING) and record.ram.state is not State.LOADING

    # -- hints -----------------------------------------------------------------------------------------------------------

    def _serve_hints(self, protect: set[Record], claimed: set[Record]) -> bool:
        if not self._hints and not self._hinted:
            return False
        now = self.trace.num_accesses
        for record in [record for record, position in self._hinted.items() if now - position > HINT_LIFE]:
            del self._hinted[record]
        for record in list(itertools.islice(self._hints, BURST)):
            if (
                record.gpu.valid
                or record.gpu.loading
                or record.locked
                or record.blank
                or record.load_error is not None
                or record in claimed
            ):
                del self._hints[record]
                continue
            if self._starved or record.ram.moving:
                break
            self._hinted[record] = self._hints[record]
            guarded = protect | self._hinted.keys()
            moved = self.placement.bring(record, Kind.PREFETCH, protect=guarded, before=-1.0)  # the caller knows better than the policy
            if record.gpu.loading:
                del self._hints[record]
            elif not moved and not self.placement.flying:
                del self._hints[record]  # no room beside what was asked for before: a hint may be ignored
            elif not moved:
                break
        return (
            bool(self._hints)
            and not self.placement.flying
            and not self._starved
            and any(record.ram.valid and not record.ram.moving for record in self._hints)
        )

    # -- leases ----------------------------------------------------------------------------------------------------------

    def _ready(self, record: Record, owner: Owner, write: bool) -> bool:
        gpu = record.gpu
        if not gpu.valid or gpu.moving or record.locked:
            return False
        return not write or record.writer == owner or (gpu.readers == 0 and self._has_home(record))

    def _has_home(self, record: Record) -> bool:
        """Whether what is written on the device can leave it. See [Note: Homes] in `extents`."""
        return self.placement.has_nvme or record.nvme_version != record.version

    def _conflict(self, record: Record, owner: Owner, write: bool, *, overtake: bool = False) -> bool:
        """Whether somebody else's lease, or a commit, stands against a lease.

        Args:
            overtake: Do not wait for commits.
        """
        if record.writer is not None:
            return record.writer != owner
        if record.locked:
            return True
        if not write:
            return False
        if any(reader != owner for reader in record.readers) or record.commit_pending:
            return True
        if overtake or owner in self._writes_of:
            return False
        return self.waiting.unbegun_commits > 0 or self.waiting.saving_commits > SAVING_COMMITS

    def _contended(self, record: Record, owner: Owner, write: bool) -> bool:
        """Whether a waiting request has an earlier claim to the block."""
        return not self._owns(owner, (record.id,)) and any(
            request.owner != owner and (write or record.id in claim(request)[1]) for request in self.waiting.wanting(record)
        )

    def _grant(
        self,
        owner: Owner,
        records: tuple[Record, ...],
        writes: frozenset[int],
        fresh: frozenset[int] = frozenset(),
        spent: frozenset[int] = frozenset(),
    ) -> Lease:
        begun: list[tuple[Record, int]] = []
        for record in records:
            self._hinted.pop(record, None)
            self.placement.arrived(record, _GPU)
            if record.id in fresh and not record.gpu.valid:
                self.placement.begin_fresh(record)
                begun.append((record, record.version))
        lease = self._begin_lease(owner, records, writes)
        lease.spent, lease.begun = spent, tuple(begun)
        return lease

    def _blank_and_free(self, record: Record, fresh: frozenset[int]) -> bool:
        """Whether the fast path may look for room: nobody else waits who could have a claim to it."""
        return record.id in fresh and record.gpu.state is State.ABSENT and not record.locked and not self.waiting

    def _take_room(self, record: Record) -> bool:
        offset = self.placement.arenas[_GPU].allocate(record.nbytes, low=self.placement.is_low(record, _GPU))
        if offset is None:
            return False
        self.placement.reserve(record, _GPU, offset)
        return True

    @staticmethod
    def _waits_fresh(record: Record, fresh: frozenset[int]) -> bool:
        """Whether the block has the extent that a fresh lease writes."""
        return record.id in fresh and record.gpu.state is State.RESERVED and record.gpu.settled and not record.locked

    def note_use(
        self, records: tuple[Record, ...], writes: frozenset[int], fresh: frozenset[int] = frozenset(), mark: object = None
    ) -> Span | None:
        """Record the accesses of a lease that is being asked for, and where its blocks were found.

        Args:
            records: At least one.
            writes, fresh: As in `Use`.
            mark: See `pace`, [Note: Marks]; None: none was made.

        Returns:
            Takes the lease's other marks.
        """
        span = None if mark is None else self.placement.pace.asked(self.trace.num_accesses, len(records), mark)
        for record in records:
            if record.id in fresh:
                found = _GPU  # nothing has to be found anywhere: neither a hit nor a miss
            elif record.gpu.valid or record.gpu.loading:
                found = _GPU
                self.hits += 1
            else:
                found = Tier.RAM if record.ram.valid or record.ram.loading else Tier.NVME
                self.misses += 1
            write = record.id in writes
            record.used_at = self.placement.last_used = self.trace.num_accesses
            if record.id in fresh:
                self.placement.note_fresh(self.trace.num_accesses)
            self.trace.append(record.block.name, write, found)
            self._accesses.append((record.id, write))
        return span

    # -- the ends of requests --------------------------------------------------------------------------------------------

    def _resolve(self, request: Request, error: BaseException | None) -> None:
        self.waiting.remove(request)
        request.resolved = True
        request.error = error
        self.resolved.append(request)
        if isinstance(request, Vacate):
            request.records[0].vacating = False
        if isinstance(request, Save):
            self._end_save(request)
        self._tried.clear()
        if error is not None:
            self._unreserve(request)
            if isinstance(request, Make):
                self.forget(request.records[0])
        elif isinstance(request, Use):
            request.lease = self._grant(request.owner, request.records, request.writes, request.fresh, request.spent)
        elif isinstance(request, HostAccess) and not request.write:
            request.lease = self._grant(request.owner, request.records, frozenset())
            request.tier = self._steady(request.records[0])
            if request.tier in MEMORY_TIERS:
                request.records[0].copy(request.tier).readers += 1
            self._hosts += 1
        elif isinstance(request, HostAccess):
            request.records[0].locked = True
            self._locked[request.records[0]] = None
        elif isinstance(request, Make):
            self._hosts += 1

    def _unreserve(self, request: Request) -> None:
        """Give up the extents that wait for a request's bytes; those that cannot go now are `_left` until they can."""
        for record in request.records:
            if record.locked and not isinstance(request, Make):
                self._left[record] = None  # a `put` at work needs its extents, a `write` leaves alone what others have reserved
                continue
            for tier in self._reserved(record):
                if record.copy(tier).settled:
                    self.placement.drop(record, tier)
                else:
                    self._left[record] = None

    def _reserved(self, record: Record) -> list[Tier]:
        """Where the block has an extent that waits for its bytes, and that it need not have."""
        tiers = MEMORY_TIERS if self.placement.backed(record) else (Tier.GPU,)
        return [tier for tier in tiers if record.copy(tier).state is State.RESERVED]

    def _clear_left(self) -> None:
        """Give back what could not be when its request ended, unless somebody else waits for the block by now."""
        for record in list(self._left):
            reserved = self._reserved(record)
            if reserved and (record.locked or not all(record.copy(tier).settled for tier in reserved)):
                continue
            del self._left[record]
            if any(isinstance(request, Use | Place) for request in self.waiting.wanting(record)):
                continue  # it is theirs, and goes when they do
            for tier in reserved:
                self.placement.drop(record, tier)

    def host_read_ended(self, request: HostAccess) -> None:
        """A `read` has copied what it wanted."""
        assert request.lease is not None
        if request.tier in MEMORY_TIERS:
            request.records[0].copy(request.tier).readers -= 1
        self._hosts -= 1
        self.release(request.lease)

    def host_write_ended(self, record: Record) -> None:
        """A `write` or `delete` let go of the block."""
        record.locked = False
        del self._locked[record]

    def make_ended(self, record: Record, *, filled: bool, on_nvme: bool = False, blank: bool = False) -> None:
        """A `put` has filled its extents, or failed to; or it was to make a block without content."""
        self._hosts -= 1
        record.locked = False
        if not filled:
            self.forget(record)
            return
        record.born = next(self._sequence)
        if blank:
            self.placement.declare(record)
        if on_nvme:
            record.nvme_version = record.version

    def _break_standstill(self) -> bool:
        """Nothing is under way and requests wait: give one its turn before others, or fail one that can never be served.

        Returns whether to serve again. Each request gets one such turn until a lease, a request or a hold changes.
        """
        if not self.waiting or self.placement.flying or self._hosts or self._locked:
            return False
        if not self._at_standstill:
            return self._refuse_hopeless()
        order = self.waiting.in_order(self._owned.keys(), self._favourite)
        stuck = [request for request in order if not isinstance(request, Save)]
        lacking = next((request for request in order if lacks_room(request)), None)
        if lacking is not None and self.placement.save_failed:
            self._resolve(lacking, next(iter(self.placement.save_failed.values())).save_error)
            return True
        left = [request for request in order if not isinstance(request, Save) or request.waited]
        waiting = {request.owner for request in left}
        released = {owner for owner in self._owned if owner not in waiting}
        will_change = bool(released)
        prospect = Prospect(self.placement, set(), stuck)
        for request in stuck:
            if will_change and request.owner not in self._owned:
                continue  # somebody will release a lease: until then, nobody new overtakes
            if request.sequence not in self._tried and prospect.grantable(request):
                self._tried.add(request.sequence)
                self._favourite = request.sequence
                for other in stuck:  # what they have reserved may be all that is missing
                    self._unreserve(other)
                return True
        while True:
            prospect = Prospect(self.placement, released, left)
            helped = [request for request in left if prospect.grantable(request)]
            if not helped:
                break
            found = {request.sequence for request in helped}
            left = [request for request in left if request.sequence not in found]
            released |= {request.owner for request in helped}
        if not left and not will_change and lacking is not None:
            self._resolve(lacking, scattered(self.placement, lacking))
            return True
        if not left:
            return False
        others = self._owned.keys()
        alone_too = (request for request in left if not Prospect(self.placement, others - {request.owner}).grantable(request))
        hopeless = next(alone_too, None)
        if hopeless is not None:
            self._resolve(hopeless, scattered(self.placement, hopeless))
        else:
            victim = max(left, key=lambda request: (request.owner in self._owned, request.sequence))
            self._resolve(victim, deadlock(victim, len(left)))
        return True

    @property
    def _at_standstill(self) -> bool:
        """Nothing is under way, and of those who hold leases some wait too, or there are none: nothing may ever change by itself."""
        if not self.waiting or self.placement.flying or self._hosts or self._locked:
            return False
        return bool(self.placement.save_failed) or not self._owned or any(self.waiting.asks(owner) for owner in self._owned)

    def _refuse_hopeless(self) -> bool:
        """All who hold leases go on, and will release them: fail only what even that would not help, and look at each once.

        Returns whether one was failed.
        """
        if not self.waiting.unproven:
            return False
        prospect = Prospect(self.placement, self._owned.keys())
        for number, request in list(self.waiting.unproven.items()):
            if not prospect.grantable(request):
                self._resolve(request, scattered(self.placement, request))
                return True
            if not isinstance(request, Make):  # without NVMe, what is free in RAM decides, and changes
                del self.waiting.unproven[number]
        return False


def _may_be_blank(request: Request, record: Record) -> bool:
    """Whether the request does without the block's content, and without the transfers that would bring it."""
    return record.id in request.fresh if isinstance(request, Use) else isinstance(request, HostAccess) and request.write


def _is_granted_use(request: Request) -> bool:
    return isinstance(request, Use) and request.error is None
