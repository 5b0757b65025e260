"""The real scheduler, placement and policy on a simulated clock: how long a sequence of leases would take, and what it would move.

Pure and deterministic: the same arguments give the same nanoseconds and the same bytes. Only the engine's part is played here.

[Note: Whose time]
With `device_ordered` (as on CUDA) the host queues work and runs ahead: a lease is granted when the copies it needs are ordered,
computing starts when they have landed, and every user of an extent waits for the one before. The host stops only for
bytes from NVMe, for room, and at `run_ahead` leases whose computing has not ended. Without it (the device is the CPU) a lease is
granted once its copies have landed, the thread computes under it, and lets go afterwards.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tierstore.catalog import Block
from tierstore.clock import SimulatedClock
from tierstore.extents import MEMORY_TIERS
from tierstore.pace import Span
from tierstore.placement import LIMITS, Limits, Placement
from tierstore.policies import Policy, resolve
from tierstore.requests import LINK_OF, Action, Lease, Make, Order, Use
from tierstore.residency import Tier
from tierstore.scheduler import Scheduler
from tierstore.trace import Kind, Link

RUN_AHEAD = 256
"""Leases whose computing has not ended, at most, on a device that orders work by itself."""

ACCESS_BATCH = 64
"""Accesses the policy may lag behind while there is nothing to decide, as in the engine."""


@dataclass(frozen=True, slots=True)
class Step:
    """One lease and the computing under it.

    Attributes:
        blocks: Leased together.
        writes: Those of them that are written.
        fresh, spent: Those of `writes` of which nobody wants what they held before, or what they hold afterwards.
        compute_ns: Time of the device (or of the thread, where the device is the CPU).
        thread: Steps of one thread follow one another; threads go side by side, and share the device.
    """

    blocks: tuple[str, ...]
    writes: frozenset[str] = frozenset()
    compute_ns: int = 0
    thread: int = 0
    fresh: frozenset[str] = frozenset()
    spent: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class LinkModel:
    """A link: one transfer at a time, each taking its latency and its bytes' share of the rate."""

    bytes_per_s: float
    latency_ns: int = 0

    def duration_ns(self, nbytes: int) -> int:
        return self.latency_ns + round(nbytes * 1e9 / self.bytes_per_s)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What crossed a link."""

    transfers: int = 0
    bytes: int = 0

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(self.transfers + other.transfers, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Period:
    """What happened between two marks.

    Attributes:
        ns: Simulated time, from the end of computing of the last step before to that of the last step within.
        steps, accesses: Leases, and blocks of leases.
        misses: Blocks of leases that were neither on the tier nor on their way to it when asked for. A block missing in RAM is
            missing on the device too.
        traffic: By link and kind, of transfers that were ordered meanwhile; none of no bytes.
        evictions: Copies that left for others to have room.
        wait_ns: By cause, as in `trace.WaitEvent`; with `device_ordered`, "copy" is the device's own waiting.
    """

    ns: int
    steps: int
    accesses: int
    misses: Mapping[Tier, int]
    traffic: Mapping[tuple[Link, Kind], Traffic]
    evictions: Mapping[Tier, int]
    wait_ns: Mapping[str, int]

    def on(self, *links: Link, kind: Kind | None = None) -> Traffic:
        """What crossed these links, or all; of one kind, or of all."""
        wanted = links or tuple(Link)
        found = (traffic for (link, why), traffic in self.traffic.items() if link in wanted and kind in (None, why))
        return sum_traffic(found)


def sum_traffic(parts: Iterable[Traffic]) -> Traffic:
    total = Traffic()
    for part in parts:
        total = total.plus(part)
    return total


@dataclass(frozen=True, slots=True)
class Simulation:
    """The outcome: one `Period` per stretch between marks, and all of it.

    The periods' times add up to the total's; transfers that end after the last step belong to the last period.
    """

    periods: tuple[Period, ...]
    total: Period


def simulate(
    steps: Iterable[Step],
    blocks: Mapping[str, int],
    *,
    gpu_bytes: int,
    ram_bytes: int,
    policy: str | Policy | type,
    links: Mapping[Link, LinkModel],
    has_nvme: bool = True,
    frozen: Collection[str] = (),
    marks: Sequence[int] = (),
    device_ordered: bool = True,
    run_ahead: int = RUN_AHEAD,
    limits: Limits | None = None,
    moving: LinkModel | None = None,
) -> Simulation:
    """Run the steps through the scheduler.

    Blocks are put into RAM in the order given while they fit there, the others onto NVMe.

    Args:
        steps: What the program does, in its order.
        blocks: Payload bytes by name.
        gpu_bytes, ram_bytes: Capacities.
        policy: A name, a class or an object, as for the store.
        links: The speed of each link. These are also the rates the scheduler plans with.
        has_nvme: Whether there is a tier below RAM.
        frozen: Blocks that are never written.
        marks: Ascending numbers of steps; at each begins a new period.
        device_ordered, run_ahead: See [Note: Whose time].
        limits: What may be in flight, per link.
        moving: How fast extents are moved within a tier; None, at no cost.

    Raises:
        CapacityError: A block or a step does not fit.
        RuntimeError: The scheduler stands still, which is a bug of it.
    """
    clock = SimulatedClock()
    placement = Placement(
        gpu_bytes=gpu_bytes,
        ram_bytes=ram_bytes,
        has_nvme=has_nvme,
        policy=resolve(policy),
        seconds_per_byte={link: 1 / links[link].bytes_per_s for link in Link},
        limits=LIMITS if limits is None else dict.fromkeys(Link, limits),
        clock=clock,
    )
    world = _World(Scheduler(placement, clock), clock, links, moving, device_ordered=device_ordered, run_ahead=run_ahead)
    for name, nbytes in blocks.items():
        world.put(Block(name, (), nbytes, False, name in frozen))
    return world.run(steps, marks)


@dataclass(eq=False, slots=True)
class _Count:
    """What is counted from one mark to the next."""

    start_ns: int
    evicted_before: Mapping[Tier, int]
    steps: int = 0
    accesses: int = 0
    misses: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(MEMORY_TIERS, 0))
    transfers: dict[tuple[Link, Kind], int] = field(default_factory=dict)
    bytes: dict[tuple[Link, Kind], int] = field(default_factory=dict)
    wait_ns: dict[str, int] = field(default_factory=dict)

    def wait(self, cause: str, duration_ns: int) -> None:
        if duration_ns > 0:
            self.wait_ns[cause] = self.wait_ns.get(cause, 0) + duration_ns

    def transfer(self, link: Link, kind: Kind, nbytes: int) -> None:
        key = (link, kind)
        self.transfers[key] = self.transfers.get(key, 0) + 1
        self.bytes[key] = self.bytes.get(key, 0) + nbytes

    def close(self, end_ns: int, evicted: Mapping[Tier, int]) -> Period:
        traffic = {key: Traffic(self.transfers[key], self.bytes[key]) for key in sorted(self.transfers)}
        evictions = {tier: evicted[tier] - self.evicted_before[tier] for tier in MEMORY_TIERS}
        return Period(end_ns - self.start_ns, self.steps, self.accesses, self.misses, traffic, evictions, self.wait_ns)


def _add(periods: Sequence[Period]) -> Period:
    traffic: dict[tuple[Link, Kind], Traffic] = {}
    wait_ns: dict[str, int] = {}
    for period in periods:
        for key, part in period.traffic.items():
            traffic[key] = traffic.get(key, Traffic()).plus(part)
        for cause, duration_ns in period.wait_ns.items():
            wait_ns[cause] = wait_ns.get(cause, 0) + duration_ns
    return Period(
        sum(period.ns for period in periods),
        sum(period.steps for period in periods),
        sum(period.accesses for period in periods),
        {tier: sum(period.misses[tier] for period in periods) for tier in MEMORY_TIERS},
        traffic,
        {tier: sum(period.evictions[tier] for period in periods) for tier in MEMORY_TIERS},
        wait_ns,
    )


@dataclass(eq=False, slots=True)
class _Thread:
    """A thread of the program: its steps, and the lease it has or waits for."""

    number: int
    steps: deque[tuple[int, Step]] = field(default_factory=deque)
    lease: Lease | None = None
    span: Span | None = None


class _Busy:
    """Until when each stretch of the device's arena is used by work already queued."""

    def __init__(self) -> None:
        self._until: dict[tuple[int, int], int] = {}

    def free_at(self, start: int, end: int, now_ns: int) -> int:
        """When all work queued on [start, end) has ended."""
        found, past = now_ns, []
        for (left, right), until in self._until.items():
            if until <= now_ns:
                past.append((left, right))
            elif left < end and start < right and until > found:
                found = until
        for key in past:
            del self._until[key]
        return found

    def use(self, start: int, end: int, until_ns: int) -> None:
        key = (start, end)
        self._until[key] = max(until_ns, self._until.get(key, 0))


