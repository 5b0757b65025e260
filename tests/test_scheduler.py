"""The scheduler by itself: no threads, no bytes, every order carried out when the test says so, and contents as version numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers import Hostile, Watched, check_scheduler, describe
from tierstore.catalog import PAGE, Block, BlockId
from tierstore.clock import SimulatedClock
from tierstore.errors import CapacityError, DeadlockError, FrozenError, LeaseError, TierstoreError
from tierstore.placement import Limits, Placement
from tierstore.policies import Lookahead, Lru, Policy, Static
from tierstore.requests import Action, HostAccess, Lease, Make, Order, Owner, Place, Record, Request, Save, Use, Vacate
from tierstore.residency import Event, State, Tier
from tierstore.scheduler import Scheduler
from tierstore.trace import Kind, Link

POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": lambda _: Lru(),
    "lookahead": lambda _: Lookahead(),
    "static": lambda _: Static(),
    "hostile": Hostile,
}
OWNERS = ("one", "two", "three")
RATES = {Link.H2D: 1e-10, Link.D2H: 1e-10, Link.NVME_READ: 2e-10, Link.NVME_WRITE: 5e-10}

Content = tuple[int, int] | None
"""(block, version); None is poison."""


class Sim:
    """The engine's part, played by hand.

    Attributes:
        device_is_ordered: Orders to the device are reported twice, as on CUDA.
        contents: What lies at each offset of each arena.
        shards: Version of each block on NVMe.
        results: Requests that were resolved.
        commits: Per commit whose instant has come, what NVMe has not yet had of that instant's versions.
    """

    def __init__(
        self,
        *,
        gpu: int,
        ram: int,
        has_nvme: bool = True,
        policy: Policy | None = None,
        device_is_ordered: bool = False,
        max_orders: int = 8,
    ) -> None:
        clock = SimulatedClock()
        self.placement = Placement(
            gpu_bytes=gpu * PAGE,
            ram_bytes=ram * PAGE,
            has_nvme=has_nvme,
            policy=Watched(policy if policy is not None else Lru()),
            seconds_per_byte=RATES,
            limits=dict.fromkeys(Link, Limits(max_orders=max_orders)),
            clock=clock,
        )
        self.scheduler = Scheduler(self.placement, clock)
        self.device_is_ordered = device_is_ordered
        self.contents: dict[Tier, dict[int, Content]] = {Tier.GPU: {}, Tier.RAM: {}}
        self.shards: dict[Record, int] = {}
        self.flying: list[Order] = []
        self.ordered: set[int] = set()
        self.carried: dict[int, Content] = {}
        self.results: list[Request] = []
        self.commits: dict[Save, dict[Record, int]] = {}

    # -- the engine's loop ---------------------------------------------------------------------------------------------

    def pump(self) -> list[Request]:
        """As `Engine._look`, until it would go to sleep. Returns what was resolved."""
        found: list[Request] = []
        for _ in range(300):
            orders, again = self.scheduler.advance()
            resolved, self.scheduler.resolved = self.scheduler.resolved, []
            found += resolved
            self._capture(resolved)
            for order in orders:
                self._start(order)
            check_scheduler(self.scheduler)
            if not again and not orders:
                break
        self.results += found
        return found

    def _capture(self, resolved: list[Request]) -> None:
        """As `Engine._capture`: a commit is of the versions of one instant. Who was granted a lease right behind it does no harm."""
        granted = {record for request in resolved if isinstance(request, Use) for record in request.records}
        for request in [*self.scheduler.waiting.values(), *resolved]:
            if isinstance(request, Save) and request.commit and request.started and request not in self.commits:
                writing = {record for record in self.placement.records.values() if record.writer}
                assert writing <= granted, "a commit in the middle of a write"
                assert not any(record.blank for record in request.versions), "a commit of what has no content"
                self.commits[request] = {
                    record: version for record, version in request.versions.items() if self.shards.get(record) != version
                }

    def _start(self, order: Order) -> None:
        self.flying.append(order)
        record = order.record
        if record is not None:
            assert (order.offset_ram, order.version) == (record.ram.offset, record.version)
            if order.action is Action.H2D:
                self.contents[Tier.GPU][order.offset_gpu] = None
            elif order.action is Action.READ or (order.action is Action.D2H and not self._loads_from(order)):
                self.contents[Tier.RAM][order.offset_ram] = None
        if self.device_is_ordered and order.action in (Action.H2D, Action.D2H, Action.COMPACT) and order.tier is not Tier.RAM:
            self._report_ordered(order)

    def _report_ordered(self, order: Order) -> None:
        """The device's side of the order happens, as far as work queued later can tell."""
        record = order.record
        if order.action is Action.H2D:
            self.contents[Tier.GPU][order.offset_gpu] = self.contents[Tier.RAM][order.offset_ram]
        elif order.action is Action.D2H:
            assert record is not None
            assert record.writer is None, f"{describe(record)} is copied from under its writer"
            self.carried[order.number] = self.contents[Tier.GPU][order.offset_gpu]
        else:
            self._move(order)
        self.ordered.add(order.number)
        self.placement.ordered(order)

    def _move(self, order: Order) -> None:
        assert order.tier is not None
        contents = self.contents[order.tier]
        for _, source, target in order.moves:
            contents[target] = contents.pop(source, None)

    def _loads_from(self, order: Order) -> list[Order]:
        """Loads under way from the extent in RAM to which an order writes."""
        loads = [other for other in self.flying if other.action is Action.H2D and other.offset_ram == order.offset_ram]
        assert self.device_is_ordered or not loads, "an extent in RAM is written while it is read"
        assert all(load.record is order.record for load in loads)
        return loads

    def complete(self, order: Order) -> None:
        """The order lands."""
        if order.action is Action.D2H:  # on the device, behind the use of what was loaded
            for load in self._loads_from(order):
                self.complete(load)
        self.flying.remove(order)
        record = order.record
        if order.action in (Action.H2D, Action.D2H, Action.COMPACT) and order.number not in self.ordered and order.tier is not Tier.RAM:
            self._report_ordered(order)
        if order.action is Action.COMPACT:
            if order.tier is Tier.RAM:
                self._move(order)
        else:
            assert record is not None
            if order.action is Action.H2D:
                assert self.contents[Tier.RAM][order.offset_ram] == (record.id, order.version), "the source of a copy was overwritten"
                if any(other.action is Action.D2H and other.offset_ram == order.offset_ram for other in self.flying):
                    self.contents[Tier.RAM][order.offset_ram] = None
            elif order.action is Action.D2H:
                assert self.carried[order.number] == (record.id, order.version), "the wrong bytes were copied to RAM"
                self.contents[Tier.RAM][order.offset_ram] = self.carried.pop(order.number)
            elif order.action is Action.READ:
                self.contents[Tier.RAM][order.offset_ram] = (record.id, self.shards[record])
            else:
                assert self.contents[Tier.RAM][order.offset_ram] == (record.id, order.version), "the wrong bytes were written to NVMe"
                self.shards[record] = order.version
                for needs in self.commits.values():
                    if needs.get(record) == order.version:
                        del needs[record]
        self.placement.done(order)
        check_scheduler(self.scheduler)

    def fail(self, order: Order) -> None:
        """The order does not happen; half its bytes may have arrived."""
        assert order.number not in self.ordered
        assert order.action is not Action.COMPACT
        self.flying.remove(order)
        self.placement.failed(order, OSError(f"{order.action.value} fails as the test wants it"))
        check_scheduler(self.scheduler)

    def may_fail(self, order: Order) -> bool:
        return order.number not in self.ordered and order.action is not Action.COMPACT

    def settle(self) -> None:
        """Carry out everything, oldest first."""
        for _ in range(10_000):
            self.pump()
            if not self.flying:
                return
            self.complete(self.flying[0])
        raise AssertionError("transfers never end")

    # -- calls ---------------------------------------------------------------------------------------------------------

    def make(self, name: str, pages: int, *, tier: Tier = Tier.RAM, owner: Owner = "main", frozen: bool = False) -> Make:
        record = self.scheduler.new_record(Block(name, (), pages * PAGE, False, frozen))
        request = Make(owner, (record,), tier=tier)
        self.scheduler.submit(request)
        return request

    def made(self, request: Make, *, filled: bool = True) -> None:
        """What `operations.put` does once it has the extents."""
        record, tier = request.records[0], request.tier
        if tier is not Tier.NVME:
            self.placement.start_load(record, tier)
            self.placement.finish_make(record, tier)
            self.contents[tier][record.copy(tier).offset] = (record.id, 0)
        elif filled:
            self.shards[record] = 0
        self.scheduler.make_ended(record, filled=filled, on_nvme=tier is Tier.NVME)

    def put(self, name: str, pages: int, *, tier: Tier = Tier.RAM, frozen: bool = False) -> Record:
        """A whole `put`, with nobody else about."""
        request = self.make(name, pages, tier=tier, frozen=frozen)
        self.settle()
        assert request.resolved
        assert request.error is None
        self.made(request)
        self.settle()
        return request.records[0]

    def declare(self, name: str, pages: int) -> Record:
        """A block without content, with nobody else about."""
        request = self.make(name, pages, tier=Tier.NVME if self.placement.has_nvme else Tier.RAM)
        self.settle()
        assert request.resolved
        assert request.error is None
        self.scheduler.make_ended(request.records[0], filled=True, blank=True)
        return request.records[0]

    def ask(
        self,
        owner: Owner,
        records: tuple[Record, ...],
        writes: tuple[Record, ...] = (),
        *,
        fresh: tuple[Record, ...] = (),
        spent: tuple[Record, ...] = (),
    ) -> Use | Lease:
        """As `Engine.begin_use`."""
        numbers = frozenset(record.id for record in (*writes, *fresh, *spent))
        new, used_up = frozenset(record.id for record in fresh), frozenset(record.id for record in spent)
        lease = self.scheduler.try_use(owner, records, numbers, new, used_up)
        answer: Use | Lease
        if lease is None:
            answer = Use(owner, records, writes=numbers, fresh=new, spent=used_up)
            self.scheduler.submit(answer)
        else:
            answer = lease
        self.scheduler.note_use(records, numbers, new)
        return answer

    def leased(self, answer: Use | Lease) -> Lease:
        """What an `ask` was given, with nobody else about."""
        if isinstance(answer, Lease):
            return answer
        self.settle()
        assert answer.resolved, f"{answer} hangs"
        if answer.error is not None:
            raise answer.error
        assert answer.lease is not None
        return answer.lease

    def use(self, *records: Record, write: bool = False, fresh: bool = False, spent: bool = False, owner: Owner = "main") -> None:
        """A whole `use`, with nobody else about."""
        answer = self.ask(owner, records, records if write else (), fresh=records if fresh else (), spent=records if spent else ())
        lease = self.leased(answer)
        self.check_lease(lease)
        self.release(lease)
        self.settle()

    def release(self, lease: Lease) -> None:
        self.scheduler.release(lease)
        for record in lease.records:
            if record.id in lease.writes and not record.blank:
                self.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)

    def give_back(self, lease: Lease) -> None:
        """As `Engine.abandon` of what nobody had in hand yet."""
        self.scheduler.give_back(lease)
        for record in lease.records:
            if record.id in lease.writes and record.gpu.valid:  # they count as written
                self.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)

    def check_lease(self, lease: Lease) -> None:
        """Leased blocks have their newest bytes on the device; what was nowhere, since it is to be written whole, is written now."""
        for record in lease.records:
            assert record.gpu.valid, describe(record)
            assert not record.gpu.moving, describe(record)
            if (record, record.version) in lease.begun:
                self.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)
            assert self.contents[Tier.GPU][record.gpu.offset] == (record.id, record.version), f"{describe(record)} serves other bytes"

    def check_tiers(self) -> None:
        """Every copy that counts as newest is."""
        for record in self.placement.records.values():
            if record.locked or record.born is None:
                continue
            for tier in (Tier.GPU, Tier.RAM):
                copy = record.copy(tier)
                assert not (copy.valid and record.blank), f"{describe(record)}: {tier} has what nobody has written"
                if copy.valid and not copy.moving:
                    assert self.contents[tier].get(copy.offset) == (record.id, record.version), f"{describe(record)}: other bytes on {tier}"
            assert record.nvme_version < 0 or self.shards[record] == record.nvme_version
            assert not record.blank or record.nvme_version < record.version, f"{describe(record)}: the drive has what nobody has written"


