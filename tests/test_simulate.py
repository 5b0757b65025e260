"""The simulation against cases small enough to be worked out by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.errors import CapacityError
from tierstore.placement import Limits
from tierstore.planner.simulate import LinkModel, Period, Simulation, Step, simulate
from tierstore.residency import Tier
from tierstore.trace import Kind, Link

FAST = dict.fromkeys(Link, LinkModel(1e9))  # a byte per nanosecond
MODES = pytest.mark.parametrize("device_ordered", [True, False], ids=["ordered", "threads"])


def run(steps: list[Step], blocks: dict[str, int], *, gpu: int, ram: int, policy: str = "lru", **more: object) -> Simulation:
    return simulate(steps, blocks, gpu_bytes=gpu, ram_bytes=ram, policy=policy, **({"links": FAST} | more))  # type: ignore[arg-type]


@MODES
def test_one_block_is_loaded_and_computed_on(device_ordered: bool) -> None:
    total = run([Step(("a",), compute_ns=70)], {"a": 100}, gpu=100, ram=100, device_ordered=device_ordered).total
    assert total.ns == 100 + 70
    assert total.traffic.keys() == {(Link.H2D, Kind.DEMAND)}
    assert (total.on(Link.H2D).transfers, total.on().bytes) == (1, 100)
    assert total.misses == {Tier.GPU: 1, Tier.RAM: 0}
    assert total.wait_ns == {"copy": 100}


@MODES
def test_latency_is_part_of_every_transfer(device_ordered: bool) -> None:
    links = dict.fromkeys(Link, LinkModel(2e9, latency_ns=30))
    steps = [Step(("a",), compute_ns=7), Step(("b",), compute_ns=7)]
    total = run(steps, {"a": 100, "b": 100}, gpu=100, ram=200, links=links, device_ordered=device_ordered).total
    assert total.ns == 2 * (30 + 50 + 7)


@MODES
def test_a_block_that_is_there_costs_only_its_computing(device_ordered: bool) -> None:
    steps = [Step(("a",), compute_ns=10)] * 5
    result = run(steps, {"a": 100}, gpu=100, ram=100, marks=[1, 3], device_ordered=device_ordered)
    assert [period.ns for period in result.periods] == [110, 20, 20]
    assert [period.steps for period in result.periods] == [1, 2, 2]
    assert [period.on().transfers for period in result.periods] == [1, 0, 0]
    assert result.total.ns == 150


@MODES
def test_a_written_block_goes_back_before_the_next_takes_its_room(device_ordered: bool) -> None:
    steps = [Step(("a",), frozenset({"a"}), 10), Step(("b",), compute_ns=10)]
    total = run(steps, {"a": 100, "b": 100}, gpu=100, ram=200, device_ordered=device_ordered).total
    assert total.ns == 100 + 10 + 100 + 100 + 10, "load, compute, write back, load, compute"
    assert total.on(Link.D2H).bytes == 100
    assert total.traffic[Link.D2H, Kind.WRITE_BACK].transfers == 1
    assert total.evictions[Tier.GPU] == 1


@MODES
def test_what_is_written_anew_is_not_loaded_and_what_is_used_up_not_written_back(device_ordered: bool) -> None:
    only = frozenset({"a"})
    steps = [
        Step(("a",), only, 10, fresh=only),
        Step(("a",), only, 10, spent=only),
        Step(("b",), compute_ns=10),
        Step(("a",), only, 10, fresh=only),
        Step(("b",), compute_ns=10),
    ]
    total = run(steps, {"a": 100, "b": 100}, gpu=100, ram=200, device_ordered=device_ordered).total
    assert total.on(Link.H2D).bytes == 200, "b, twice"
    assert total.on(Link.D2H).bytes == 100, "a, once: the first time nobody wanted it any more"
    assert total.misses[Tier.GPU] == 2


def test_a_host_that_runs_ahead_waits_for_no_load_to_land_before_the_next_is_ordered() -> None:
    """Block after block is written, with room for one more than is leased: it is asked for all of them at once."""
    names = [f"{number}" for number in range(20)]
    steps = [Step((name,), frozenset({name}), 1000) for name in names]
    total = run(steps, dict.fromkeys(names, 100), gpu=200, ram=2000).total
    assert total.ns == 100 + 20 * 1000
    assert set(total.wait_ns) == {"copy"}, "the host waits for nothing"


@MODES
def test_from_nvme_a_block_crosses_two_links(device_ordered: bool) -> None:
    """Block b finds no room in RAM at the start. To get in, a's first copy must be written down: it was never on NVMe."""
    total = run([Step(("b",), compute_ns=10)], {"a": 100, "b": 100}, gpu=100, ram=100, device_ordered=device_ordered).total
    assert total.ns == 100 + 100 + 100 + 10
    assert [total.on(link).bytes for link in (Link.NVME_WRITE, Link.NVME_READ, Link.H2D, Link.D2H)] == [100, 100, 100, 0]
    assert total.misses == {Tier.GPU: 1, Tier.RAM: 1}
    assert total.wait_ns == ({"nvme": 200, "copy": 100} if device_ordered else {"nvme": 300})


