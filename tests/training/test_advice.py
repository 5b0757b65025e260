"""The diagnosis as a function of plain numbers, and the numbers as they come from counters and timeline."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.trace import Kind, Link, Timeline, TransferEvent
from tierstore.training.advice import Cause, Diagnosis, Expected, LinkUse, StepFacts, Usual, Wait, diagnose, split
from tierstore.training.steps import links_between
from tierstore.units import LinkRates

GB = 10**9
CUDA: dict[str, Any] = {"device_ordered": True, "page_locked_bytes": 48 * GB, "ram_bytes": 48 * GB}


def drive(read_s: float, rate: float, *, transfers: int = 10) -> dict[str, LinkUse]:
    return {"nvme_read": LinkUse(read_s * rate, transfers, read_s)}


CASES: dict[str, tuple[StepFacts, str, Cause]] = {
    "direct off": (
        StepFacts(1.0, waits={"nvme": 0.8}, links=drive(0.8, 1e9), direct_io=False),
        Wait.NVME,
        Cause.DIRECT_IO_OFF,
    ),
    "slow drive": (StepFacts(1.0, waits={"nvme": 0.8}, links=drive(0.8, 1e9), direct_io=True), Wait.NVME, Cause.DRIVE_SLOW),
    "small blocks": (
        StepFacts(1.0, waits={"nvme": 0.8}, links=drive(0.8, 1e9, transfers=10_000), direct_io=True),
        Wait.NVME,
        Cause.SMALL_BLOCKS,
    ),
    "older drive": (StepFacts(1.0, waits={"nvme": 0.8}, links=drive(0.8, 3.4e9), direct_io=True), Wait.NVME, Cause.DRIVE_RATE),
    "drive without transfers": (StepFacts(1.0, waits={"nvme": 0.8}, direct_io=True), Wait.NVME, Cause.DRIVE_RATE),
    "loader": (StepFacts(1.0, loader_s=0.5, waits={"nvme": 0.3}), Wait.LOADER, Cause.LOADER),
    "lease": (StepFacts(1.0, waits={"lease": 0.3}), Wait.LEASE, Cause.LEASES),
    "commit": (StepFacts(1.0, waits={"commit": 0.3}), Wait.COMMIT, Cause.COMMITS),
    "space": (StepFacts(1.0, waits={"space": 0.3}, links={"d2h": LinkUse(GB, 5, 0.2)}), Wait.SPACE, Cause.SPACE),
    "space that the drive makes": (
        StepFacts(1.0, waits={"space": 0.6}, links={"nvme_write": LinkUse(0.1 * GB, 5, 0.6)}, direct_io=True),
        Wait.SPACE,
        Cause.DRIVE_SLOW,
    ),
    "copies on a CPU": (StepFacts(1.0, waits={"copy": 0.6}, links={"h2d": LinkUse(6 * GB, 60, 0.6)}), Wait.COPY, Cause.SMALL_BATCH),
    "link-bound": (StepFacts(1.0, links={"h2d": LinkUse(12 * GB, 100, 0.95)}, **CUDA), Wait.COPY, Cause.SMALL_BATCH),
    "link-bound out, and the host at the cap": (
        StepFacts(1.0, waits={"run-ahead": 0.9}, links={"d2h": LinkUse(12 * GB, 100, 0.95)}, **CUDA),
        Wait.COPY,
        Cause.SMALL_BATCH,
    ),
    "pageable": (
        StepFacts(1.0, links={"h2d": LinkUse(3 * GB, 100, 0.95)}, device_ordered=True, ram_bytes=48 * GB),
        Wait.COPY,
        Cause.PAGEABLE,
    ),
    "capped": (
        StepFacts(1.0, links={"h2d": LinkUse(3 * GB, 9, 0.95)}, device_ordered=True, page_locked_bytes=20 * GB, ram_bytes=48 * GB),
        Wait.COPY,
        Cause.PAGE_LOCKING_CAPPED,
    ),
    "copies queued behind computing": (StepFacts(1.0, links={"h2d": LinkUse(GB, 100, 0.95)}, **CUDA), Wait.COMPUTING, Cause.COMPUTING),
    "copies queued behind computing, on a link far faster than planned for": (
        StepFacts(1.0, links={"h2d": LinkUse(8 * GB, 100, 0.95, 50e9)}, **CUDA),
        Wait.COMPUTING,
        Cause.COMPUTING,
    ),
    "link-bound on a link far faster than planned for": (
        StepFacts(1.0, links={"h2d": LinkUse(40 * GB, 100, 0.95, 50e9)}, **CUDA),
        Wait.COPY,
        Cause.SMALL_BATCH,
    ),
    "copies beside computing": (StepFacts(1.0, links={"h2d": LinkUse(6 * GB, 100, 0.5)}, **CUDA), Wait.COMPUTING, Cause.COMPUTING),
    "links are busy, but the drive is what is waited for": (
        StepFacts(1.0, waits={"nvme": 0.7}, links={"h2d": LinkUse(12 * GB, 100, 0.95), **drive(0.7, 7e9)}, direct_io=True, **CUDA),
        Wait.NVME,
        Cause.DRIVE_RATE,
    ),
    "device behind": (StepFacts(1.0, waits={"run-ahead": 0.9}, **CUDA), Wait.RUN_AHEAD, Cause.RUN_AHEAD),
    "short waits": (StepFacts(1.0, loader_s=0.02, waits={"nvme": 0.04}), Wait.COMPUTING, Cause.COMPUTING),
    "a cause not known here": (StepFacts(1.0, waits={"quota": 0.5}), "quota", Cause.UNKNOWN),
    "slow by the loader, though the drive takes more": (
        StepFacts(1.6, loader_s=0.6, waits={"nvme": 0.8}, usual=Usual(1.0, {"nvme": 0.8, "computing": 0.2})),
        Wait.LOADER,
        Cause.LOADER,
    ),
    "slow by a commit": (StepFacts(2.0, commits=1, usual=Usual(1.0, {"computing": 1.0})), Wait.COMPUTING, Cause.COMMITS),
    "slow though it commits as always": (
        StepFacts(2.0, commits=1, usual=Usual(1.0, {"computing": 1.0}, commits=1)),
        Wait.COMPUTING,
        Cause.OUTSIDE,
    ),
    "slow by copies": (
        StepFacts(2.0, links={"h2d": LinkUse(25 * GB, 100, 1.9)}, usual=Usual(1.0, {"computing": 1.0}), **CUDA),
        Wait.COPY,
        Cause.SMALL_BATCH,
    ),
    "slow by the drive, though copies are always busy": (
        StepFacts(
            2.0,
            waits={"nvme": 0.9},
            links={"h2d": LinkUse(25 * GB, 100, 1.9), **drive(0.9, 7e9)},
            direct_io=True,
            usual=Usual(1.0, {"computing": 1.0}),
            **CUDA,
        ),
        Wait.NVME,
        Cause.DRIVE_RATE,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    step, wait, cause = CASES[case]
    diagnosis = diagnose(step)
    assert (diagnosis.wait, diagnosis.cause) == (wait, cause), str(diagnosis)
    harmless = cause in (Cause.COMPUTING, Cause.RUN_AHEAD)
    assert (not diagnosis.remedy) == harmless
    assert diagnosis.level == (logging.INFO if harmless or cause is Cause.OUTSIDE else logging.WARNING)
    assert 0 < diagnosis.share <= 1
    assert diagnosis.seconds > 0
    assert diagnosis.cause in str(diagnosis)


def test_every_cause_has_a_case() -> None:
    assert {cause for _, _, cause in CASES.values()} == set(Cause)


def test_what_a_probe_has_measured_is_held_to_more() -> None:
    """Of the planning rate 3.4 GB/s may be all that a drive has; of its own rate it is too little."""
    step = StepFacts(1.0, waits={"nvme": 0.8}, links=drive(0.8, 3.4e9), direct_io=True)
    assert diagnose(step).cause is Cause.DRIVE_RATE
    slow = diagnose(step, Expected(LinkRates(nvme_read_bytes_per_s=6e9), probed=True))
    assert slow.cause is Cause.DRIVE_SLOW
    assert "3.40 GB/s, 6.00 GB/s probed" in slow.detail
    assert diagnose(step, Expected(LinkRates(nvme_read_bytes_per_s=4e9), probed=True)).cause is Cause.DRIVE_RATE


def test_a_drive_that_reads_and_writes_by_turns_is_not_slow() -> None:
    """Each way has half of the time, so a drive at its full rate reaches half of it each way."""
    links = {"nvme_read": LinkUse(3.5e9, 9, 1.0), "nvme_write": LinkUse(1e9, 9, 1.0)}
    assert diagnose(StepFacts(1.0, waits={"nvme": 0.8}, links=links, direct_io=True), Expected(probed=True)).cause is Cause.DRIVE_RATE


def test_a_little_pageable_memory_is_not_blamed() -> None:
    facts: dict[str, Any] = {"device_ordered": True, "page_locked_bytes": 47 * GB, "ram_bytes": 48 * GB}
    assert diagnose(StepFacts(1.0, links={"h2d": LinkUse(12 * GB, 100, 0.95)}, **facts)).cause is Cause.SMALL_BATCH


def test_small_shares_are_no_warning() -> None:
    assert diagnose(StepFacts(1.0, loader_s=0.1)).level == logging.INFO


@given(
    seconds=st.floats(0, 10),
    loader_s=st.floats(0, 20),
    waits=st.dictionaries(st.sampled_from(["nvme", "space", "lease", "commit", "copy", "run-ahead", "other"]), st.floats(0, 20)),
    busy=st.floats(0, 20),
    nbytes=st.floats(0, 1e12),
    cuda=st.booleans(),
    usual=st.none() | st.builds(Usual, st.floats(0, 10), st.dictionaries(st.sampled_from([*Wait]), st.floats(0, 20))),
)
def test_any_numbers_give_a_diagnosis(
    seconds: float, loader_s: float, waits: Mapping[str, float], busy: float, nbytes: float, cuda: bool, usual: Usual | None
) -> None:
    links = dict.fromkeys(("h2d", "d2h", "nvme_read", "nvme_write"), LinkUse(nbytes, 3, busy))
    step = StepFacts(seconds, loader_s, waits, links, device_ordered=cuda, usual=usual)
    diagnosis = diagnose(step)
    assert isinstance(diagnosis, Diagnosis)
    assert "nan" not in str(diagnosis)
    assert 0 <= diagnosis.share <= 1
    spent = split(step)
    assert all(part >= 0 for part in spent.values())
    stopped_s = loader_s + sum(waits.values())
    assert sum(spent.values()) == pytest.approx(max(seconds, stopped_s), abs=1e-6) or cuda


@given(st.integers(0, 2**32))
def test_links_of_a_step_against_a_count_by_the_nanosecond(seed: int) -> None:
    """However transfers overlap: each nanosecond in which one was under way is busy, and each carries an equal share of its bytes."""
    rng = random.Random(seed)
    events = []
    for _ in range(rng.randint(0, 12)):
        start = rng.randint(0, 40)
        end = start + rng.randint(1, 15)
        events.append(TransferEvent(rng.choice([Link.H2D, Link.NVME_READ]), "b", Kind.DEMAND, rng.randint(1, 999), start, start, end))
    events.sort(key=lambda event: event.end_ns)
    timeline = Timeline()
    timeline.transfers.extend(events)
    found = links_between(timeline, 10, 30)
    for link in (Link.H2D, Link.NVME_READ):
        inside = [event for event in events if event.link is link and event.end_ns > 10 and event.start_ns < 30]
        busy = sum(any(event.start_ns <= ns < event.end_ns for event in inside) for ns in range(10, 30))
        shares = {event: event.nbytes / (event.end_ns - event.start_ns) for event in inside}
        nbytes = sum(shares[event] for event in inside for ns in range(10, 30) if event.start_ns <= ns < event.end_ns)
        use = found.get(link, LinkUse())
        assert use.transfers == len(inside)
        assert use.best_bytes_per_s == pytest.approx(1e9 * max(shares.values(), default=0.0))
        assert use.busy_s == pytest.approx(busy / 1e9)
        assert use.bytes == pytest.approx(nbytes)