def test_small_blocks_lie_in_a_stack_that_leaves_a_whole_extent() -> None:
    sim = Sim(gpu=12, ram=40)
    first, second = sim.put("first", 6), sim.put("second", 6)
    small = [sim.declare(f"small{number}", 1) for number in range(6)]
    sim.use(small[0], fresh=True)
    sim.use(first)
    for record in small[1:]:
        sim.use(record, fresh=True)
    assert sorted(record.gpu.offset for record in small) == [number * PAGE for number in range(6)]
    for record in reversed(small):
        sim.use(record, spent=True)
    sim.use(second)
    assert sim.placement.compactions == 0
    assert sim.placement.evictions[Tier.GPU] == 0


class Leaving(Lru):
    """Has a plan by which nothing stays."""

    def stays(self, block: BlockId, tier: Tier, position: int, until: float) -> bool:
        return False


@pytest.mark.parametrize(("policy", "moves"), [(Leaving(), 0), (Lru(), 1)])
def test_what_a_plan_has_leave_anyway_goes_before_anything_is_moved(policy: Lru, moves: int) -> None:
    sim = Sim(gpu=8, ram=40, policy=policy)
    records = [sim.put(f"b{number}", 2) for number in range(4)]
    last = sim.put("last", 3)
    for record in records:
        sim.use(record)
    for record in records[::2]:
        sim.placement.drop(record, Tier.GPU)
    sim.use(last)
    assert sim.placement.compactions == moves
    assert (records[1].gpu.state is State.ABSENT) == (moves == 0)


