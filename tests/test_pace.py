"""How long callers compute, told from when they ask: with and without waits, on a device that hides it and on one that does not."""

from __future__ import annotations

import pytest

from tierstore.pace import WINDOW, Pace


def test_waits_are_left_out() -> None:
    pace, now = Pace(), 0
    for _ in range(50):
        pace.asked(now, 1)
        pace.granted(now + 700, 700, "copy")
        now += 700 + 100
    assert pace.seconds == pytest.approx(100e-9)


def test_a_lease_of_several_blocks_counts_for_each() -> None:
    pace = Pace()
    for number in range(50):
        pace.asked(number * 400, 4)
    assert pace.seconds == pytest.approx(100e-9)


def test_what_a_device_hides_shows_in_time_that_links_do_not_account_for() -> None:
    """One access in two takes a copy of 100 ns, and then 50 ns of computing that the host does not see but waits for."""
    pace, now = Pace(), 0
    pace.runs_ahead = True
    for _ in range(4 * WINDOW):
        pace.asked(now, 2)
        pace.granted(now + 200, 200, "copy")
        pace.busy_s += 100e-9
        now += 200
    assert pace.seconds == pytest.approx(50e-9, rel=0.05)


def test_nobody_computes_longer_than_passes() -> None:
    """A pause is not taken for computing once accesses come quickly again; nor is the drive's time."""
    pace, now = Pace(), 0
    pace.runs_ahead = True
    for number in range(8 * WINDOW):
        pace.asked(now, 1)
        pace.granted(now + 90, 90, "nvme")
        now += 100 + 10**9 * (number == 2 * WINDOW)
        if number > 4 * WINDOW:
            assert pace.seconds <= 50e-9