def test_with_a_device_that_orders_work_the_next_load_overlaps_computing() -> None:
    steps = [Step(("a",), compute_ns=150), Step(("b",), compute_ns=150)]
    blocks = {"a": 100, "b": 100}
    assert run(steps, blocks, gpu=200, ram=200).total.ns == 100 + 150 + 150, "b is copied while a is computed on"
    assert run(steps, blocks, gpu=200, ram=200, device_ordered=False).total.ns == 2 * 250


def test_the_host_stops_at_the_cap_on_running_ahead() -> None:
    steps = [Step(("a",), compute_ns=100)] * 6
    total = run(steps, {"a": 100}, gpu=100, ram=100, run_ahead=2).total
    assert total.ns == 700
    assert total.wait_ns["run-ahead"] == 500, "leaving the third lease it waits for the first to end, at 200; leaving the last, for 500"


@MODES
def test_threads_go_side_by_side(device_ordered: bool) -> None:
    steps = [Step((name,), compute_ns=100, thread=number) for number, name in enumerate("ab")]
    total = run(steps, {"a": 100, "b": 100}, gpu=200, ram=200, device_ordered=device_ordered).total
    assert total.ns == 300, "b's copy comes second, and its computing last" if device_ordered else "each computes behind its own copy"


def test_a_cycle_under_lru_misses_always() -> None:
    names = [f"{number}" for number in range(4)]
    steps = [Step((name,), compute_ns=1) for name in names] * 3
    result = run(steps, dict.fromkeys(names, 100), gpu=300, ram=400, marks=[4, 8], device_ordered=False)
    assert [period.misses[Tier.GPU] for period in result.periods] == [4, 4, 4]
    assert [period.ns for period in result.periods] == [404, 404, 404]


def test_moves_within_the_device_cost_time_if_they_are_said_to() -> None:
    """A block of three does not fit between two that stay, until one of these has moved."""
    sizes = {"x": 100, "a": 100, "y": 100, "b": 100, "big": 200}
    steps = [Step((name,)) for name in ("x", "a", "y", "b", "a", "b", "big")]
    free = run(steps, sizes, gpu=400, ram=600, device_ordered=False)
    slow = run(steps, sizes, gpu=400, ram=600, device_ordered=False, moving=LinkModel(1e9, latency_ns=5))
    assert slow.total.ns == free.total.ns + 105
    assert slow.total.on().bytes == free.total.on().bytes


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(CapacityError):
        run([], {"a": 100}, gpu=50, ram=100)
    with pytest.raises(CapacityError):
        run([Step(("a", "b"))], {"a": 100, "b": 100}, gpu=150, ram=200)


STEPS = st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 300), st.integers(0, 1)), max_size=40)


@given(STEPS, st.integers(2, 6), st.integers(2, 8), st.sampled_from(["lru", "lookahead", "static"]), st.booleans())
def test_the_parts_add_up(drawn: list[tuple[int, bool, int, int]], gpu: int, ram: int, policy: str, device_ordered: bool) -> None:
    steps = [Step((f"{number}",), frozenset({f"{number}"} if write else ()), ns, thread) for number, write, ns, thread in drawn]
    blocks = {f"{number}": 100 for number in range(6)}
    marks = [len(steps) // 3, 2 * len(steps) // 3]

    def once() -> Simulation:
        return run(steps, blocks, gpu=gpu * 100, ram=ram * 100, policy=policy, marks=marks, device_ordered=device_ordered)

    result = once()
    assert result == once(), "the same every time"
    assert sum(period.ns for period in result.periods) == result.total.ns
    assert result.total.steps == result.total.accesses == len(steps)
    for links in ((), (Link.H2D,)):
        assert sum(period.on(*links).bytes for period in result.periods) == result.total.on(*links).bytes
    assert result.total.ns >= sum(step.compute_ns for step in steps if device_ordered or step.thread == 0)
    assert result.total.ns >= result.total.on(Link.H2D, kind=Kind.DEMAND).bytes, "the last of these was waited for"
    assert result.total.misses[Tier.RAM] <= result.total.misses[Tier.GPU] <= result.total.accesses
    assert result.total.on(Link.H2D).transfers >= len({number for number, *_ in drawn})


def test_a_long_run_is_quick() -> None:
    """Not a benchmark: a run that should take a second must not take a minute."""
    choose = random.Random(0)
    names = [f"{number}" for number in range(50)]
    steps = [Step((choose.choice(names),), compute_ns=10) for _ in range(20_000)]
    total = run(steps, dict.fromkeys(names, 100), gpu=2000, ram=6000, limits=Limits(max_orders=4)).total
    assert isinstance(total, Period)
    assert total.steps == 20_000