@pytest.mark.parametrize(("policy", "moves"), [(Leaving(), 0), (Lru(), 1)])
def test_a_prefetch_waits_for_what_a_plan_has_leave_rather_than_move_anything(policy: Lru, moves: int) -> None:
    sim = Sim(gpu=10, ram=40, policy=policy)
    records = [sim.put(f"b{number}", 3 - number % 2) for number in range(4)]
    for record in records:
        sim.use(record)
    lease = sim.leased(sim.ask("main", (records[0],), (records[0],)))
    sim.check_lease(lease)
    sim.release(lease)
    for record in records[1::2]:
        sim.placement.drop(record, Tier.GPU)
    sim.pump()
    if not moves:
        assert records[0].gpu.state is State.SAVING, "written behind its use"
    else:
        assert sim.placement.save(records[0], Tier.GPU, Kind.WRITE_BACK)
    assert records[0].gpu.state is State.SAVING
    assert sim.placement.room(Tier.GPU, 3 * PAGE, protect=records[2:3], before=6.0) is None
    assert sim.placement.compactions == moves
    sim.settle()
    if not moves:
        assert sim.placement.room(Tier.GPU, 3 * PAGE, protect=records[2:3], before=6.0) is not None


def test_what_is_written_back_for_a_prefetch_pushes_nothing_out_that_is_wanted() -> None:
    """RAM is full of what somebody waits for, or of what is to be fetched itself."""
    sim = Sim(gpu=10, ram=12, policy=Leaving())
    wanted = [sim.put(f"wanted{number}", 3, tier=Tier.NVME) for number in range(4)]
    for record in wanted:
        assert sim.placement.fetch(record, Kind.DEMAND)
        sim.settle()
    changed = [sim.declare(f"b{number}", 3 - number % 2) for number in range(4)]
    for record in changed:
        sim.use(record, fresh=True)
    for record in changed[1::2]:
        sim.use(record, spent=True)
    assert [record.gpu.state for record in changed[::2]] == [State.DIRTY] * 2
    assert [record.ram.state for record in wanted] == [State.CLEAN] * 4
    assert sim.placement.room(Tier.GPU, 3 * PAGE, protect=wanted, before=6.0) is None
    assert [record.ram.state for record in wanted] == [State.CLEAN] * 4


def test_a_prefetch_into_ram_waits_for_no_write_behind_which_nothing_leaves() -> None:
    """What the device has too does not leave RAM for it: to write it to the drive first would be for nothing."""
    sim = Sim(gpu=8, ram=10, policy=Leaving())
    records = [sim.put(f"b{number}", 3 - number % 2) for number in range(4)]
    for record in records[::2]:
        sim.use(record)
    for record in records[1::2]:
        sim.scheduler.forget(record)
    assert [(record.gpu.state, record.ram.state) for record in records[::2]] == [(State.CLEAN, State.DIRTY)] * 2
    assert sim.placement.room(Tier.RAM, 3 * PAGE, before=6.0) is None
    assert [record.ram.state for record in records[::2]] == [State.DIRTY] * 2
    assert sim.placement.compactions == 1
    sim.settle()
    assert sim.placement.room(Tier.RAM, 3 * PAGE, before=6.0) is not None


class Known(dict[BlockId, Record]):
    """Counts how often all are gone through."""

    passes = 0

    def values(self) -> Any:
        self.passes += 1
        return super().values()


def test_where_to_place_a_block_is_known_without_looking_at_all_others() -> None:
    """Blocks come and go in each step of a training, and placing one is done under the store's lock."""
    sim = Sim(gpu=12, ram=40)
    sim.placement.records = records = Known()
    large = sim.put("large", 6)
    passes, low = records.passes, []
    for number in range(8):
        small = sim.put(f"small{number}", 3)
        passes = records.passes
        low.append(sim.placement.is_low(small, Tier.GPU))
        if number == 2:
            sim.scheduler.set_hold(large, Tier.RAM)
        if number == 4:
            sim.scheduler.set_hold(large, None)
        if number == 6:
            sim.scheduler.forget(large)
        low.append(sim.placement.is_low(small, Tier.GPU))
        assert records.passes == passes
    assert low == [True] * 5 + [False] * 4 + [True] * 4 + [False] * 3


def test_a_block_deleted_while_it_was_being_held_is_held_nowhere() -> None:
    """`hold()` puts back what was before, when it fails."""
    sim = Sim(gpu=12, ram=40)
    record = sim.put("b", 6)
    sim.scheduler.set_hold(record, Tier.GPU)
    sim.scheduler.forget(record)
    sim.scheduler.set_hold(record, Tier.RAM)
    assert sim.placement.held_bytes(Tier.RAM) == 0
    sim.pump()


@dataclass(eq=False)
class Reading:
    """A `read` under way."""

    request: HostAccess
    tier: Tier
    version: int


@dataclass(eq=False)
class Actor:
    """A thread: at most one call under way."""

    name: str
    leases: list[Lease] = field(default_factory=list)
    request: Request | None = None
    work: Reading | HostAccess | Make | None = None
    deleting: bool = False
    declaring: bool = False
    gives_up: bool = False
    is_brief: bool = False
    hold_before: Tier | None = None

    @property
    def free(self) -> bool:
        return self.request is None and self.work is None


Step = tuple[str, int, int, int]
"""A call and three numbers that choose its arguments."""


