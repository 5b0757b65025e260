"""Blocks without content, as the scheduler sees them: states that a store comes to rarely, made on purpose."""

from __future__ import annotations

import pytest

from tests.test_scheduler import Sim
from tierstore.requests import Action, Lease, Order, Save, Use, Vacate
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
