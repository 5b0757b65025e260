"""What must hold after every event of a run."""

from __future__ import annotations

from tests.helpers import check_books, describe
from tests.quiet import AnyStore, busy_with, check_rest
from tests.simulation.model import Model
from tests.simulation.opened import Opened
from tests.simulation.world import BrokenPromiseError, World
from tierstore.trace import Kind

EVERY = 8
"""The whole bookkeeping, which is checked slowly, is checked at every so many events; what is checked quickly, at each."""

OLDEST_NS = 100_000_000
"""No order is under way for longer, whatever the world does: the slowest link takes a hundredth of it."""


class Invariants:
    """Watches a store."""

    def __init__(self, world: World, model: Model, opened: Opened) -> None:
        self._world = world
        self._model = model
        self._opened = opened
        self._count = 0
        self._newest_order = -1

    def check(self) -> None:
        engine = self._opened.engine
        if engine.failure is not None:
            raise BrokenPromiseError(f"the engine failed: {engine.failure!r}") from engine.failure
        if engine.closed:
            return
        self._check_leases()
        self._check_orders()
        self._check_prefetches()
        self._count += 1
        if self._count % EVERY == 0:
            self.check_all()

    def check_all(self) -> None:
        check_books(self._opened.engine)

    def _check_leases(self) -> None:
        """Leased blocks stay where they are."""
        names = self._opened.engine.scheduler.names
        for name, leases in self._model.leases.items():
            for owner, _, place in leases:
                record = names.get(name)
                if record is None or record.gpu.offset != place or not record.gpu.valid:
                    gone = "deleted" if record is None else describe(record)
                    raise BrokenPromiseError(f"{name}, leased by {owner} at {place}, is {gone}")

    def _check_orders(self) -> None:
        """What is under way is still wanted, and lies where the order says."""
        placement, now = self._opened.engine.placement, self._world.clock.now_ns()
        for order in self._opened.copies.under_way.values():
            if order.number not in placement.flying:
                raise BrokenPromiseError(f"an order that the scheduler has forgotten is carried out: {order}")
            record = order.record
            if record is None:
                continue
            if placement.records.get(record.id) is not record:
                raise BrokenPromiseError(f"an order is carried out for a block that is gone: {order}")
            given_up = record.ram.offset != order.offset_ram
            if not self._opened.copies.asynchronous:  # else events keep what comes later into the extent behind this
                given_up |= record.gpu.offset != order.offset_gpu
            if given_up:
                raise BrokenPromiseError(f"an order is carried out for extents that are given up: {order}, {describe(record)}")
            if now - order.queued_ns > OLDEST_NS:
                raise BrokenPromiseError(f"an order does not end: {order}")

    def _check_prefetches(self) -> None:
        """No prefetch is ordered while a demand lacks space."""
        engine = self._opened.engine
        for number in reversed(engine.placement.flying):
            if number <= self._newest_order:
                break
            order = engine.placement.flying[number]
            if order.kind is Kind.PREFETCH and engine.scheduler._starved:
                raise BrokenPromiseError(f"a prefetch was ordered while a demand lacks space: {order}")
        self._newest_order = max(self._newest_order, *engine.placement.flying, -1)


def check_quiet(world: World, store: AnyStore, opened: Opened) -> None:
    """When nobody asks for anything, everything comes to rest, and nothing is left over."""
    for _ in range(1000):
        with world.alone():
            hanging = opened.files.num_hanging if opened.files is not None else 0
            left = busy_with(store) or (f"{hanging} requests hang" if hanging else "")
            if not left and opened.engine.quarantined_bytes:  # what hung has returned, but the engine's loop has not heard of it yet
                left = f"{opened.engine.quarantined_bytes} bytes are quarantined"
            if not left:
                check_rest(opened.engine)
                return
        world.sleep(20_000)
    raise BrokenPromiseError(f"the store does not come to rest: {left}")
