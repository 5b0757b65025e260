"""What a loop's steps wait for is told: each cause is brought about in a real store, and must be the one that is named."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.patience import PATIENCE_S, in_thread, wait_until
from tests.training.slow import MS, SlowStore, opened
from tierstore import TierStore
from tierstore.counters import Stats
from tierstore.requests import Use
from tierstore.training.advice import Cause, Wait
from tierstore.training.progress import Progress, progress

MB = 1 << 20
KB = 1 << 10


def watch(slow: SlowStore, body: Callable[[int], object], *, steps: int = 3, loader: Iterable[int] | None = None) -> Progress[int]:
    """Run a loop of so many steps, each of which computes for a millisecond beside its body."""
    bar = progress(slow.store, range(1, steps + 1) if loader is None else loader, show=False)
    for step in bar:
        body(step)
        slow.clock.advance(MS)
    return bar


def sweep(slow: SlowStore, names: list[str], *, write: bool = False) -> Callable[[int], None]:
    def body(step: int) -> None:
        for name in names:
            slow.use(name, write=write)

    return body


def told(bar: Progress[Any], caplog: pytest.LogCaptureFixture, wait: Wait, cause: Cause, *, level: int = logging.WARNING) -> str:
    """The last line of the log, which names this wait, this cause and a remedy."""
    diagnosis = bar.diagnosis
    assert diagnosis is not None, "nothing was told"
    lines = lines_of(caplog)
    assert (diagnosis.wait, diagnosis.cause) == (wait, cause), lines
    assert caplog.records
    record = next(record for record in reversed(caplog.records) if record.getMessage() == lines[-1])
    assert record.levelno == level
    assert cause in lines[-1]
    assert diagnosis.remedy in lines[-1]
    assert "\n" not in lines[-1]
    return lines[-1]


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("step ")]


@pytest.fixture(autouse=True)
def _keep_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tierstore")


# -- the drive -----------------------------------------------------------------------------------------------------------


def test_direct_io_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=3 * MB, direct=False) as slow:
        assert slow.store.stats().direct_io is False
        bar = watch(slow, sweep(slow, slow.put(8, MB)))
    line = told(bar, caplog, Wait.NVME, Cause.DIRECT_IO_OFF)
    assert "page cache" in line
    assert len(lines_of(caplog)) == 1


def test_the_drive_is_slower_than_expected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=3 * MB, read_rate=500e6) as slow:
        bar = watch(slow, sweep(slow, slow.put(8, MB)))
    line = told(bar, caplog, Wait.NVME, Cause.DRIVE_SLOW)
    assert "500 MB/s, 7.00 GB/s planned for" in line


def test_the_drive_is_as_fast_as_expected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=3 * MB) as slow:
        bar = watch(slow, sweep(slow, slow.put(16, MB)))
    assert "raise ram=" in told(bar, caplog, Wait.NVME, Cause.DRIVE_RATE)


def test_blocks_are_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=128 * KB, ram_bytes=192 * KB, read_rate=100e6) as slow:
        bar = watch(slow, sweep(slow, slow.put(8, 64 * KB)))
    assert "one block" in told(bar, caplog, Wait.NVME, Cause.SMALL_BLOCKS)


def test_room_that_the_drive_has_to_make_is_the_drives_affair(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=2 * MB, read_rate=100e9, write_rate=100e6) as slow:
        bar = watch(slow, sweep(slow, slow.put(8, MB), write=True))
    told(bar, caplog, Wait.NVME, Cause.DRIVE_SLOW)


# -- the loop's own affairs ----------------------------------------------------------------------------------------------


def test_the_data_loader(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:

        def loader() -> Iterator[int]:
            for step in range(1, 4):
                slow.clock.advance(5 * MS)
                yield step

        bar = watch(slow, sweep(slow, slow.put(2, 64 * KB)), loader=loader())
    assert "5.00 ms of 6.00 ms" in told(bar, caplog, Wait.LOADER, Cause.LOADER)


def test_computing_is_no_cause_for_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:
        bar = watch(slow, sweep(slow, slow.put(2, 64 * KB)), steps=30)
    told(bar, caplog, Wait.COMPUTING, Cause.COMPUTING, level=logging.INFO)
    assert len(lines_of(caplog)) == 1, "no step was slow"


def test_a_step_that_nothing_explains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:
        bar = watch(slow, lambda step: slow.clock.advance((30 if step == 6 else 10) * MS), steps=6)
    assert "step 6 took 31.0 ms, 2.8 times" in told(bar, caplog, Wait.COMPUTING, Cause.OUTSIDE, level=logging.INFO)


def test_a_commit_that_the_loop_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=4 * MB, ram_bytes=4 * MB, write_rate=50e6) as slow:
        names = slow.put(2, MB)

        def body(step: int) -> None:
            sweep(slow, names, write=True)(step)
            if step == 6:
                slow.store.commit()

        bar = watch(slow, body, steps=6)
    told(bar, caplog, Wait.COMPUTING, Cause.COMMITS)


# -- other users of the store --------------------------------------------------------------------------------------------


def waits(slow: SlowStore) -> bool:
    engine = slow.store.engine
    with engine.lock:
        return any(isinstance(request, Use) for request in engine.scheduler.waiting.values())


def test_leases_of_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:
        slow.put(1, 64 * KB)

        def body(step: int) -> None:
            held = threading.Event()

            def other() -> None:
                with slow.store.use("b0", write=True):
                    held.set()
                    wait_until(lambda: waits(slow))
                    slow.clock.advance(7 * MS)

            done = in_thread(other)
            assert held.wait(PATIENCE_S)
            slow.use("b0")
            done.result(PATIENCE_S)

        bar = watch(slow, body)
    assert "let go of leases" in told(bar, caplog, Wait.LEASE, Cause.LEASES)


def test_commits_that_hold_up_writers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=4 * MB, ram_bytes=4 * MB) as slow:
        slow.put(1, MB)
        slow.use("b0", write=True)

        def body(step: int) -> None:
            slow.files.gate.clear()
            commit = slow.store.commit(wait=False)
            assert not isinstance(commit, int)

            def drive() -> None:
                wait_until(lambda: waits(slow))
                slow.clock.advance(9 * MS)
                slow.files.gate.set()

            done = in_thread(drive)
            slow.use("b0", write=True)
            done.result(PATIENCE_S)
            commit.result(PATIENCE_S)

        bar = watch(slow, body)
    assert "commit less often" in told(bar, caplog, Wait.COMMIT, Cause.COMMITS)


# -- the device ----------------------------------------------------------------------------------------------------------


def test_no_room_on_the_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Leases of others fill it."""
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=8 * MB, nvme=False) as slow:
        names = slow.put(3, MB)
        held = threading.Event()

        def body(step: int) -> None:
            held.clear()

            def other() -> None:
                with slow.store.use("b0"), slow.store.use("b1"):
                    held.set()
                    wait_until(lambda: waits(slow))
                    slow.clock.advance(9 * MS)

            done = in_thread(other)
            assert held.wait(PATIENCE_S)
            slow.use(names[2])
            done.result(PATIENCE_S)

        bar = watch(slow, body)
    assert "raise gpu=" in told(bar, caplog, Wait.SPACE, Cause.SPACE)