class _World:
    """The engine, the links, the device and the threads, as far as the scheduler can tell."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: SimulatedClock,
        links: Mapping[Link, LinkModel],
        moving: LinkModel | None,
        *,
        device_ordered: bool,
        run_ahead: int,
    ) -> None:
        self.scheduler = scheduler
        self.placement = scheduler.placement
        self.clock = clock
        self.links = links
        self.moving = moving
        self.device_ordered = device_ordered
        self.run_ahead = run_ahead
        self.ends: deque[int] = deque()  # when the computing of each of the last leases ends
        self.device_free_ns = 0
        self.last_end_ns = 0
        self.link_free_ns = dict.fromkeys(Link, 0)
        self.total_bytes = 0
        self.moved_ns = 0  # when the last move within RAM ends
        self.busy = _Busy()
        self.events: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self.sequence = itertools.count()
        self.asked: dict[Use, _Thread] = {}
        self.marks: deque[int] = deque()
        self.periods: list[Period] = []
        self.count = _Count(0, dict(self.placement.evictions))

    def put(self, block: Block) -> None:
        scheduler, placement = self.scheduler, self.placement
        record = scheduler.new_record(block)
        fits = not placement.has_nvme or placement.arenas[Tier.RAM].largest_hole >= block.nbytes
        request = Make("put", (record,), tier=Tier.RAM if fits else Tier.NVME)
        scheduler.submit(request)
        scheduler.advance()
        if not request.resolved:
            raise RuntimeError(f"block {block.name!r} finds no place")
        if request.error is not None:
            raise request.error
        scheduler.resolved.clear()
        if fits:
            placement.start_load(record, Tier.RAM)
            placement.finish_make(record, Tier.RAM)
        scheduler.make_ended(record, filled=True, on_nvme=not fits)
        self.total_bytes += block.nbytes

    # -- time ------------------------------------------------------------------------------------------------------------

    def run(self, steps: Iterable[Step], marks: Sequence[int]) -> Simulation:
        self.marks.extend(marks)
        threads: dict[int, _Thread] = {}
        for number, step in enumerate(steps):
            threads.setdefault(step.thread, _Thread(step.thread)).steps.append((number, step))
        for thread in threads.values():
            self.at(0, self.begin, thread)
        now_ns = 0
        while self.events:
            due_ns, _, call, arguments = heapq.heappop(self.events)
            if due_ns > now_ns:
                self.clock.advance(due_ns - now_ns)
                now_ns = due_ns
            call(*arguments)
        left = [thread for thread in threads.values() if thread.steps or thread.lease is not None]
        if left:
            raise RuntimeError(f"{len(left)} threads wait for ever: {[request.records for request in self.scheduler.waiting.values()]}")
        self.close_period()
        return Simulation(tuple(self.periods), _add(self.periods))

    def at(self, due_ns: int, call: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self.events, (due_ns, next(self.sequence), call, arguments))

    def close_period(self) -> None:
        self.periods.append(self.count.close(max(self.last_end_ns, self.count.start_ns), self.placement.evictions))
        self.count = _Count(max(self.last_end_ns, self.count.start_ns), dict(self.placement.evictions))

    # -- the program -----------------------------------------------------------------------------------------------------

    def begin(self, thread: _Thread) -> None:
        """The thread's next step: as `Engine.begin_use`."""
        if not thread.steps:
            return
        number, step = thread.steps[0]
        while self.marks and number >= self.marks[0]:
            self.marks.popleft()
            self.close_period()
        scheduler = self.scheduler
        records = tuple(dict.fromkeys(scheduler.find(name) for name in step.blocks))
        writes, fresh, spent = (frozenset(scheduler.find(name).id for name in names) for names in (step.writes, step.fresh, step.spent))
        self.count.steps += 1
        self.count.accesses += len(records)
        for record in records:
            if not (record.gpu.valid or record.gpu.loading or record.id in fresh):
                self.count.misses[Tier.GPU] += 1
                if not (record.ram.valid or record.ram.loading):
                    self.count.misses[Tier.RAM] += 1
        thread.lease = scheduler.try_use(thread.number, records, writes, fresh, spent)
        if thread.lease is None:
            request = Use(thread.number, records, writes=writes, fresh=fresh, spent=spent)
            scheduler.submit(request)
            self.asked[request] = thread
        mark = self.device_now_ns() if self.placement.pace.measuring else None
        thread.span = scheduler.note_use(records, writes, fresh, mark)
        if thread.lease is None or self.has_work():
            self.pump()
        if thread.lease is not None and (thread.steps and thread.steps[0][0] == number):
            self.compute(thread)

    def device_now_ns(self) -> int:
        """When the device comes to what is ordered now."""
        now_ns = self.clock.now_ns()
        return max(now_ns, self.device_free_ns) if self.device_ordered else now_ns

    def compute(self, thread: _Thread) -> None:
        """The lease is there."""
        lease, span = thread.lease, thread.span
        assert lease is not None
        _, step = thread.steps.popleft()
        now_ns = self.clock.now_ns()
        if not self.device_ordered:
            if span is not None:
                span.granted, span.released = now_ns, now_ns + step.compute_ns
            self.last_end_ns = max(self.last_end_ns, now_ns + step.compute_ns)
            self.at(now_ns + step.compute_ns, self.release, thread)
            return
        start_ns = ready_ns = max(now_ns, self.device_free_ns)
        extents = [(record.gpu.offset, record.gpu.offset + record.nbytes) for record in lease.records]
        for start, end in extents:
            start_ns = max(start_ns, self.busy.free_at(start, end, now_ns))
        self.count.wait("copy", start_ns - ready_ns)
        end_ns = self.device_free_ns = start_ns + step.compute_ns
        if span is not None:
            span.granted, span.released = start_ns, end_ns
        for start, end in extents:
            self.busy.use(start, end, end_ns)
        self.last_end_ns = max(self.last_end_ns, end_ns)
        self.release(thread, end_ns)

    def release(self, thread: _Thread, end_ns: int | None = None) -> None:
        """As `Engine.end_use`; with the time at which the device will have done what was queued under the lease."""
        lease, thread.lease = thread.lease, None
        assert lease is not None
        self.scheduler.release(lease)
        now_ns = resume_ns = self.clock.now_ns()
        if end_ns is not None:
            self.ends.append(end_ns)
            while self.ends and self.ends[0] <= now_ns:
                self.ends.popleft()
            if len(self.ends) > self.run_ahead:
                resume_ns = max(now_ns, self.ends.popleft())
                self.count.wait("run-ahead", resume_ns - now_ns)
        if self.has_work():
            self.pump()
        self.at(resume_ns, self.begin, thread)

    # -- the engine ------------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """As `Engine._has_work`."""
        scheduler = self.scheduler
        missing = self.placement.arenas[Tier.GPU].used_bytes != self.total_bytes - self.placement.blank_bytes
        return scheduler.busy or missing or scheduler.num_unlearned >= ACCESS_BATCH

    def pump(self) -> None:
        """As `Engine._look`, until it would go to sleep."""
        scheduler = self.scheduler
        again = True
        granted: list[_Thread] = []
        while again:
            orders, again = scheduler.advance()
            if scheduler.resolved:
                resolved, scheduler.resolved = scheduler.resolved, []
                granted += (self.answer(request) for request in resolved if isinstance(request, Use))
            self.placement.left_device.clear()
            for order in orders:
                again |= self.start(order)
        for thread in granted:
            self.compute(thread)

    def answer(self, request: Use) -> _Thread:
        if request.error is not None:
            raise request.error
        thread = self.asked.pop(request)
        thread.lease, request.lease = request.lease, None
        self.count.wait(request.cause, self.clock.now_ns() - request.queued_ns)
        return thread

    def start(self, order: Order) -> bool:
        """Carry an order out. Returns whether something was reported at once."""
        now_ns = self.clock.now_ns()
        if order.action is Action.COMPACT:
            return self.move(order, now_ns)
        link = LINK_OF[order.action]
        self.count.transfer(link, order.kind, order.nbytes)
        start_ns = max(now_ns, self.link_free_ns[link])
        on_device = self.device_ordered and order.action in (Action.H2D, Action.D2H)
        if on_device:
            start_ns = max(start_ns, self.busy.free_at(order.offset_gpu, order.offset_gpu + order.nbytes, now_ns))
        end_ns = self.link_free_ns[link] = start_ns + self.links[link].duration_ns(order.nbytes)
        if on_device:
            self.busy.use(order.offset_gpu, order.offset_gpu + order.nbytes, end_ns)
            self.placement.ordered(order)
        self.at(end_ns, self.landed, order, on_device)
        return on_device

    def move(self, order: Order, now_ns: int) -> bool:
        duration_ns = self.moving.duration_ns(order.nbytes) if self.moving is not None else 0
        if order.tier is Tier.RAM or not self.device_ordered:
            self.moved_ns = max(now_ns, self.moved_ns) + duration_ns
            self.at(self.moved_ns, self.landed, order, False)
            return False
        start_ns = max(now_ns, self.link_free_ns[Link.H2D])
        ranges = [(start, start + record.nbytes) for record, source, target in order.moves for start in (source, target)]
        for start, end in ranges:
            start_ns = max(start_ns, self.busy.free_at(start, end, now_ns))
        self.link_free_ns[Link.H2D] = start_ns + duration_ns
        for start, end in ranges:
            self.busy.use(start, end, start_ns + duration_ns)
        self.placement.ordered(order)
        self.placement.done(order)
        return True

    def landed(self, order: Order, ordered: bool) -> None:
        if not ordered and order.action in (Action.H2D, Action.D2H, Action.COMPACT):
            self.placement.ordered(order)
        self.placement.done(order)
        self.pump()


__all__ = ["RUN_AHEAD", "LinkModel", "Period", "Simulation", "Step", "Traffic", "simulate"]
