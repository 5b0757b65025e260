"""`lookahead` against the optimum, found by other code than the product's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.test_scheduler import Sim
from tierstore.planner.simulate import LinkModel, Step, simulate
from tierstore.policies import Lookahead
from tierstore.requests import Action, Order, Record
from tierstore.trace import Link

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
        self.policy = Lookahead()
        super().__init__(gpu=room, ram=num_blocks + 4, policy=self.policy)
        self.loads_of: dict[int, int] = {}
        self.records: list[Record] = [self.put(f"{number}", 1) for number in range(num_blocks)]

    def _start(self, order: Order) -> None:
        if order.action is Action.H2D:
            assert order.record is not None
            self.loads_of[order.record.id] = self.loads_of.get(order.record.id, 0) + 1
        super()._start(order)

    @property
    def choices(self) -> object:
        """Which plan is gone by."""
        return self.policy._choices

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


def check_equal(period: list[int], room: int, periods: int, *, each_access: bool = True) -> None:
    """At each access the loads that Belady's rule costs, or as many in each period: other sets of them may be as good.

    Where a plan takes the place of the rule, what had been kept for the one may have to be fetched again for the other, once.
    """
    sim = Loads(period, room)
    loads_per_access(sim, period * 2)
    early = {block: sim.loads_of.get(sim.records[block].id, 0) for block in sim.resident()}
    start = sim.resident()
    # what was fetched for the third period in the second is charged to it, and so it is to the optimum
    first = {period.index(block) for block, loads in early.items() if loads and block in period}
    best = belady(period * (periods + 3), room, start)
    for at in range(0, periods * len(period), len(period)):
        choices = sim.choices
        costs = loads_per_access(sim, period)
        wanted = [int(missed) + (index in first) for index, missed in enumerate(best[at : at + len(period)], start=at)]
        if each_access:
            assert costs == wanted
        else:
            assert 0 <= sum(costs) - sum(wanted) <= (room if sim.choices is not choices else 0)


@pytest.mark.parametrize("share", [25, 50, 75])
@pytest.mark.parametrize("name", ORDERS)
def test_from_the_third_period_on_it_loads_what_belady_loads(name: str, share: int) -> None:
    period = ORDERS[name]
    check_equal(period, len(set(period)) * share // 100, periods=10)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.integers(2, 8))
@example([3, 1, 2, 1, 1, 4, 2, 1, 0, 5, 2, 1, 4, 0, 3, 5, 6, 6, 2, 1, 3, 6, 2, 3, 2, 6, 1], 2)
@example([0, 0, 1, 0, 2, 9, 0, 5, 0, 2, 0, 1, 0, 2, 8, 0, 5, 0, 3, 4, 6, 5, 7, 3, 4], 3)
def test_on_any_period(period: list[int], room: int) -> None:
    check_equal(period, room, periods=6, each_access=False)


# -- sizes, dirtiness, link speeds, time -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A period of single leases on a device and a RAM that holds everything.

    Attributes:
        period: (block, whether it is written) per access.
        sizes: Bytes by block.
        room: Bytes of the device.
        compute: Nanoseconds per access.
        save: Nanoseconds per byte from the device; to the device it is one.
    """

    period: tuple[tuple[int, bool], ...]
    sizes: tuple[int, ...]
    room: int
    compute: int
    save: float = 1.0


def played(case: Case, policy: str, *, periods: int = 60, measured: int = 30, device_ordered: bool = False) -> tuple[float, float]:
    """(nanoseconds, bytes moved) per period, once it has settled."""
    steps = [
        Step((f"{block}",), frozenset({f"{block}"} if write else ()), case.compute) for _ in range(periods) for block, write in case.period
    ]
    links = {link: LinkModel(1e9 / case.save if link is Link.D2H else 1e9) for link in Link}
    marks = [(periods - measured - 1) * len(case.period), (periods - 1) * len(case.period)]
    result = simulate(
        steps,
        {f"{block}": size for block, size in enumerate(case.sizes)},
        gpu_bytes=case.room,
        ram_bytes=2 * sum(case.sizes),
        policy=policy,
        links=links,
        marks=marks,
        device_ordered=device_ordered,
    )
    period = result.periods[1]
    return period.ns / measured, period.on(Link.H2D, Link.D2H).bytes / measured


State = frozenset[tuple[int, bool]]
"""The blocks on the device, and whether each is dirty."""


def leaving(state: State, need: int, case: Case) -> Iterator[tuple[tuple[int, bool], ...]]:
    """Each smallest set of blocks whose going leaves room for `need` bytes."""
    free = case.room - sum(case.sizes[block] for block, _ in state)
    if free >= need:
        yield ()
        return
    for count in range(1, len(state) + 1):
        for chosen in combinations(sorted(state), count):
            freed = [case.sizes[block] for block, _ in chosen]
            if free + sum(freed) >= need > free + sum(freed) - min(freed):
                yield chosen


