"""`lookahead` against the optimum, found by other code than the product's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_scheduler import Sim
from tierstore.policies import Lookahead
from tierstore.requests import Action, Order, Record

LAYERS = 24
CYCLIC = list(range(LAYERS))
FORWARD_BACKWARD = [*range(LAYERS), *reversed(range(LAYERS))]
STATES = [(layer, LAYERS + layer, 2 * LAYERS + layer) for layer in range(LAYERS)]  # parameters and two moments
WITH_STEP = [*FORWARD_BACKWARD, *(number for state in STATES for number in state)]
UPDATE_IN_BACKWARD = [*range(LAYERS), *(number for state in reversed(STATES) for number in state)]
ORDERS = {"cyclic": CYCLIC, "forward+backward": FORWARD_BACKWARD, "with step": WITH_STEP, "update in backward": UPDATE_IN_BACKWARD}


def belady(trace: list[int], room: int, resident: set[int]) -> list[bool]:
    """Per access: whether the optimal replacement misses, beginning with these blocks."""
    following = [0] * len(trace)
    last: dict[int, int] = {}
    for index in reversed(range(len(trace))):
        following[index] = last.get(trace[index], len(trace) + trace[index])
        last[trace[index]] = index
    cache = {block: last.get(block, len(trace) + block) for block in resident}
    missed = []
    for index, block in enumerate(trace):
        missed.append(block not in cache)
        if block not in cache and len(cache) == room:
            del cache[max(cache, key=lambda other: cache[other])]
        cache[block] = following[index]
    return missed


class Loads(Sim):
    """Counts the loads of each block to the device."""

    def __init__(self, period: list[int], room: int) -> None:
        num_blocks = max(period) + 1
        super().__init__(gpu=room, ram=num_blocks + 4, policy=Lookahead())
        self.loads_of: dict[int, int] = {}
        self.records: list[Record] = [self.put(f"{number}", 1) for number in range(num_blocks)]

    def _start(self, order: Order) -> None:
        if order.action is Action.H2D:
            assert order.record is not None
            self.loads_of[order.record.id] = self.loads_of.get(order.record.id, 0) + 1
        super()._start(order)

    def resident(self) -> set[int]:
        return {number for number, record in enumerate(self.records) if record.gpu.valid}


def loads_per_access(sim: Loads, trace: list[int]) -> list[int]:
    """Loads that each access cost, whenever they were ordered: those of its block since its last access.

    What was loaded and evicted unused is counted to the block's next access, so nothing is left out.
    """
    costs = []
    for number in trace:
        sim.use(sim.records[number])
        costs.append(sim.loads_of.pop(sim.records[number].id, 0))
    return costs


def check_equal(period: list[int], room: int, periods: int) -> None:
    sim = Loads(period, room)
    loads_per_access(sim, period * 2)
    early = {block: sim.loads_of.get(sim.records[block].id, 0) for block in sim.resident()}
    start = sim.resident()
    costs = loads_per_access(sim, period * periods)
    # what was fetched for the third period in the second is charged to it, and so it is to the optimum
    ahead = {block for block, loads in early.items() if loads}
    best = belady(period * (periods + 3), room, start)
    first = {period.index(block) for block in ahead if block in period}
    wanted = [int(missed) + (index in first) for index, missed in enumerate(best[: len(costs)])]
    assert [sum(costs[at : at + len(period)]) for at in range(0, len(costs), len(period))] == [
        sum(wanted[at : at + len(period)]) for at in range(0, len(costs), len(period))
    ]
    assert costs == wanted


@pytest.mark.parametrize("share", [25, 50, 75])
@pytest.mark.parametrize("name", ORDERS)
def test_from_the_third_period_on_it_loads_what_belady_loads(name: str, share: int) -> None:
    period = ORDERS[name]
    check_equal(period, len(set(period)) * share // 100, periods=10)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.integers(2, 8))
def test_on_any_period(period: list[int], room: int) -> None:
    check_equal(period, room, periods=6)