class Interleaving:
    """Actors call whatever they like; orders land in any order; every invariant holds after every event."""

    def __init__(self, seed: int) -> None:
        choose = random.Random(seed)
        self.actors = {name: Actor(name) for name in OWNERS}
        self.failed = False
        self.held_ever = False
        self.count = 0
        self.gpu, self.ram = choose.randint(2, 12), choose.randint(2, 12)
        self.sim = Sim(
            gpu=self.gpu,
            ram=self.ram,
            has_nvme=choose.random() < 0.7,
            policy=POLICIES[choose.choice(sorted(POLICIES))](seed),
            device_is_ordered=choose.random() < 0.5,
            max_orders=choose.randint(1, 3),
        )
        self.may_hold = choose.random() < 0.5
        self.may_fail = choose.random() < 0.3
        self.spent = self.let_go = False
        self.empty: dict[Record, bool] = {}  # those declared, and whether they are blank as far as the actors know

    def run(self, steps: list[Step]) -> None:
        for name, *numbers in steps:
            getattr(self, name)(*numbers)
            check_scheduler(self.sim.scheduler)
            self.sim.check_tiers()
            self._check_empty()
        self.finish()

    def _check_empty(self) -> None:
        """A block has content from when somebody had a fresh lease of it until it was spent."""
        for record in self.sim.placement.records.values():
            assert record.blank == self.empty.get(record, False), describe(record)

    # -- what happens to requests ----------------------------------------------------------------------------------------

    def pump(self) -> None:
        self.let_go = False
        for request in self.sim.pump():
            if request.error is not None:
                self._refused(request)
            elif isinstance(request, Save):
                assert not self.sim.commits.get(request), f"a commit without {self.sim.commits[request]}"
            actor = next((actor for actor in self.actors.values() if actor.request is request), None)
            if actor is not None:
                actor.request = None
                self._answered(actor, request)
        if self.let_go:
            self.pump()
        self._no_standstill()

    def _answered(self, actor: Actor, request: Request) -> None:
        if request.error is not None:
            if isinstance(request, Place | Vacate):
                self._restore_hold(actor, request)
        elif isinstance(request, Use):
            assert request.lease is not None
            self._granted(actor, request.lease, request.fresh)
        elif isinstance(request, Make) or (isinstance(request, HostAccess) and request.write):
            actor.work = request
        elif isinstance(request, HostAccess):
            assert request.tier is not None
            actor.work = Reading(request, request.tier, request.records[0].version)

    def _granted(self, actor: Actor, lease: Lease, fresh: frozenset[int]) -> None:
        """An actor has a lease; or it comes too late, as `Engine.abandon` finds it."""
        if actor.gives_up:
            self.let_go = True
            begun = [record for record, _ in lease.begun]
            self.sim.give_back(lease)
            for record in begun:  # what it had before may be gone, and no garbage has taken its place
                self.empty[record] = record.blank
                assert record.blank, describe(record)
            return
        self.sim.check_lease(lease)
        for record in lease.records:
            assert record.id in fresh or not self.empty.get(record, False), f"{describe(record)} is leased without content"
            if record.id in fresh:
                self.empty[record] = False
        if actor.is_brief:
            self._let_go(lease)
            self.let_go = True
        else:
            actor.leases.append(lease)

    def _let_go(self, lease: Lease) -> None:
        self.sim.release(lease)
        for record in lease.records:
            if record.id in lease.spent and not any(record in other.records for each in self.actors.values() for other in each.leases):
                self.empty[record] = self.spent = True

    def _restore_hold(self, actor: Actor, request: Place | Vacate) -> None:
        if request.records[0].id in self.sim.placement.records:
            self.sim.scheduler.set_hold(request.records[0], actor.hold_before)

    def _refused(self, request: Request) -> None:
        error = request.error
        if isinstance(error, DeadlockError):
            assert any(actor.leases for actor in self.actors.values()), f"{request}: no deadlock without leases"
            assert any(not actor.free for actor in self.actors.values() if actor.name != request.owner), f"{request} alone is no deadlock"
        elif isinstance(error, CapacityError):
            assert self.held_ever or not self.sim.placement.has_nvme, f"{request} was refused although it fits: {error}"
        elif isinstance(error, OSError):
            assert self.failed
            if isinstance(request, Use) and all(record.id in request.fresh for record in request.records):
                assert "read" not in str(error), f"{request} fails for want of bytes that it does not want"
                assert "h2d" not in str(error), f"{request} fails for want of bytes that it does not want"
        elif isinstance(error, LeaseError):
            lacking = [record for record in request.records if self.empty.get(record, False)]
            assert "no content" in str(error), error
            assert lacking or self.spent, f"{request} was refused though there is content: {error}"
        else:
            assert isinstance(error, TierstoreError), error

    def _no_standstill(self) -> None:
        """Whoever waits waits for something that will happen."""
        scheduler = self.sim.scheduler
        if not scheduler.waiting or self.sim.flying or any(actor.work for actor in self.actors.values()):
            return
        others = [actor for actor in self.actors.values() if actor.leases and actor.free]
        assert others, f"a standstill: {list(scheduler.waiting.values())}"

    # -- calls -----------------------------------------------------------------------------------------------------------

    def _who(self, number: int) -> Actor:
        return self.actors[OWNERS[number % len(OWNERS)]]

    def _pick(self, number: int) -> Record | None:
        names = list(self.sim.scheduler.names)
        return self.sim.scheduler.names[names[number % len(names)]] if names else None

    def _submit(self, actor: Actor, request: Request) -> None:
        self.sim.scheduler.submit(request)
        actor.request = request
        self.pump()

    def put(self, who: int, pages: int, kind: int) -> None:
        actor, tier, nbytes = self._who(who), list(Tier)[kind % 3], 1 + pages % 8
        if not actor.free or (tier is Tier.NVME and not self.sim.placement.has_nvme):
            return
        self.count += 1
        actor.declaring = False
        try:
            actor.request = self.sim.make(f"block {self.count}", nbytes, tier=tier, owner=actor.name, frozen=kind % 10 == 0)
        except CapacityError:
            assert nbytes > min(self.gpu, self.ram) or self.held_ever or (actor.leases and tier is Tier.GPU)
            return
        self.pump()

    def declare(self, who: int, pages: int, _: int) -> None:
        actor, nbytes = self._who(who), 1 + pages % 4
        if not actor.free:
            return
        self.count += 1
        tier = Tier.NVME if self.sim.placement.has_nvme else Tier.RAM
        try:
            actor.request = self.sim.make(f"blank {self.count}", nbytes, tier=tier, owner=actor.name)
        except CapacityError:
            assert nbytes > min(self.gpu, self.ram) or self.held_ever
            return
        actor.declaring = True
        self.pump()
        if actor.work is not None and pages & 7:  # nothing keeps the caller, as nothing is copied
            self.end_work(who, 1, 0)

    def fill(self, who: int, picks: int, kinds: int) -> None:
        """Leases that write some blocks whole, use some up, or both; and read others. Blocks that were declared come first."""
        actor, known = self._who(who), [record for record in self.empty if record.id in self.sim.placement.records]
        if len(known) <= kinds % 3:
            self.declare(who, picks, 0)
        chosen = [known[(picks >> 4 * index) % len(known)] if known else None for index in range(1 + picks % 2)]
        chosen += [self._pick(picks >> 8)] if kinds & 1 else []
        records = tuple(dict.fromkeys(record for record in chosen if record is not None))
        if not actor.free or not records:
            return
        wants = [(record, kinds >> 1 + 2 * index & 3) for index, record in enumerate(records)]
        fresh = tuple(record for record, want in wants if (record.blank and kinds >> 7 & 3) or (want == 3 and not record.block.frozen))
        spent = tuple(record for record, want in wants if want in (1, 2) and record in self.empty)
        for record in fresh:
            self.empty.setdefault(record, False)
        actor.gives_up, actor.is_brief = kinds >> 9 == 7, kinds >> 9 in (1, 2, 3, 4)
        try:
            answer = self.sim.ask(actor.name, records, fresh=fresh, spent=spent)
        except CapacityError:
            assert sum(record.nbytes for record in records) > self.gpu * PAGE or actor.leases or self.held_ever
            return
        except LeaseError:
            writes = {*fresh, *spent}
            assert any(record.blank and record not in fresh for record in records) or any(actor.name in record.readers for record in writes)
            return
        if isinstance(answer, Lease):
            self._granted(actor, answer, frozenset(record.id for record in fresh))
        else:
            actor.request = answer
        self.pump()

    def use(self, who: int, picks: int, writes: int) -> None:
        actor = self._who(who)
        actor.gives_up = actor.is_brief = False
        chosen = [self._pick(picks >> 4 * index) for index in range(1 + picks % 3)]
        records = tuple(dict.fromkeys(record for record in chosen if record is not None))
        if not actor.free or not records:
            return
        written = tuple(record for index, record in enumerate(records) if writes >> index & 1)
        try:
            answer = self.sim.ask(actor.name, records, written)
        except CapacityError:
            assert sum(record.nbytes for record in records) > self.gpu * PAGE or actor.leases or self.held_ever
            return
        except (LeaseError, FrozenError):
            return
        if isinstance(answer, Lease):
            self._granted(actor, answer, frozenset())
        else:
            actor.request = answer
        self.pump()

    def release(self, who: int, index: int, _: int) -> None:
        actor = self._who(who)
        if actor.free and actor.leases:
            self._let_go(actor.leases.pop(index % len(actor.leases)))
            self.pump()

    def cancel(self, who: int, _: int, __: int) -> None:
        actor = self._who(who)
        if actor.request is None:
            return
        request, actor.request = actor.request, None
        actor.declaring = False
        self.sim.scheduler.cancel(request)
        if isinstance(request, Place | Vacate):
            self._restore_hold(actor, request)
        self.pump()

    def host(self, who: int, pick: int, kind: int) -> None:
        actor, record, write = self._who(who), self._pick(pick), kind % 2 == 0
        if not actor.free or record is None or record.writer == actor.name:
            return
        if write and (actor.name in record.readers or record.block.frozen):
            return
        actor.deleting = kind % 6 == 0
        self._submit(actor, HostAccess(actor.name, (record,), write=write))

    def end_work(self, who: int, kind: int, _: int) -> None:
        actor = self._who(who)
        work, actor.work = actor.work, None
        if isinstance(work, Make) and actor.declaring:
            actor.declaring = False
            self.sim.scheduler.make_ended(work.records[0], filled=kind % 4 > 0, blank=True)
            self.empty[work.records[0]] = kind % 4 > 0
        elif isinstance(work, Make):
            self.sim.made(work, filled=kind % 4 > 0)
        elif isinstance(work, Reading):
            self._end_read(work)
        elif work is not None:
            self._end_write(work.records[0], actor.deleting)
        self.pump()

    def _end_read(self, work: Reading) -> None:
        record = work.request.records[0]
        assert record.version == work.version, f"{describe(record)} was written under a read"
        if work.tier is Tier.NVME:
            assert self.sim.shards[record] == work.version
        else:
            offset = record.copy(work.tier).offset
            assert self.sim.contents[work.tier][offset] == (record.id, work.version), f"{describe(record)}: read() got other bytes"
        self.sim.scheduler.host_read_ended(work.request)

    def _end_write(self, record: Record, deleting: bool) -> None:
        """As `operations.write` and `operations.delete`."""
        sim, placement = self.sim, self.sim.placement
        if deleting:
            sim.scheduler.host_write_ended(record)
            sim.scheduler.forget(record)
            sim.shards.pop(record, None)
            self.empty.pop(record, None)
            return
        if record.blank:
            sim.scheduler.host_write_ended(record)
            return
        assert not any(record in needs for commit, needs in sim.commits.items() if not commit.resolved and record.commit_pending), (
            f"{describe(record)} is written before its commit"
        )
        record.version += 1
        if record.ram.valid and not (record.gpu.valid and record.hold is Tier.GPU):
            if record.gpu.state is not State.ABSENT:
                placement.discard(record, Tier.GPU)
            if placement.has_nvme:
                placement.revive_ram(record, Event.WRITE)
            sim.contents[Tier.RAM][record.ram.offset] = (record.id, record.version)
        elif record.gpu.valid:
            record.gpu.apply(Event.WRITE)
            placement.supersede_ram(record)
            sim.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)
        else:
            sim.shards[record] = record.nvme_version = record.version
            if record.ram.state is State.STALE and record.ram.settled:
                placement.drop(record, Tier.RAM)
        sim.scheduler.host_write_ended(record)

    def hold(self, who: int, pick: int, kind: int) -> None:
        actor, record, tier = self._who(who), self._pick(pick), list(Tier)[kind % 3]
        if not actor.free or record is None or not self.may_hold or (tier is Tier.NVME and not self.sim.placement.has_nvme):
            return
        if record.writer == actor.name or (tier is Tier.NVME and actor.name in record.readers):
            return
        try:
            self.sim.placement.check_hold(record, tier)
        except CapacityError:
            return
        self.held_ever = True
        actor.hold_before = record.hold
        self.sim.scheduler.set_hold(record, tier)
        request = Vacate(actor.name, (record,)) if tier is Tier.NVME else Place(actor.name, (record,), tier=tier)
        try:
            self._submit(actor, request)
        except CapacityError:
            self.sim.scheduler.set_hold(record, actor.hold_before)

    def unhold(self, _: int, pick: int, __: int) -> None:
        record = self._pick(pick)
        if record is not None:
            self.sim.scheduler.set_hold(record, None)
            self.pump()

    def evict(self, who: int, pick: int, _: int) -> None:
        actor, record = self._who(who), self._pick(pick)
        if not actor.free or record is None or record.hold in (Tier.GPU, Tier.RAM):
            return
        if actor.name not in record.readers and record.writer != actor.name:
            actor.hold_before = record.hold
            self._submit(actor, Vacate(actor.name, (record,)))

    def save(self, who: int, kind: int, _: int) -> None:
        actor, commit = self._who(who), kind % 2 == 0 and self.sim.placement.has_nvme
        if not actor.free or self.sim.scheduler.holds_write(actor.name):
            return
        request = Save(actor.name, (), commit=commit, waited=not commit or kind % 4 == 0)
        self.sim.scheduler.submit(request)
        if request.waited:
            actor.request = request
        self.pump()

    def prefetch(self, picks: int, count: int, _: int) -> None:
        chosen = [self._pick(picks >> 4 * index) for index in range(1 + count % 4)]
        self.sim.scheduler.hint([record for record in chosen if record is not None])
        self.pump()

    # -- transfers ---------------------------------------------------------------------------------------------------------

    def land(self, index: int, _: int, __: int) -> None:
        if self.sim.flying:
            self.sim.complete(self.sim.flying[index % len(self.sim.flying)])
            self.pump()

    def fail(self, index: int, _: int, __: int) -> None:
        able = [order for order in self.sim.flying if self.sim.may_fail(order)]
        if able and self.may_fail:
            self.failed = True
            self.sim.fail(able[index % len(able)])
            self.pump()

    def finish(self) -> None:
        """Let everybody finish: nobody may be left waiting, and every block can be used again."""
        for turn in range(2000):
            self.pump()
            busy = next((index for index, name in enumerate(OWNERS) if self.actors[name].work is not None), None)
            holder = next((index for index, name in enumerate(OWNERS) if self.actors[name].leases and self.actors[name].free), None)
            if self.sim.flying and (busy is None or turn % 20):
                self.land(0, 0, 0)
            elif busy is not None:
                self.end_work(busy, 1, 0)
            elif holder is not None:
                self.release(holder, 0, 0)
            else:
                break
        assert not self.sim.scheduler.waiting, f"left waiting: {self.sim.scheduler.waiting}"
        assert not any(actor.leases or not actor.free for actor in self.actors.values())
        check_scheduler(self.sim.scheduler)
        self.sim.check_tiers()
        for record in list(self.sim.scheduler.names.values()):
            assert record.born is not None
            if all(other is record for other in self.sim.placement.held.values()):
                self.sim.use(record, fresh=record.blank)
                assert not record.blank
        assert not self.sim.placement.blank_bytes or self.sim.placement.held