def after(state: State, block: int, write: bool, gone: tuple[tuple[int, bool], ...]) -> State:
    dirty = write or (block, True) in state
    return frozenset((state - set(gone) - {(block, False), (block, True)}) | {(block, dirty)})


def least_bytes(case: Case, periods: int) -> float:
    """The fewest bytes per period of any schedule of so many periods, from whatever start: exhaustive, by dynamic programming."""
    every = range(len(case.sizes))
    starts = {frozenset(zip(chosen, flags, strict=True)) for n in range(len(every) + 1) for chosen in combinations(every, n)
              if sum(case.sizes[block] for block in chosen) <= case.room for flags in product((False, True), repeat=n)}  # fmt: skip
    costs: dict[State, int] = dict.fromkeys(starts, 0)
    for block, write in case.period * periods:
        following: dict[State, int] = {}
        for state, cost in costs.items():
            here = (block, False) in state or (block, True) in state
            for gone in [()] if here else leaving(state, case.sizes[block], case):
                moved = 0 if here else case.sizes[block] + sum(case.sizes[other] for other, dirty in gone if dirty)
                reached = after(state, block, write, gone)
                following[reached] = min(cost + moved, following.get(reached, 1 << 60))
        costs = following
    return min(costs.values()) / periods


Plan = tuple[tuple[tuple[int, bool], ...] | None, ...]
"""Per access: which blocks leave for it; None where it finds its block."""


def plans(case: Case) -> Iterator[Plan]:
    """Every plan that can repeat: after one period the device holds what it held before."""

    def go(at: int, state: State, start: State, plan: Plan) -> Iterator[Plan]:
        if at == len(case.period):
            if state == start:
                yield plan
            return
        block, write = case.period[at]
        if (block, False) in state or (block, True) in state:
            yield from go(at + 1, after(state, block, write, ()), start, (*plan, None))
            return
        for gone in leaving(state, case.sizes[block], case):
            yield from go(at + 1, after(state, block, write, gone), start, (*plan, gone))

    every = range(len(case.sizes))
    for count in range(1, len(every) + 1):
        for chosen in combinations(every, count):
            if sum(case.sizes[block] for block in chosen) <= case.room:
                for flags in product((False, True), repeat=count):
                    start = frozenset(zip(chosen, flags, strict=True))
                    yield from go(0, start, start, ())


