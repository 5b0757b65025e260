"""Blocks without content, as the scheduler sees them: states that a store comes to rarely, made on purpose."""

from __future__ import annotations

import pytest

from tests.test_scheduler import Sim
from tierstore.catalog import BlockId
from tierstore.errors import CapacityError
from tierstore.policies import Lookahead
from tierstore.requests import Action, Lease, Order, Place, Record, Save, Use, Vacate
from tierstore.residency import State, Tier


def only(sim: Sim, action: Action) -> Order:
    """The one order of its kind that is under way."""
    (order,) = [order for order in sim.flying if order.action is action]
    return order


@pytest.mark.parametrize("busy", [False, True])
def test_what_is_not_looked_for_is_neither_found_nor_missed(busy: bool) -> None:
    sim = Sim(gpu=2, ram=8)
    other, block = sim.put("other", 2), sim.declare("g", 1)
    lease = sim.leased(sim.ask("one", (other,)))
    if not busy:
        sim.release(lease)
        sim.placement.drop(other, Tier.GPU)
    before = sim.scheduler.hits, sim.scheduler.misses
    answer = sim.ask("main", (block,), fresh=(block,))
    assert isinstance(answer, Use) == busy
    if busy:
        sim.release(lease)
    sim.release(sim.leased(answer))
    sim.use(block, spent=True)
    sim.use(block, fresh=True)
    assert (sim.scheduler.hits, sim.scheduler.misses) == (before[0] + 1, before[1]), "only the lease that reads is counted"


def spilling(sim: Sim, name: str = "g") -> tuple[Record, Order]:
    """A block with content that is just being written to the drive from RAM, and the order."""
    block = sim.declare(name, 1)
    sim.use(block, fresh=True)
    flush = Save("main", ())
    sim.scheduler.submit(flush)
    sim.pump()
    sim.complete(only(sim, Action.D2H))
    sim.pump()
    sim.scheduler.cancel(flush)
    return block, only(sim, Action.WRITE)


def lease_at_once(sim: Sim, *records: Record, fresh: bool = False, spent: bool = False) -> Lease:
    lease = sim.ask("main", records, fresh=records if fresh else (), spent=records if spent else ())
    assert isinstance(lease, Lease)
    sim.check_lease(lease)
    return lease


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_transfer_still_reads_leaves_ram_with_it(fails: bool) -> None:
    """Only a demand would have taken it else: whatever is fetched ahead had that much less room."""
    sim = Sim(gpu=2, ram=2)
    block, write = spilling(sim)
    sim.release(lease_at_once(sim, block, spent=True))
    assert (block.blank, block.ram.state, block.ram.readers) == (True, State.STALE, 1)
    (sim.fail if fails else sim.complete)(write)
    sim.pump()
    assert block.ram.state is State.ABSENT
    assert sim.placement.arenas[Tier.RAM].used_bytes == 0
    assert block.nvme_version < block.version


def test_a_failed_write_of_what_nobody_wants_any_more_is_no_failure() -> None:
    """evict() of the blank block, and whoever lacked room when nothing else could be done, were told of it."""
    sim = Sim(gpu=2, ram=2)
    block, write = spilling(sim)
    sim.release(lease_at_once(sim, block, spent=True))
    sim.fail(write)
    assert block.save_error is None
    assert not sim.placement.save_failed


def test_a_failure_to_save_is_forgotten_with_what_was_to_be_saved() -> None:
    sim = Sim(gpu=2, ram=2)
    block, write = spilling(sim)
    lease = lease_at_once(sim, block, spent=True)
    sim.placement.failed(write, OSError("full"))
    sim.flying.remove(write)
    assert block.save_error is not None
    sim.release(lease)
    assert not sim.placement.save_failed
    evict = Vacate("main", (block,))
    sim.scheduler.submit(evict)
    sim.settle()
    assert evict.resolved
    assert evict.error is None


def on_the_drive(sim: Sim) -> Record:
    """A block with content that only the drive has."""
    block = sim.declare("g", 1)
    sim.use(block, fresh=True)
    evict = Vacate("main", (block,))
    sim.scheduler.submit(evict)
    sim.settle()
    assert block.tiers == (Tier.NVME,)
    return block


def test_a_read_ahead_of_need_that_hangs_does_not_fail_who_needs_no_bytes() -> None:
    sim = Sim(gpu=2, ram=4)
    other, block = sim.put("other", 2), on_the_drive(sim)
    lease = sim.leased(sim.ask("one", (other,)))
    hold = Place("two", (block,), tier=Tier.RAM)
    sim.scheduler.submit(hold)
    sim.pump()
    read = only(sim, Action.READ)
    sim.scheduler.cancel(hold)
    wanted = sim.ask("main", (block,), fresh=(block,))
    assert isinstance(wanted, Use)
    sim.flying.remove(read)
    sim.placement.failed(read, OSError("gave up"), hung=True)
    sim.pump()
    assert not wanted.resolved
    sim.release(lease)
    sim.check_lease(sim.leased(wanted))