WEIGHTS = {
    "put": 10, "declare": 6, "use": 20, "fill": 24, "release": 14, "cancel": 2, "host": 6, "end_work": 10, "hold": 3, "unhold": 2,
    "evict": 4, "save": 3, "prefetch": 3, "land": 30, "fail": 3,
}  # fmt: skip


def plan(seed: int) -> list[Step]:
    """The calls of one run. Which of them are frequent differs from seed to seed, so that rare ones meet one another."""
    choose = random.Random(seed)
    often = ("declare", "fill", "land", "evict") if choose.random() < 0.3 else ()
    weights = [weight * choose.choice([1, 4] if name in often else [0.2, 1, 1, 4]) for name, weight in WEIGHTS.items()]
    names = choose.choices(list(WEIGHTS), weights=weights, k=choose.randint(10, 120))
    return [(name, choose.randrange(1 << 12), choose.randrange(1 << 12), choose.randrange(1 << 12)) for name in names]


def failure_of(seed: int, steps: list[Step]) -> str | None:
    try:
        Interleaving(seed).run(steps)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def shrink(seed: int, steps: list[Step]) -> list[Step]:
    """Leave out what the failure does not need."""
    size = len(steps) // 2
    while size:
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + size :]
            if failure_of(seed, fewer):
                steps = fewer
            else:
                start += size
        size //= 2
    return steps


