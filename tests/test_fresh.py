"""What a lease writes whole: nobody loads it before, and RAM keeps room for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest

from tests.test_scheduler import Sim
from tierstore.catalog import PAGE, Block
from tierstore.policies import Lookahead
from tierstore.policies.plan import OUTLINED
from tierstore.requests import Action, Lease, Order, Record, Use
from tierstore.residency import Tier

BLOCKS = 12


class Training(Sim):
    """Leases that write blocks whole, or use them up, and a count of all transfers, in pages, by the first letter of the block."""

    def __init__(self, *, gpu: int, ram: int, has_nvme: bool = True) -> None:
        super().__init__(gpu=gpu, ram=ram, has_nvme=has_nvme, policy=Lookahead())
        self.moved: Counter[tuple[Action, str]] = Counter()

    def _start(self, order: Order) -> None:
        if order.record is not None:
            self.moved[order.action, order.record.block.name[0]] += order.nbytes // PAGE
        super()._start(order)

    def declare(self, name: str, pages: int = 1) -> Record:
        record = self.scheduler.new_record(Block(name, (), pages * PAGE, False, False))
        self.placement.declare(record)
        self.scheduler.make_ended(record, filled=True, blank=True)
        return record

    def begin(
        self, *records: Record, write: Collection[Record] = (), fresh: Collection[Record] = (), spent: Collection[Record] = ()
    ) -> Lease:
        """As `Engine.begin_use`, and what waits for it."""
        writes, news, ends = (frozenset(record.id for record in each) for each in ({*write, *fresh, *spent}, fresh, spent))
        lease = self.scheduler.try_use("main", records, writes, news, ends)
        request = None
        if lease is None:
            request = Use("main", records, writes=writes, fresh=news, spent=ends)
            self.scheduler.submit(request)
        self.scheduler.note_use(records, writes, news)
        if request is not None:
            self.settle()
            assert request.error is None
            lease = request.lease
        assert lease is not None
        for record in fresh:
            self.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)
        self.check_lease(lease)
        return lease

    def end(self, lease: Lease) -> None:
        self.scheduler.release(lease)
        for record in lease.records:
            if record.id in lease.writes and not record.blank:
                self.contents[Tier.GPU][record.gpu.offset] = (record.id, record.version)
        self.settle()

    def take(self, record: Record, *, write: bool = False, fresh: bool = False, spent: bool = False) -> None:
        """A whole lease."""
        self.end(self.begin(record, write=[record] * write, fresh=[record] * fresh, spent=[record] * spent))


def test_what_will_be_written_whole_is_not_loaded() -> None:
    """Weights with masters: read in two passes, then overwritten."""
    sim = Training(gpu=4, ram=BLOCKS + 4, has_nvme=False)
    weights = [sim.put(f"w{number}", 1) for number in range(BLOCKS)]
    for period in range(8):
        if period == 4:
            sim.moved.clear()
        for weight in weights:
            sim.take(weight)
        for weight in reversed(weights):
            sim.take(weight)
        for weight in weights:
            sim.take(weight, fresh=True)
    # Two of three uses need the content. Forward to backward, and update to forward, some of four are there still.
    assert sim.moved[Action.H2D, "w"] <= 4 * (2 * BLOCKS - 2 * 2)
    assert sim.moved[Action.D2H, "w"] <= 4 * BLOCKS


def test_what_is_written_soon_after_it_was_written_whole_is_not_loaded_in_between() -> None:
    """An update put off to right before the pass that uses the weights."""
    sim = Training(gpu=4, ram=2 * BLOCKS + 4, has_nvme=False)
    weights = [sim.put(f"w{number}", 1) for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(BLOCKS)]
    for period in range(8):
        if period == 4:
            sim.moved.clear()
        for weight, state in zip(weights, states, strict=True):
            sim.take(weight, fresh=True)
            sim.take(state, write=True)
            sim.take(weight)
        for weight in reversed(weights):
            sim.take(weight)
    assert sim.moved[Action.H2D, "w"] <= 4 * BLOCKS
    assert sim.moved[Action.H2D, "s"] <= 4 * BLOCKS


@pytest.mark.parametrize("ram", [BLOCKS + 8, 2 * BLOCKS, 2 * BLOCKS + 8])
def test_ram_keeps_room_for_what_is_yet_to_be_written(ram: int) -> None:
    """Gradients leave room between two backward passes; state that is fetched into it would have to leave again."""
    sim = Training(gpu=3, ram=ram)
    gradients = [sim.declare(f"g{number}") for number in range(BLOCKS)]
    states = [sim.put(f"s{number}", 1) for number in range(2 * BLOCKS)]
    for period in range(10):
        if period == 5:
            sim.moved.clear()
        for gradient in reversed(gradients):
            sim.take(gradient, fresh=True)
        for number, gradient in enumerate(gradients):
            sim.take(gradient, spent=True)
            for state in states[2 * number : 2 * number + 2]:
                sim.take(state, write=True)
    streamed = len(states) - (ram - len(gradients) - OUTLINED)
    assert sim.moved[Action.READ, "s"] <= 5 * streamed
    assert sim.moved[Action.WRITE, "s"] <= 5 * streamed
    assert sim.moved[Action.H2D, "s"] <= 5 * len(states)
    assert sim.moved[Action.READ, "g"] == sim.moved[Action.WRITE, "g"] == 0