def cost_of(case: Case, plan: Plan, periods: int = 8) -> tuple[float, float]:
    """(nanoseconds, bytes) per period of a plan, each transfer begun as early as the order of the plan allows."""
    now = loads_free = saves_free = 0.0
    over: dict[int, float] = {}
    half = 0.0
    moved = 0
    for number in range(periods):
        if number == periods // 2:
            half, moved = now, 0
        for (block, _), gone in zip(case.period, plan, strict=True):
            if gone is not None:
                free = 0.0
                for other, dirty in gone:
                    free = max(free, over.get(other, 0.0))
                    if dirty:
                        saves_free = max(saves_free, over.get(other, 0.0)) + case.sizes[other] * case.save
                        free = max(free, saves_free)
                        moved += case.sizes[other]
                loads_free = max(loads_free, free) + case.sizes[block]
                moved += case.sizes[block]
                now = max(now, loads_free)
            now += case.compute
            over[block] = now
    return (now - half) / (periods - periods // 2), moved / (periods - periods // 2)


def search(case: Case) -> list[tuple[float, float]]:
    return [cost_of(case, plan) for plan in plans(case)]


def cycle(num_blocks: int, *written: int) -> tuple[tuple[int, bool], ...]:
    return tuple((block, block in written) for block in range(num_blocks))


def there_and_back(num_blocks: int, write: bool) -> tuple[tuple[int, bool], ...]:
    return tuple((block, write) for block in [*range(num_blocks), *reversed(range(num_blocks))])


EQUAL = (100,) * 5
SHAPES = {
    "cycle": (cycle(5), EQUAL, 300, 1.0),
    "written cycle": (cycle(5, *range(5)), EQUAL, 300, 1.0),
    "partly written, slow to save": (cycle(5, 1, 3), EQUAL, 400, 4.0),
    "there and back": (there_and_back(4, False), EQUAL[:4], 200, 1.0),
    "there and back, written": (there_and_back(4, True), EQUAL[:4], 300, 2.0),
    "sizes": (cycle(5, 4), (300, 100, 50, 50, 100), 400, 3.0),
    "sizes that do not fit together": (cycle(5, 0, 2), (100, 200, 50, 150, 100), 400, 1.0),
}
SCATTERED = {("sizes that do not fit together", 50): 1.11, ("sizes that do not fit together", 100): 1.19}
"""Time over the search's, which knows no addresses: here a leased extent lies between the holes, and cannot be moved."""


@pytest.mark.parametrize("compute", [10, 50, 100, 250])
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_much_faster_and_what_is_as_fast_moves_no_less(shape: str, compute: int) -> None:
    """Against every plan that can repeat, and all policies: time within 3 %, and bytes within 3 % of the least at such a time.

    Fewest bytes and least time at once cannot be asked for: five equal blocks in turn, room for three, all written, copies as long
    as computing. Belady's rule moves 480 bytes a period, the least there are (`least_bytes`), and leaves no extent to copy through
    while others are computed on: 800 ns. 500 ns need three extents to rotate through, for the copy in, the computing and the copy out,
    so that nothing stays, and 1000 bytes are moved. Both ends are right; the store takes the fast one.
    """
    period, sizes, room, save = SHAPES[shape]
    case = Case(period, sizes, room, compute, save)
    others = [played(case, policy) for policy in ("static", "lru")]
    found = search(case)
    time, moved = played(case, "lookahead")
    least_time = min(ns for ns, _ in [*found, *others])
    assert time <= SCATTERED.get((shape, compute), 1.03) * least_time
    assert moved <= 1.03 * min(nbytes for ns, nbytes in [*found, *others] if ns <= 1.03 * least_time)


@pytest.mark.parametrize("shape", ["cycle", "written cycle", "there and back", "there and back, written"])
def test_where_copies_take_no_time_worth_hiding_it_moves_the_least(shape: str) -> None:
    """Computing takes a thousand times as long as a copy: then no byte is moved for speed."""
    period, sizes, room, save = SHAPES[shape]
    case = Case(period, sizes, room, 100_000, save)
    _, moved = played(case, "lookahead", periods=80, measured=60)
    assert moved <= 1.03 * least_bytes(case, 100)


TRAINING = {
    "cyclic": [(block, False) for block in range(12)],
    "cyclic, written": [(block, True) for block in range(12)],
    "forward+backward": [(block, False) for block in [*range(12), *reversed(range(12))]],
    "with step": [
        *((block, False) for block in [*range(8), *reversed(range(8))]),
        *((block, True) for layer in range(8) for block in (layer, 8 + layer, 16 + layer)),
    ],
}


@pytest.mark.parametrize("device_ordered", [False, True], ids=["threads", "ordered"])
@pytest.mark.parametrize("compute", [10, 100])
@pytest.mark.parametrize("share", [50, 75])
@pytest.mark.parametrize("name", ["cyclic", "forward+backward", "with step"])
def test_no_other_policy_is_faster_with_all_in_ram(name: str, share: int, compute: int, device_ordered: bool) -> None:
    period = TRAINING[name]
    num_blocks = len({block for block, _ in period})
    case = Case(tuple(period), (100,) * num_blocks, num_blocks * share // 100 * 100, compute)
    times = {
        policy: played(case, policy, periods=80, measured=20, device_ordered=device_ordered)[0] for policy in ("lookahead", "static", "lru")
    }
    # how long a device computes that orders work by itself is not told, only inferred
    assert times["lookahead"] <= (1.05 if device_ordered else 1.03) * min(times.values()), times


@pytest.mark.parametrize(
    ("name", "gpu", "ram", "bound"),
    [("cyclic", 3, 7, 1.03), ("cyclic, written", 3, 8, 1.03), ("forward+backward", 3, 7, 1.03), ("with step", 6, 13, 1.03)],
)
def test_no_other_policy_is_faster_with_a_drive_below(name: str, gpu: int, ram: int, bound: float) -> None:
    """The drive is five times as slow as the device's links."""
    period = TRAINING[name]
    steps = [Step((f"{block}",), frozenset({f"{block}"} if write else ()), 10) for _ in range(50) for block, write in period]
    blocks = {f"{block}": 100 for block in sorted({block for block, _ in period})}
    links = {link: LinkModel(1e9 if link in (Link.H2D, Link.D2H) else 2e8) for link in Link}
    marks = [29 * len(period), 49 * len(period)]
    times = {}
    for policy in ("lookahead", "static", "lru"):
        result = simulate(
            steps, blocks, gpu_bytes=gpu * 100, ram_bytes=ram * 100, policy=policy, links=links, marks=marks, device_ordered=False
        )
        times[policy] = result.periods[1].ns
    assert times["lookahead"] <= bound * min(times.values()), times
