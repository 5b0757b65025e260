"""What several suites share: a policy that keeps watch, hostile policies, and the invariants of the core's bookkeeping."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator

from tierstore.arena import Arena
from tierstore.catalog import BlockId
from tierstore.mover.engine import Engine
from tierstore.placement import Placement
from tierstore.policies import Policy, PolicyBase, View
from tierstore.requests import LINK_OF, Action, Make, Order, Owner, Place, Record, Use
from tierstore.residency import State, Tier
from tierstore.scheduler import Scheduler
from tierstore.trace import Link

MEMORY = (Tier.GPU, Tier.RAM)
ADMITTED = frozenset({State.LOADING, State.CLEAN, State.DIRTY, State.SAVING})


class Watched:
    """Passes everything on to a policy, and holds the scheduler to its side of the protocol."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.admitted_on: dict[Tier, set[BlockId]] = {tier: set() for tier in MEMORY}
        self.accesses: list[tuple[BlockId, bool]] = []
        if hasattr(policy, "victims_for"):
            self.victims_for = policy.victims_for
        if hasattr(policy, "stays"):
            self.stays = policy.stays
        if hasattr(policy, "repeats"):
            self.repeats = policy.repeats

    def bind(self, view: View) -> None:
        self.view = view
        self.policy.bind(view)

    def accessed(self, block: BlockId, write: bool) -> None:
        self.accesses.append((block, write))
        self.policy.accessed(block, write)

    def touched(self, block: BlockId, tier: Tier) -> None:
        self.policy.touched(block, tier)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        assert block not in self.admitted_on[tier], f"block {block} was admitted to {tier} twice"
        self.admitted_on[tier].add(block)
        self.policy.admitted(block, tier)

    def removed(self, block: BlockId, tier: Tier) -> None:
        assert block in self.admitted_on[tier], f"block {block} was removed from {tier}, where it was not"
        self.admitted_on[tier].remove(block)
        self.policy.removed(block, tier)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        return self.policy.victims(tier)

    def next_use(self, block: BlockId) -> float:
        return self.policy.next_use(block)

    def expected(self, position: int) -> BlockId | None:
        return self.policy.expected(position)

    @property
    def epoch(self) -> int:
        return self.policy.epoch