FOUND: dict[str, tuple[int, list[Step]]] = {
    "prefetching kept a block busy that was to be evicted": (
        80,
        [
            ("put", 2001, 587, 2827), ("use", 1348, 987, 1735), ("end_work", 3585, 2007, 1314), ("use", 1009, 2913, 42),
            ("evict", 2403, 2047, 3268), ("use", 1313, 2580, 2375),
        ],
    ),
    "a hint and the write-back that it caused pushed one another out of RAM": (
        376,
        [
            ("put", 3714, 2252, 2680), ("put", 3980, 2135, 2547), ("put", 1720, 1418, 2197), ("end_work", 951, 510, 1888),
            ("end_work", 566, 115, 752), ("prefetch", 3645, 2219, 1326),
        ],
    ),
    "hold() and an earlier evict() undid one another for ever": (
        491,
        [("put", 1707, 2149, 2155), ("evict", 2504, 985, 1838), ("hold", 1954, 1886, 144)],
    ),
    "static asked about a deleted block": (
        5130,
        [
            ("put", 3699, 1528, 3209), ("use", 3101, 730, 2372), ("end_work", 3444, 3901, 3921), ("land", 3551, 2078, 1687),
            ("land", 3406, 3299, 3363), ("host", 4044, 2820, 3114), ("release", 512, 1656, 2497), ("use", 3472, 53, 4055),
            ("use", 2420, 3779, 3112), ("end_work", 2616, 3669, 2608), ("put", 1703, 1745, 2216), ("put", 82, 865, 1185),
            ("end_work", 119, 3554, 2196), ("prefetch", 2482, 1469, 1223),
        ],
    ),
    "a flush waited for ever behind another block's failed write-back": (
        50214,
        [
            ("put", 1060, 1430, 135), ("put", 1397, 1007, 1366), ("end_work", 3388, 3831, 2065), ("save", 1378, 3713, 590),
            ("end_work", 884, 3190, 900), ("fail", 1894, 2443, 3381),
        ],
    ),
    "so did an evict() that had waited for a lease before": (
        30679,
        [
            ("put", 620, 3179, 1668), ("put", 2064, 451, 2499), ("put", 1990, 3067, 1208), ("end_work", 3590, 342, 3243),
            ("evict", 290, 3550, 1665), ("end_work", 216, 4013, 1668), ("land", 3086, 2657, 3921), ("fail", 409, 3097, 2465),
        ],
    ),
}  # fmt: skip
"""What random runs have found, shrunk."""


@pytest.mark.parametrize("bug", FOUND)
def test_what_was_found_once_stays_mended(bug: str) -> None:
    seed, steps = FOUND[bug]
    Interleaving(seed).run(steps)


NUM_SEEDS = int(os.environ.get("TIERSTORE_SEEDS", max(1000, 20 * settings().max_examples)))


@pytest.mark.timeout(3600)
def test_any_interleaving_keeps_every_invariant() -> None:
    for seed in range(NUM_SEEDS):
        if failure_of(seed, plan(seed)):
            steps = shrink(seed, plan(seed))
            print(f"seed {seed}: Interleaving({seed}).run({steps})")
            Interleaving(seed).run(steps)


