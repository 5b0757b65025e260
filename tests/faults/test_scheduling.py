"""What the scheduler makes of failed transfers: who is told, what is tried again, and what stays out of use."""

from __future__ import annotations

import pytest

from tests.helpers import check_scheduler
from tests.test_scheduler import Sim
from tierstore.catalog import PAGE
from tierstore.errors import CapacityError
from tierstore.requests import Action, HostAccess, Order, Place, Record, Request, Save, Use, Vacate
from tierstore.residency import State, Tier


def on_nvme(sim: Sim, *names: str, pages: int = 1) -> tuple[Record, ...]:
    return tuple(sim.put(name, pages, tier=Tier.NVME) for name in names)


def flying(sim: Sim, action: Action) -> list[Order]:
    return [order for order in sim.flying if order.action is action]


def submit(sim: Sim, request: Request) -> Request:
    sim.scheduler.submit(request)
    sim.pump()
    return request


def ended_well(sim: Sim, request: Request) -> None:
    sim.settle()
    assert request.resolved, f"{request} hangs"
    assert request.error is None, request.error
    sim.check_tiers()


def hang(sim: Sim, order: Order) -> None:
    """The engine gives the order up."""
    sim.flying.remove(order)
    sim.placement.failed(order, OSError("no answer"), hung=True)
    check_scheduler(sim.scheduler)


def test_a_retry_does_not_inherit_the_failure_of_a_write_back_begun_before_it() -> None:
    sim = Sim(gpu=4, ram=8)
    sim.put("a", 1)
    sim.put("b", 1)
    first = submit(sim, Save("main", ()))
    one, other = flying(sim, Action.WRITE)
    sim.fail(one)
    sim.pump()
    assert isinstance(first.error, OSError)
    again = submit(sim, Save("main", ()))
    sim.fail(other)
    ended_well(sim, again)


def test_a_retry_does_not_inherit_the_failure_of_a_read_begun_before_it() -> None:
    sim = Sim(gpu=4, ram=8)
    blocks = on_nvme(sim, "a", "b")
    first = submit(sim, Use("main", blocks))
    one, other = flying(sim, Action.READ)
    sim.fail(one)
    sim.pump()
    assert isinstance(first.error, OSError)
    again = submit(sim, Use("main", blocks))
    sim.fail(other)
    ended_well(sim, again)


def test_a_read_that_fails_again_is_not_tried_for_ever() -> None:
    sim = Sim(gpu=4, ram=8)
    (block,) = on_nvme(sim, "a")
    request = submit(sim, Use("main", (block,)))
    sim.fail(flying(sim, Action.READ)[0])
    sim.pump()
    assert isinstance(request.error, OSError)
    assert not sim.flying


@pytest.mark.parametrize(
    "make",
    [
        lambda block: Vacate("main", (block,)),
        lambda block: HostAccess("main", (block,), write=True),
        lambda block: HostAccess("main", (block,)),
        lambda block: Save("main", ()),
    ],
    ids=["evict", "write or delete", "read", "flush"],
)
def test_a_failed_read_ahead_is_nothing_to_who_needs_no_bytes(make: object) -> None:
    sim = Sim(gpu=4, ram=8)
    (block,) = on_nvme(sim, "a")
    sim.scheduler.hint([block])
    sim.pump()
    (read,) = flying(sim, Action.READ)
    assert callable(make)
    request = submit(sim, make(block))
    sim.fail(read)
    ended_well(sim, request)


def test_a_hold_in_ram_hears_that_the_copy_from_the_device_failed() -> None:
    """It tried again and again, as fast as it could."""
    sim = Sim(gpu=4, ram=8)
    block = sim.put("a", 1, tier=Tier.GPU)
    request = submit(sim, Place("main", (block,), tier=Tier.RAM))
    sim.fail(flying(sim, Action.D2H)[0])
    sim.pump()
    assert isinstance(request.error, OSError)
    assert not sim.flying
    assert block.gpu.state is State.DIRTY
    ended_well(sim, submit(sim, Place("main", (block,), tier=Tier.RAM)))


def test_a_hung_read_keeps_its_extent_and_nothing_else() -> None:
    sim = Sim(gpu=4, ram=4)
    blocks = on_nvme(sim, "a", "b", pages=2)
    request = submit(sim, Use("main", (blocks[0],)))
    (read,) = flying(sim, Action.READ)
    hang(sim, read)
    sim.pump()
    assert isinstance(request.error, OSError)
    assert sim.placement.quarantined == {read.offset_ram: 2 * PAGE}
    assert sim.placement.arenas[Tier.RAM].used_bytes == 2 * PAGE
    assert sim.placement.link_free
    for block in (*blocks, *blocks):  # through the other half of RAM, evictions included
        sim.use(block, write=True)
        assert block.ram.offset != read.offset_ram
    sim.contents[Tier.RAM][read.offset_ram] = None  # what hung arrives after all
    sim.check_tiers()
    sim.placement.end_quarantine(read.offset_ram)
    check_scheduler(sim.scheduler)
    assert sim.placement.arenas[Tier.RAM].largest_hole >= 2 * PAGE or all(block.ram.offset >= 0 for block in blocks)


def test_a_ram_full_of_hung_reads_is_told_and_not_waited_for() -> None:
    sim = Sim(gpu=4, ram=4)
    blocks = on_nvme(sim, "a", "b", "c", pages=2)
    for block in blocks[:2]:
        submit(sim, Use("main", (block,)))
        hang(sim, flying(sim, Action.READ)[0])
        sim.pump()
    request = submit(sim, Use("main", (blocks[2],)))
    sim.settle()
    assert request.resolved, "it hangs"
    assert isinstance(request.error, CapacityError)
    assert f"{4 * PAGE} bytes" in str(request.error)
    assert "do not return" in str(request.error)
    for offset in list(sim.placement.quarantined):
        sim.placement.end_quarantine(offset)
    ended_well(sim, submit(sim, Use("main", (blocks[2],))))


def test_what_is_quarantined_is_not_moved() -> None:
    sim = Sim(gpu=8, ram=8)
    blocks = on_nvme(sim, "a", "b", "c", "d", pages=2)
    submit(sim, Use("main", blocks))
    reads = flying(sim, Action.READ)
    hang(sim, reads[1])
    for read in reads[2:]:
        sim.complete(read)
    sim.complete(reads[0])
    sim.settle()
    for block in (blocks[0], blocks[2], blocks[3], blocks[1]):
        sim.use(block)
    large = sim.put("large", 4, tier=Tier.NVME)
    offset = reads[1].offset_ram
    try:
        sim.use(large)
    except CapacityError:  # beside it there may be no hole so large
        assert offset in (2 * PAGE, 4 * PAGE)
    assert list(sim.placement.quarantined) == [offset]
    check_scheduler(sim.scheduler)