def test_nothing_is_fetched_ahead_into_an_extent_that_is_to_be_written_whole() -> None:
    sim = Sim(gpu=2, ram=4)
    block, weight = on_the_drive(sim), sim.put("w", 1, tier=Tier.NVME)
    wanted = sim.ask("main", (block, weight), fresh=(block,))
    sim.pump()
    assert block.gpu.state is State.RESERVED
    sim.scheduler.hint([block])
    sim.pump()
    assert [order.record for order in sim.flying] == [weight]
    sim.check_lease(sim.leased(wanted))


@pytest.mark.parametrize("used_up", [False, True])
def test_bytes_on_their_way_to_ram_are_not_what_is_written_whole_meanwhile(used_up: bool) -> None:
    sim = Sim(gpu=2, ram=4)
    block = on_the_drive(sim)
    hold = Place("main", (block,), tier=Tier.RAM)
    sim.scheduler.submit(hold)
    sim.pump()
    sim.scheduler.cancel(hold)
    lease = lease_at_once(sim, block, fresh=True, spent=used_up)
    if used_up:
        sim.release(lease)
    sim.complete(only(sim, Action.READ))
    sim.check_tiers()
    assert block.ram.state is (State.ABSENT if used_up else State.STALE)
    if not used_up:
        sim.check_lease(lease)
        sim.release(lease)
        sim.use(block)


def test_what_can_never_be_given_gives_back_what_it_was_given_at_once() -> None:
    sim = Sim(gpu=4, ram=8)
    weight, small, large = sim.put("w", 2), sim.declare("small", 1), sim.declare("large", 2)
    lease = sim.leased(sim.ask("main", (weight,)))
    with pytest.raises(CapacityError):
        sim.ask("main", (small, large), fresh=(small, large))
    assert (small.gpu.state, large.gpu.state) == (State.ABSENT, State.ABSENT)
    sim.release(lease)
    sim.use(small, large, fresh=True)


def test_what_was_given_at_once_goes_when_the_rest_comes_too_late() -> None:
    sim = Sim(gpu=4, ram=8)
    weight, small, large = sim.put("w", 2), sim.declare("small", 1), sim.declare("large", 2)
    lease = sim.leased(sim.ask("other", (weight,)))
    wanted = sim.ask("main", (small, large), fresh=(small, large))
    assert isinstance(wanted, Use)
    sim.settle()
    assert small.gpu.state is State.RESERVED
    sim.scheduler.cancel(wanted)
    assert (small.gpu.state, large.gpu.state) == (State.ABSENT, State.ABSENT)
    assert sim.placement.blank_bytes == small.nbytes + large.nbytes
    sim.release(lease)


def test_what_ram_holds_of_a_block_to_be_written_whole_makes_room_for_the_others() -> None:
    """RAM is full of it and of a small one, and the third must pass through: nobody will load what is about to be overwritten."""
    sim = Sim(gpu=6, ram=5)
    block, small, large = sim.declare("g", 3), sim.put("small", 2), sim.put("large", 3, tier=Tier.NVME)
    sim.use(block, fresh=True)
    sim.scheduler.submit(Save("main", ()))
    sim.settle()
    sim.placement.drop(block, Tier.GPU)
    assert (block.ram.state, small.ram.state, large.ram.state) == (State.CLEAN, State.CLEAN, State.ABSENT)
    lease = sim.leased(sim.ask("main", (large, block), fresh=(block,)))
    sim.check_lease(lease)
    sim.release(lease)


class Counting(Lookahead):
    """Counts how often it is asked what comes."""

    num_asked = 0

    def expected(self, position: int) -> BlockId | None:
        self.num_asked += 1
        return super().expected(position)


def test_what_is_used_up_is_not_looked_for_again() -> None:
    """It has no content, so nothing has to come before its next use: looking there each time took a period."""
    policy = Counting()
    sim = Sim(gpu=200, ram=200, policy=policy)
    weights = [sim.put(f"w{index}", 1, tier=Tier.GPU) for index in range(60)]
    gradients = [sim.declare(f"g{index}", 1) for index in range(60)]

    def step() -> None:
        for gradient in gradients:
            sim.use(gradient, fresh=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            sim.use(weight, write=True)
            sim.use(gradient, spent=True)

    for _ in range(8):
        step()
    assert policy.forecast.period == 180
    while sim.scheduler.advance()[1]:
        pass
    before = policy.num_asked
    step()
    assert policy.num_asked - before < 8 * 180, "it was the square of the number of accesses"