@pytest.mark.parametrize("has_nvme", [True, False])
def test_what_fits_after_moving_unleased_blocks_is_served(has_nvme: bool) -> None:
    """Fragmentation never lies: leased blocks stay where they are, and whatever packs beside them is leased too."""
    served = refused = 0
    for seed in range(max(100, 2 * settings().max_examples)):
        choose = random.Random(seed)
        gpu = choose.randint(20, 300)
        sizes = [choose.choice([113, 14, 7, 3, 1]) for _ in range(choose.randint(3, 24))]
        sizes = [size for size in sizes if size <= gpu]
        sim = Sim(gpu=gpu, ram=sum(sizes) + 113, has_nvme=has_nvme, policy=POLICIES[choose.choice(sorted(POLICIES))](seed))
        blocks = [sim.put(f"{index}", size) for index, size in enumerate(sizes)]
        leases: list[Lease] = []
        for _ in range(30):  # scatter leases over the arena
            picked = tuple(choose.sample(blocks, min(len(blocks), choose.randint(1, 3))))
            if leases and choose.random() < 0.5:
                sim.release(leases.pop(choose.randrange(len(leases))))
                sim.settle()
            try:
                answer = sim.ask("main", picked, picked if choose.random() < 0.3 and not any(r.leased for r in picked) else ())
            except CapacityError:
                refused += 1
                continue
            if isinstance(answer, Use):
                sim.settle()
                assert answer.resolved, f"seed {seed}: {answer} hangs although it fits"
                assert answer.error is None, f"seed {seed}: {answer.error}"
                assert answer.lease is not None
                answer = answer.lease
            sim.check_lease(answer)
            leases.append(answer)
            served += 1
    assert served > 100
    assert refused > 10


@pytest.mark.parametrize("has_nvme", [False, True])
def test_on_an_ordered_device_a_block_is_written_back_behind_its_load_and_makes_room(has_nvme: bool) -> None:
    """The host waited until the load had landed, though the device comes to the one only behind the other."""
    sim = Sim(gpu=2, ram=16, has_nvme=has_nvme, device_is_ordered=True)
    for record in [sim.put(f"{index}", 1) for index in range(3)]:
        answer = sim.ask("one", (record,), writes=(record,))
        assert isinstance(answer, Use)
        sim.pump()
        assert answer.lease is not None, "it waits, though nothing has to land first"
        sim.release(answer.lease)
    assert [order.action for order in sim.flying] == [Action.H2D, Action.H2D, Action.D2H, Action.H2D]
    sim.complete(sim.flying[2])
    sim.settle()


@pytest.mark.parametrize("has_nvme", [False, True])
def test_who_asks_for_a_block_on_its_way_down_waits_for_a_copy(has_nvme: bool) -> None:
    """It said that he waited for the drive, in a store without one."""
    sim = Sim(gpu=2, ram=16, has_nvme=has_nvme, device_is_ordered=True)
    record, *others = (sim.put(f"{index}", 1) for index in range(3))
    sim.use(record, write=True)
    for other in others:
        answer = sim.ask("one", (other,))
        sim.pump()
        sim.release(answer.lease if isinstance(answer, Use) else answer)
    assert record.coming_down
    answer = sim.ask("one", (record,))
    assert isinstance(answer, Use)
    sim.pump()
    assert answer.lease is None
    assert answer.cause == "copy"
    sim.settle()
    assert answer.lease is not None
    assert answer.cause == "copy"


@pytest.mark.parametrize("has_nvme", [False, True])
def test_a_block_written_anew_elsewhere_is_not_written_back_over_what_an_older_load_still_reads(has_nvme: bool) -> None:
    """Two streams: nothing orders what the second does in its extent behind a load into another one, which the first waits for."""
    sim = Sim(gpu=3, ram=16, has_nvme=has_nvme, device_is_ordered=True)
    shared, *others = (sim.put(name, 1) for name in "abcd")

    def use(owner: Owner, record: Record, *, fresh: bool = False) -> None:
        answer = sim.ask(owner, (record,), fresh=(record,) if fresh else ())
        sim.pump()
        lease = answer.lease if isinstance(answer, Use) else answer
        if lease is not None:  # what would have to wait for room shows the same
            sim.release(lease)

    use("first", shared)
    for record in others:
        use("third", record)
    assert shared.gpu.state is State.ABSENT
    use("second", shared, fresh=True)
    for record in others:
        use("third", record)
    loads = {order.offset_gpu for order in sim.flying if order.record is shared and order.action is Action.H2D}
    saves = {order.offset_gpu for order in sim.flying if order.record is shared and order.action is Action.D2H}
    assert loads, "the load has not landed, or nothing is shown"
    assert not saves
    sim.settle()


def test_what_the_drive_still_reads_is_not_written_to_behind_a_load() -> None:
    sim = Sim(gpu=1, ram=16, device_is_ordered=True)
    record, other = sim.put("a", 1), sim.put("b", 1)
    assert sim.placement.save(record, Tier.RAM, Kind.WRITE_BACK)
    answer = sim.ask("one", (record,), writes=(record,))
    assert isinstance(answer, Use)
    sim.pump()
    assert answer.lease is not None
    sim.release(answer.lease)
    waits = sim.ask("one", (other,))
    sim.pump()
    assert [order.action for order in sim.flying] == [Action.WRITE, Action.H2D]
    sim.settle()
    sim.check_lease(sim.leased(waits))


def test_bytes_read_for_ram_do_not_outlive_a_write_on_the_device() -> None:
    """A hold on RAM was given up while its read was under way, and the block was written before the read landed."""
    sim = Sim(gpu=4, ram=4)
    block = sim.put("a", 1, tier=Tier.NVME)
    sim.use(block)
    sim.placement.drop(block, Tier.RAM)
    hold = Place("main", (block,), tier=Tier.RAM)
    sim.scheduler.submit(hold)
    sim.pump()
    (read,) = sim.flying
    assert read.action is Action.READ
    sim.scheduler.cancel(hold)
    lease = sim.ask("main", (block,), (block,))
    assert isinstance(lease, Lease)
    sim.release(lease)
    sim.complete(read)
    assert block.ram.state is State.STALE
    sim.check_tiers()
    sim.use(block)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_block_that_is_being_moved_is_leased_at_its_new_place(ordered: bool) -> None:
    sim = Sim(gpu=8, ram=16, device_is_ordered=ordered)
    blocks = [sim.put(f"{index}", 2, tier=Tier.GPU) for index in range(4)]
    large = sim.put("large", 4)
    keep = sim.ask("other", (blocks[0],))
    assert isinstance(keep, Lease)
    for index in (1, 3):
        sim.scheduler.forget(blocks[index])
    wanted = sim.ask("main", (large,))
    sim.pump()
    (move,) = [order for order in sim.flying if order.action is Action.COMPACT]
    assert [record for record, _, _ in move.moves] == [blocks[2]]
    lease = sim.ask("third", (blocks[2],))
    assert isinstance(lease, Lease) == ordered, "on the device a lease is ordered behind the move; the host has to wait for it"
    sim.settle()
    if isinstance(lease, Use):
        assert lease.lease is not None
        lease = lease.lease
    sim.check_lease(lease)
    assert isinstance(wanted, Use)
    assert wanted.lease is not None
    sim.check_lease(wanted.lease)
    sim.check_lease(keep)


