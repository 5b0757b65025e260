"""How long callers compute, told from the marks of their leases: on a clock, and on a device that runs behind. How fast links are."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierstore import TierStore
from tierstore.pace import ENOUGH, PAUSE, REMEMBERED, SETTLED_AT_ONCE, UNSETTLED, Pace, Rates
from tierstore.policies import Lookahead
from tierstore.trace import Link


def lease(pace: Pace, position: int, now: int, *, waits: int = 0, leased: int = 0, count: int = 1) -> int:
    """Make the marks of a lease, and return when it has ended."""
    span = pace.asked(position, count, now)
    span.granted = now + waits
    span.released = now + waits + leased
    return now + waits + leased


def settled(pace: Pace, position: int, now: int) -> None:
    for number in range(SETTLED_AT_ONCE + 1):
        now = lease(pace, position + number, now) + 1


def test_waits_are_left_out() -> None:
    pace, now = Pace(), 0
    for position in range(100):
        now = lease(pace, position, now, waits=700, leased=60) + 40
    settled(pace, 100, now)
    assert pace.computed(50) == (pytest.approx(60e-9), pytest.approx(40e-9))


def test_the_average_is_of_all_that_is_computed() -> None:
    pace, now = Pace(), 0
    for position in range(200):
        now = lease(pace, position, now, waits=700, leased=60) + 40
    assert pace.seconds == pytest.approx(100e-9)


def test_a_lease_of_several_blocks_counts_for_each() -> None:
    pace, now = Pace(), 0
    for number in range(100):
        now = lease(pace, 4 * number, now, leased=300, count=4) + 100
    assert pace.seconds == pytest.approx(100e-9)
    assert [pace.computed(position) for position in range(4, 8)] == [(0.0, 0.0)] * 3 + [(pytest.approx(300e-9), pytest.approx(100e-9))]


def test_a_lease_inside_of_another_ends_what_is_known_of_the_outer_one() -> None:
    pace = Pace()
    outer = pace.asked(0, 1, 0)
    outer.granted = 10
    now = lease(pace, 1, 50, leased=5)
    outer.released = now + 100
    settled(pace, 2, now + 100)
    assert pace.computed(0) == (pytest.approx(40e-9), 0.0)


def test_what_the_device_has_not_come_to_is_told_later() -> None:
    pace, come_to = Pace(), 0
    pace.between = lambda first, second: (second - first) / 1e9 if second <= come_to else None
    now = 0
    for position in range(100):
        now = lease(pace, position, now, leased=10) + 10
    assert pace.computed(0) is None
    come_to = now
    settled(pace, 100, now)
    assert pace.computed(0) == (pytest.approx(10e-9), pytest.approx(10e-9))
    assert pace.computed(90) is not None


def test_marks_that_never_come_are_not_kept_for_ever() -> None:
    pace = Pace()
    pace.between = lambda first, second: None
    for position in range(UNSETTLED + 1000):
        lease(pace, position, position)
    assert len(pace._spans) <= UNSETTLED + SETTLED_AT_ONCE
    assert pace.seconds == 0.0


def test_who_was_never_granted_a_lease_has_not_computed() -> None:
    pace = Pace()
    pace.asked(0, 1, 0)
    settled(pace, 1, 100)
    assert pace.computed(0) is None


def test_a_pause_hardly_moves_the_average() -> None:
    pace, now = Pace(), 0
    for position in range(600):
        now = lease(pace, position, now, leased=100) + (10**9 if position == 300 else 0)
    assert pace.seconds < (1 + PAUSE / 100) * 100e-9


def test_what_was_not_measured_belongs_to_no_lease() -> None:
    pace = Pace()
    now = lease(pace, 0, 0, leased=10) + 10
    settled(pace, 5, now + 10**9)
    assert pace.computed(0) is None
    assert pace.seconds < 1e-6
    assert pace.computed(5) is not None


def test_positions_long_past_are_forgotten() -> None:
    pace, now = Pace(), 0
    for position in range(REMEMBERED + 100):
        now = lease(pace, position, now, leased=1) + 1
    assert pace.computed(50) is None
    assert pace.computed(150) is not None
    assert pace.computed(-1) is None


def test_after_the_end_neither_marks_are_kept_nor_who_compares_them() -> None:
    """A policy that a caller keeps would keep the copies of a closed store, and their events."""
    policy = Lookahead()
    with TierStore(gpu="1MB", ram="4MB", device="cpu", policy=policy) as store:
        copies = weakref.ref(store.engine.copies)
        for number in range(8):
            store.put(f"b{number}", torch.zeros(60_000))
        for number in range(40):
            with store.use(f"b{number % 8}"):
                pass
        pace = store.engine.placement.pace
        assert pace._spans
    assert not pace._spans
    del store
    gc.collect()
    assert copies() is None


ASSUMED = dict.fromkeys(Link, 1e-9)


def test_a_rate_is_what_was_assumed_until_enough_was_measured() -> None:
    rates = Rates(ASSUMED)
    for _ in range(ENOUGH):
        rates.took(Link.H2D, 1000, 5e-6)  # nobody wants to know
    rates.measure(True)
    for _ in range(ENOUGH - 1):
        rates.took(Link.H2D, 1000, 2e-6)
        assert rates.seconds_per_byte(Link.H2D) == 1e-9
    rates.took(Link.H2D, 1000, 2e-6)
    assert rates.seconds_per_byte(Link.H2D) == pytest.approx(2e-9)
    assert rates.seconds_per_byte(Link.D2H) == 1e-9
    rates.measure(False)
    rates.took(Link.H2D, 1000, 1.0)
    assert rates.seconds_per_byte(Link.H2D) == pytest.approx(2e-9)
    rates.measure(True)
    for _ in range(ENOUGH):
        rates.took(Link.H2D, 1000, 3e-6)
    assert rates.seconds_per_byte(Link.H2D) == pytest.approx(3e-9), "measured anew, not on average with what was"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30), st.booleans()), min_size=ENOUGH, max_size=40))
def test_transfers_side_by_side_share_the_time_in_which_any_was_under_way(drawn: list[tuple[int, int, bool]]) -> None:
    rates = Rates(ASSUMED)
    rates.measure(True)
    transfers = [(begin, begin + lasts, 1000 * (not fails)) for begin, lasts, fails in drawn]
    events = sorted([(end, 0, nbytes) for _, end, nbytes in transfers] + [(begin, 1, 0) for begin, _, _ in transfers])
    for now, begins, nbytes in events:
        if begins:
            rates.started(Link.NVME_READ, now)
        else:
            rates.ended(Link.NVME_READ, nbytes, now)
    if sum(nbytes > 0 for *_, nbytes in transfers) < ENOUGH:
        assert rates.seconds_per_byte(Link.NVME_READ) == 1e-9
        return
    busy = len({tick for begin, end, _ in transfers for tick in range(begin, end)})
    total = sum(nbytes for *_, nbytes in transfers)
    assert rates.seconds_per_byte(Link.NVME_READ) <= busy / total / 1e9 * 1.000001
    if all(nbytes for *_, nbytes in transfers):
        assert rates.seconds_per_byte(Link.NVME_READ) == pytest.approx(busy / total / 1e9)


def test_what_was_under_way_when_measuring_began_counts_from_then_on_only_by_what_it_takes() -> None:
    rates = Rates(ASSUMED)
    rates.started(Link.NVME_WRITE, 0)
    rates.measure(True)
    rates.ended(Link.NVME_WRITE, 1000, 100)
    for number in range(ENOUGH):
        rates.started(Link.NVME_WRITE, 1000 * number + 1000)
        rates.ended(Link.NVME_WRITE, 1000, 1000 * number + 1100)
    assert rates.seconds_per_byte(Link.NVME_WRITE) == pytest.approx(100e-9 / 1000)


def test_to_say_again_that_links_are_to_be_measured_changes_nothing() -> None:
    rates = Rates(ASSUMED)
    for _ in range(ENOUGH):
        rates.measure(True)
        rates.took(Link.H2D, 1000, 2e-6)
    assert rates.seconds_per_byte(Link.H2D) == pytest.approx(2e-9)


def test_a_transfer_under_way_is_not_forgotten_by_beginning_to_measure() -> None:
    rates = Rates(ASSUMED)
    busy = rates._busy[Link.NVME_READ]
    rates.measure(True)
    assert rates._busy[Link.NVME_READ] is busy, "who counts a transfer on another thread holds it"


@given(st.integers(1, 200), st.integers(0, 6))
def test_copies_that_the_host_was_late_to_queue_do_not_make_a_link_slow(number: int, late: int) -> None:
    """A mark before a copy may come long before the copy: the host gives up the interpreter's lock in between."""
    rates = Rates(ASSUMED)
    rates.measure(True)
    for turn in range(ENOUGH + number):
        rates.took(Link.H2D, 1000, 2e-6 + (turn % 2 and turn % 7 < late) * 1.0)
        rates.took(Link.D2H, 10, 1.0)
        rates.took(Link.D2H, 100_000, 3e-4)
    assert rates.seconds_per_byte(Link.H2D) == pytest.approx(2e-9)
    assert rates.seconds_per_byte(Link.D2H) == pytest.approx(3e-9), "by bytes, not by copies"


@pytest.mark.parametrize("policy", ["lookahead", "lru"])
def test_a_store_plans_with_rates_that_it_has_measured(policy: str) -> None:
    """Only a policy that plans has links measured."""
    with TierStore(gpu="1MB", ram="4MB", device="cpu", policy=policy) as store:
        assumed = {link: store.engine.placement.seconds_per_byte(link) for link in Link}
        for number in range(8):
            store.put(f"b{number}", torch.zeros(60_000))
        for number in range(120):
            with store.use(f"b{number % 8}", write=True) as tensor:
                tensor.add_(1)
        measured = {link: store.engine.placement.seconds_per_byte(link) for link in Link}
        busy = store.engine.placement.rates._busy
    assert all(each.under_way == 0 for each in busy.values())
    changed = {link for link in Link if measured[link] != assumed[link]}
    assert changed == ({Link.H2D, Link.D2H} if policy == "lookahead" else set())