def test_the_cap_on_run_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:
        names = slow.put(2, 64 * KB)
        slow.copies.run_ahead_ns = 4 * MS
        bar = watch(slow, sweep(slow, names))
    told(bar, caplog, Wait.RUN_AHEAD, Cause.RUN_AHEAD, level=logging.INFO)


def copying(tmp_path: Path, locked_share: float | None, *, nbytes: int = MB) -> Progress[int]:
    """A loop that waits for copies, on a store that says to be one on CUDA with so much of its RAM page-locked; None: on a CPU."""
    with opened(tmp_path, gpu_bytes=2 * nbytes, ram_bytes=8 * nbytes, nvme=False) as slow:
        names = slow.put(4, nbytes)
        slow.copies.rate = 10e9
        if locked_share is None:
            return watch(slow, sweep(slow, names))
        real = TierStore.stats

        def stats(store: TierStore) -> Stats:
            found = real(store)
            return replace(found, page_locked_bytes=int(locked_share * found.tiers["ram"].capacity_bytes))

        with mock.patch.object(TierStore, "stats", stats), mock.patch.object(TierStore, "device", torch.device("cuda", 0)):
            return watch(slow, sweep(slow, names))


def test_too_small_a_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "a larger batch" in told(copying(tmp_path, None, nbytes=16 * MB), caplog, Wait.COPY, Cause.SMALL_BATCH)


def test_too_small_a_batch_on_cuda(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "a larger batch" in told(copying(tmp_path, 1.0, nbytes=16 * MB), caplog, Wait.COPY, Cause.SMALL_BATCH)


def test_copies_are_pageable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert 'page_locked="auto"' in told(copying(tmp_path, 0.0, nbytes=16 * MB), caplog, Wait.COPY, Cause.PAGEABLE)


def test_page_locking_is_capped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "lower ram=" in told(copying(tmp_path, 0.4, nbytes=16 * MB), caplog, Wait.COPY, Cause.PAGE_LOCKING_CAPPED)


# -- when a line is due --------------------------------------------------------------------------------------------------


def numbers(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(line.split()[1]) for line in lines_of(caplog)]


def test_one_cause_is_repeated_ever_less_and_a_new_one_told_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:

        def loader() -> Iterator[int]:
            for step in range(1, 121):
                slow.clock.advance(50 * MS if step == 12 else 0)
                yield step

        watch(slow, lambda step: slow.clock.advance((40 if step % 5 == 0 else 10) * MS), loader=loader())
    assert numbers(caplog) == [3, 5, 12, 25, 65]
    assert Cause.LOADER in lines_of(caplog)[2]


def test_a_step_is_so_many_batches_as_are_accumulated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loop whose every fourth batch steps the optimizer has no slow steps."""
    with opened(tmp_path, gpu_bytes=MB, ram_bytes=MB) as slow:
        bar = progress(slow.store, range(40), accumulate=4, show=False)
        for batch in bar:
            slow.clock.advance((40 if batch % 4 == 3 else 10) * MS)
    assert bar.num_steps == 10
    assert numbers(caplog) == [3]


def test_what_every_step_waits_for_does_not_explain_a_slow_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The drive takes more of each step than the loader took of the slow one."""
    with opened(tmp_path, gpu_bytes=2 * MB, ram_bytes=3 * MB, read_rate=500e6) as slow:
        names = slow.put(8, MB)

        def loader() -> Iterator[int]:
            for step in range(1, 9):
                slow.clock.advance(15 * MS if step == 8 else 0)
                yield step

        bar = watch(slow, sweep(slow, names), loader=loader())
    told(bar, caplog, Wait.LOADER, Cause.LOADER)
    assert numbers(caplog) == [3, 8]