def test_a_commit_waits_for_no_writer_that_waits_for_it() -> None:
    """One holds a block and waits for the commit, which waits for the other's write lease, which waits for the block."""
    sim = Sim(gpu=8, ram=8)
    first, second = sim.put("first", 1), sim.put("second", 1)
    reading = sim.ask("one", (first,))
    writing = sim.ask("two", (second,), (second,))
    sim.settle()
    assert isinstance(reading, Use)
    assert isinstance(writing, Use)
    assert reading.lease is not None
    assert writing.lease is not None
    save = Save("one", (), commit=True)
    sim.scheduler.submit(save)
    sim.settle()
    assert not save.resolved
    blocked = sim.ask("two", (first,), (first,))
    assert isinstance(blocked, Use)
    sim.settle()
    assert isinstance(blocked.error, DeadlockError)
    sim.release(writing.lease)
    sim.settle()
    assert save.resolved
    assert save.error is None


def test_a_flush_goes_on_when_many_of_its_blocks_are_written_at_once() -> None:
    sim = Sim(gpu=100, ram=200)
    blocks = tuple(sim.put(f"{index}", 1) for index in range(80))
    sim.use(*blocks, write=True)
    lease = sim.ask("writer", blocks[:70], blocks[:70])
    assert isinstance(lease, Lease)
    flush = Save("main", ())
    sim.scheduler.submit(flush)
    sim.settle()
    sim.release(lease)
    sim.settle()
    assert flush.resolved
    assert flush.error is None
    assert all(record.nvme_version == record.version for record in blocks[70:])


def test_a_move_that_fails_half_way_is_not_taken_for_done() -> None:
    sim = Sim(gpu=8, ram=16)
    blocks = [sim.put(f"{index}", 2, tier=Tier.GPU) for index in range(4)]
    large = sim.put("large", 4)
    assert isinstance(sim.ask("other", (blocks[0],)), Lease)
    for index in (1, 3):
        sim.scheduler.forget(blocks[index])
    sim.ask("main", (large,))
    sim.pump()
    (move,) = [order for order in sim.flying if order.action is Action.COMPACT]
    with pytest.raises(OSError, match="half-way"):
        sim.placement.failed(move, OSError("stopped half-way"))
    assert blocks[2].gpu.moving, "it may not be leased, read or moved again"


@pytest.mark.parametrize("ordered", [False, True])
def test_room_that_is_being_moved_when_its_request_ends_is_given_back(ordered: bool) -> None:
    """It stayed taken, for nobody: others got CapacityError beside it."""
    sim = Sim(gpu=8, ram=16, device_is_ordered=ordered, max_orders=1)
    first, second, third, last = (sim.put(f"{index}", 2, tier=Tier.GPU) for index in range(4))
    large, small = sim.put("large", 4), sim.put("small", 2, tier=Tier.NVME)
    keep = sim.ask("other", (last,))
    assert isinstance(keep, Lease)
    sim.scheduler.forget(second)
    given_up = sim.ask("one", (small,))
    sim.pump()
    assert isinstance(given_up, Use)
    assert small.gpu.state is State.RESERVED
    for neighbour in (first, third):
        sim.scheduler.forget(neighbour)
    wanted = sim.ask("two", (large,))
    orders, _ = sim.scheduler.advance()
    (move,) = [order for order in orders if order.action is Action.COMPACT]
    assert [record for record, _, _ in move.moves] == [small]
    sim.scheduler.cancel(given_up)
    for order in orders:
        sim._start(order)
    sim.settle()
    assert small.gpu.state is State.ABSENT
    assert isinstance(wanted, Use)
    assert wanted.lease is not None
    sim.check_lease(wanted.lease)
    sim.check_lease(keep)


def test_room_whose_block_is_written_when_its_request_ends_is_given_back() -> None:
    """As above; the one who writes goes first, as he holds a lease."""
    sim = Sim(gpu=8, ram=16, max_orders=1)
    kept = sim.put("kept", 2, tier=Tier.GPU)
    slow, block = sim.put("slow", 2, tier=Tier.NVME), sim.put("block", 2, tier=Tier.NVME)
    keep = sim.ask("writer", (kept,))
    assert isinstance(keep, Lease)
    sim.ask("one", (slow,))
    given_up = sim.ask("two", (block,))
    sim.pump()
    assert isinstance(given_up, Use)
    assert (block.gpu.state, block.ram.state) == (State.RESERVED, State.ABSENT), "the link is busy with the other block"
    access = HostAccess("writer", (block,), write=True)
    sim.scheduler.submit(access)
    sim.pump()
    assert access.resolved
    sim.scheduler.cancel(given_up)
    sim.pump()
    assert block.gpu.state is State.RESERVED, "nothing changes while the host writes"
    sim.scheduler.host_write_ended(block)
    sim.settle()
    assert block.gpu.state is State.ABSENT


def test_room_that_was_to_be_given_back_stays_with_who_asked_for_it_meanwhile() -> None:
    sim = Sim(gpu=8, ram=16, max_orders=1)
    kept = sim.put("kept", 2, tier=Tier.GPU)
    slow, block = sim.put("slow", 2, tier=Tier.NVME), sim.put("block", 2, tier=Tier.NVME)
    assert isinstance(sim.ask("writer", (kept,)), Lease)
    sim.ask("one", (slow,))
    given_up = sim.ask("two", (block,))
    sim.pump()
    assert isinstance(given_up, Use)
    access = HostAccess("writer", (block,), write=True)
    sim.scheduler.submit(access)
    sim.pump()
    sim.scheduler.cancel(given_up)
    again = sim.ask("three", (block,))
    sim.pump()
    place = block.gpu.offset
    sim.scheduler.host_write_ended(block)
    sim.pump()
    assert (block.gpu.state, block.gpu.offset) == (State.RESERVED, place)
    sim.settle()
    assert isinstance(again, Use)
    assert again.lease is not None
    sim.check_lease(again.lease)