class Hostile(PolicyBase):
    """Ranks at random, leaves blocks out, names blocks that are not there, and expects nonsense."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.moods = random.Random(seed)
        self.known: list[BlockId] = []

    def admitted(self, block: BlockId, tier: Tier) -> None:
        if block not in self.known:
            self.known.append(block)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        ranked = [block for block in self.known if self.random.random() < 0.8]
        ranked += self.random.sample(self.known, len(self.known) // 3)
        ranked.append(BlockId(10**9))
        self.random.shuffle(ranked)
        return iter(ranked)

    def next_use(self, block: BlockId) -> float:
        return self.random.choice([math.inf, -math.inf, math.nan, -3.0, 0.0, self.random.random() * 100])

    def expected(self, position: int) -> BlockId | None:
        if not self.known or self.random.random() < 0.5:
            return None
        return self.random.choice([*self.known, BlockId(10**9)])

    def stays(self, block: BlockId, tier: Tier, position: int, until: float) -> object:
        return self.moods.choice([True, False, None, 0, "for a while"])

    @property
    def epoch(self) -> int:
        return self.random.randrange(3)


def check_arena(arena: Arena) -> dict[int, int]:
    """Extents and holes tile the arena. Returns bytes by offset of every extent."""
    pieces = sorted([*((offset, length, True) for offset, length in arena.extents()), *((o, n, False) for o, n in arena._holes.items())])
    position, used, previous_taken = 0, 0, True
    for offset, length, taken in pieces:
        assert offset == position, f"extents and holes do not tile the arena at {position}: {pieces}"
        assert length > 0
        assert taken or previous_taken, f"two holes side by side at {offset}"
        position, previous_taken = offset + length, taken
        used += length * taken
    assert position == arena.capacity_bytes
    assert used == arena.used_bytes <= arena.capacity_bytes
    assert arena.peak_bytes <= arena.capacity_bytes
    assert sorted(arena._by_size) == sorted((length, offset) for offset, length in arena._holes.items())
    return dict(arena.extents())


def check_placement(placement: Placement) -> None:
    """Everything the placement keeps twice says the same, and every state is one that may be."""
    records = placement.records.values()
    compactions = [order for order in placement.flying.values() if order.action is Action.COMPACT and order.hole >= 0]
    for tier in MEMORY:
        extents = check_arena(placement.arenas[tier])
        owners: dict[int, Record] = {}
        for record in records:
            copy = record.copy(tier)
            assert (copy.offset >= 0) == (copy.state is not State.ABSENT), _of(record)
            assert copy.readers >= 0, _of(record)
            if copy.offset >= 0:
                assert extents.get(copy.offset) == record.nbytes, f"{_of(record)} has no extent of its length"
                assert copy.offset not in owners, f"{_of(record)} shares its extent with {_of(owners[copy.offset])}"
                owners[copy.offset] = record
        assert owners == placement._at[tier]
        holes = {order.hole for order in compactions if order.tier is tier}
        quarantined = placement.quarantined if tier is Tier.RAM else {}
        assert all(extents[offset] == nbytes for offset, nbytes in quarantined.items()), quarantined
        assert not owners.keys() & quarantined.keys(), "an extent is in use that hung bytes may yet arrive in"
        assert set(extents) == {*owners, *holes, *quarantined}, f"extents that belong to nobody on {tier}"
        moving = Counter(record for order in compactions if order.tier is tier for record, _, _ in order.moves)
        assert set(moving.values()) <= {1}
        assert set(moving) == {record for record in records if record.copy(tier).moving}
        for order in compactions:
            assert order.tier is not tier or all(record.copy(tier).offset == target for record, _, target in order.moves)
    assert set(placement._stale.values()) == {record for record in records if record.ram.state is State.STALE}
    assert placement.leased == {record.id: record for record in records if record.leased}
    assert placement.held == {record.id: record for record in records if record.hold is not None}
    assert list(placement._sizes) == sorted(record.nbytes for record in records if record.hold is None)
    for tier in MEMORY:
        ahead = placement._ahead[tier]
        assert sum(ahead.values()) == placement._ahead_bytes[tier]
        assert all(placement.records[number].copy(tier).state in ADMITTED for number in ahead), f"fetched ahead, and not on {tier}"
    assert placement.blank_bytes == sum(record.nbytes for record in records if record.blank)
    given = placement.policy._given
    assert placement.policy._policy is given, "the policy failed, and was replaced"
    if isinstance(given, Watched):
        for tier in MEMORY:
            assert given.admitted_on[tier] == {record.id for record in records if record.copy(tier).state in ADMITTED}
    for record in records:
        _check_record(placement, record)
    _check_flying(placement)


def _check_record(placement: Placement, record: Record) -> None:
    gpu, ram, nvme = record.gpu.state, record.ram.state, record.nvme_version
    to_ram = [order for order in placement.flying.values() if order.record is record and order.action in (Action.D2H, Action.READ)]
    assert nvme <= record.version, _of(record)
    assert (record.writer is None) == (record.writer_depth == 0), _of(record)
    assert all(count > 0 for count in record.readers.values()), _of(record)
    assert record.commit_pending >= 0, _of(record)
    if record.writer is not None:
        assert set(record.readers) <= {record.writer}, f"{_of(record)} has a writer and other readers"
        assert record.gpu.valid, _of(record)
        assert not record.gpu.moving, _of(record)
        assert placement.has_nvme or nvme != record.version, f"{_of(record)} is written before it has a home"
    if gpu in (State.DIRTY, State.SAVING) and not record.locked:
        assert not record.ram.valid, f"{_of(record)}: RAM serves bytes older than the device's"
    if gpu is State.CLEAN and not record.locked:
        below = record.ram.valid or ram is State.LOADING or nvme == record.version
        assert below, f"{_of(record)} is clean on the device, and nowhere else"
    if placement.has_nvme and ram is State.CLEAN and not record.locked:
        assert nvme == record.version, f"{_of(record)} is clean in RAM, and not on NVMe"
    if placement.has_nvme and ram is State.DIRTY:
        assert nvme != record.version, f"{_of(record)} is dirty in RAM, though NVMe has it"
    if record.blank:
        _check_blank(placement, record)
    elif record.born is not None and not record.locked:
        assert record.tiers or any(order.version == record.version for order in to_ram), f"{_of(record)}: the newest version is nowhere"
    if record.born is not None and not record.locked:
        assert placement.backed(record) or ram is not State.ABSENT, f"{_of(record)} has no home"
    for tier in MEMORY:
        copy = record.copy(tier)
        filling = [order for order in placement.flying.values() if order.record is record and _target(order) is tier]
        if copy.state is State.LOADING:
            once = len(filling) == 1 or (len(filling) > 1 and tier is Tier.GPU)  # with events, an earlier one may not have landed yet
            assert once or (record.locked and not filling), f"{_of(record)}: {len(filling)} transfers fill {tier}"


def _check_blank(placement: Placement, record: Record) -> None:
    """No tier serves a block without content, nobody leases it, saves it or complains of it, and it takes no space that it need not."""
    assert not record.tiers, _of(record)
    assert not record.leased, _of(record)
    assert not record.commit_pending, _of(record)
    assert record.gpu.state in (State.ABSENT, State.RESERVED), _of(record)
    assert record.save_error is None, _of(record)
    assert record.id not in placement.save_failed, _of(record)
    if placement.has_nvme and record.ram.settled:
        assert record.ram.state is State.ABSENT, f"{_of(record)} keeps RAM that nobody needs"


def _check_flying(placement: Placement) -> None:
    nbytes, orders = dict.fromkeys(Link, 0), dict.fromkeys(Link, 0)
    reading: Counter[tuple[int, Tier]] = Counter()
    for order in placement.flying.values():
        record = order.record
        if record is None:
            continue
        assert placement.records.get(record.id) is record, f"a transfer of a block that is gone: {order}"
        link = LINK_OF[order.action]
        nbytes[link] += order.nbytes
        orders[link] += 1
        if order.action in (Action.H2D, Action.WRITE):
            reading[record.id, Tier.RAM] += 1
            assert (record.ram.offset, record.ram.moving) == (order.offset_ram, False), f"the source of {order} went away"
        if order.action is Action.WRITE:
            assert record.nvme_writing, _of(record)
        if order.action in (Action.D2H, Action.READ):
            assert (record.ram.state, record.ram.offset) == (State.LOADING, order.offset_ram), f"the target of {order} went away"
    assert nbytes == placement._flying_bytes
    assert orders == placement._flying_orders
    for (number, tier), count in reading.items():
        assert placement.records[BlockId(number)].copy(tier).readers >= count
    for record in placement.records.values():
        writes = [order for order in placement.flying.values() if order.record is record and order.action is Action.WRITE]
        assert len(writes) == record.nvme_writing, _of(record)


def check_scheduler(scheduler: Scheduler) -> None:
    """As `check_placement`, and what the scheduler keeps of leases and requests."""
    placement = scheduler.placement
    check_placement(placement)
    for tier, promised in placement.promised.items():
        assert placement.promised_bytes[tier] == sum(promised.values())
        for number in promised:
            assert placement.records[number].copy(tier).state is State.ABSENT, "room is promised to a block that has an extent"
    assert {id(record) for record in scheduler.names.values()} == {id(record) for record in placement.records.values()}
    owned: dict[Owner, Counter[Record]] = {}
    writes: Counter[Owner] = Counter()
    for record in placement.records.values():
        for owner, count in record.readers.items():
            owned.setdefault(owner, Counter())[record] += count
        if record.writer is not None:
            owned.setdefault(record.writer, Counter())[record] += record.writer_depth
            writes[record.writer] += record.writer_depth
        assert (record in scheduler._locked) <= record.locked
    assert {owner: dict(records) for owner, records in owned.items()} == {
        owner: records for owner, records in scheduler._owned.items() if records
    }
    assert dict(writes) == scheduler._writes_of
    for record in placement.records.values():
        if record.gpu.state is State.RESERVED and not record.locked:
            wanted = any(isinstance(request, Use | Place | Make) for request in scheduler.waiting.wanting(record))
            wanted |= record in scheduler._left or record in scheduler._hints or record.ram.moving
            assert wanted, f"{_of(record)} has room on the device that nobody waits for"
    for request in scheduler.waiting.values():
        assert not request.resolved
        for record in request.records:
            assert placement.records.get(record.id) is record, f"{request} waits for a block that is gone"


def check_invariants(engine: Engine) -> None:
    """The bookkeeping of a running store. Any thread."""
    with engine.lock:
        assert engine.failure is None, engine.failure
        check_books(engine)


def check_books(engine: Engine) -> None:
    """As `check_invariants`. Under the lock, or where nobody else runs."""
    check_scheduler(engine.scheduler)
    directory = engine.directory
    if directory is not None:
        assert directory.used_bytes <= directory.peak_bytes <= directory.limit_bytes
        for record in engine.placement.records.values():
            assert record.nvme_version < 0 or record in engine.shards, f"{_of(record)} has no shard"


def dump(engine: Engine) -> str:
    """The state of a store that hangs, for the message of the test that found it."""
    with engine.lock:
        lines = [f"arenas: {[(str(tier), list(arena.extents()), arena.free_bytes) for tier, arena in engine.placement.arenas.items()]}"]
        lines += [_of(record) for record in engine.placement.records.values()]
        lines += [f"waiting: {request}" for request in engine.scheduler.waiting.values()]
        lines += [f"flying: {order}" for order in engine.placement.flying.values()]
    return "\n".join(lines)


def describe(record: Record) -> str:
    return _of(record)


def _of(record: Record) -> str:
    copies = " ".join(
        f"{tier}={copy.state.value}@{copy.offset}"
        + (f" readers={copy.readers}" if copy.readers else "")
        + (" moving" if copy.moving else "")
        for tier, copy in ((tier, record.copy(tier)) for tier in MEMORY)
    )
    flags = [name for name in ("born", "blank", "locked", "nvme_writing", "vacating") if getattr(record, name)]
    return (
        f"<{record.block.name!r} #{record.id} {record.nbytes} B v{record.version} nvme=v{record.nvme_version} {copies} "
        f"readers={record.readers} writer={record.writer} hold={record.hold} {' '.join(flags)}>"
    )


def _target(order: Order) -> Tier | None:
    return {Action.H2D: Tier.GPU, Action.D2H: Tier.RAM, Action.READ: Tier.RAM}.get(order.action)
