"""The pools of blocking threads: what hangs is given up, what was refused is never made, and nobody waits for ever."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from tierstore import threads
from tierstore.threads import MAX_LOST, StalledError, Threads, Watch, under_way

STALL_S = 0.2
PATIENCE_S = 20.0


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Threads]:
    monkeypatch.setattr(threads, "STALL_S", STALL_S)
    pool = Threads("test", 2, Watch())
    yield pool
    pool.shutdown()
    assert pool._watch is not None
    assert pool._watch._thread is None


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never comes to that"
        time.sleep(0.002)


def hang(pool: Threads, gate: threading.Event) -> StalledError:
    with pytest.raises(StalledError) as caught:
        pool.submit(gate.wait).result(PATIENCE_S)
    return caught.value


def test_calls_are_made_and_fail_as_they_do() -> None:
    pool = Threads("test", 3)
    assert [pool.submit(divmod, 7, by).result(PATIENCE_S) for by in (2, 3)] == [(3, 1), (2, 1)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 7, 0).result(PATIENCE_S)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(divmod, 7, 2)


def test_no_more_threads_than_allowed_and_no_more_than_needed() -> None:
    pool = Threads("test", 3)
    for _ in range(20):
        pool.submit(int).result(PATIENCE_S)
        wait_until(lambda: pool._num_idle)
    assert len(pool._members) == 1
    gate = threading.Event()
    futures = [pool.submit(gate.wait) for _ in range(10)]
    assert len(pool._members) == 3
    gate.set()
    assert all(future.result(PATIENCE_S) for future in futures)
    pool.shutdown()


def test_a_call_that_hangs_is_given_up_and_says_when_it_returned(pool: Threads) -> None:
    gate = threading.Event()
    error = hang(pool, gate)
    assert STALL_S < error.seconds < 2 * STALL_S
    assert under_way(error) == error.landed
    assert len(error.landed) == 1
    assert pool.num_lost == 1
    assert pool.submit(int).result(PATIENCE_S) == 0
    gate.set()
    error.landed[0].result(PATIENCE_S)
    assert under_way(error) == ()
    wait_until(lambda: pool.num_lost == 0)
    assert len(pool._members) <= 2


def test_a_call_that_makes_its_patience_is_not_given_up(pool: Threads) -> None:
    assert pool.start(lambda: time.sleep(2 * STALL_S), patience_s=20 * STALL_S).result(PATIENCE_S) is None
    assert pool.num_lost == 0


def test_many_short_calls_are_not_one_long_one(pool: Threads) -> None:
    futures = [pool.submit(time.sleep, STALL_S / 4) for _ in range(20)]
    for future in futures:
        future.result(PATIENCE_S)
    assert pool.num_lost == 0


def test_what_waits_behind_hung_calls_is_given_up_with_them(pool: Threads) -> None:
    """Not one stall limit after the other: nothing moves, so nobody waits on."""
    gate, made = threading.Event(), threading.Event()
    start = time.monotonic()
    futures: list[Future[object]] = [pool.submit(gate.wait) for _ in range(2)]
    futures += [pool.submit(made.set) for _ in range(20)]
    errors = [future.exception(PATIENCE_S) for future in futures]
    assert time.monotonic() - start < 4 * STALL_S
    assert all(isinstance(error, StalledError) for error in errors)
    assert [len(under_way(error)) for error in errors] == [1, 1, *[0] * 20]
    gate.set()
    wait_until(lambda: pool.num_lost == 0)
    assert not made.is_set(), "a call whose caller was told that it was given up"


def test_a_dead_drive_costs_a_bounded_number_of_threads(pool: Threads) -> None:
    gate = threading.Event()
    before = threading.active_count()
    while pool.num_lost < MAX_LOST:
        left = [pool.submit(gate.wait) for _ in range(2)]
        assert all(isinstance(future.exception(PATIENCE_S), StalledError) for future in left)
    assert threading.active_count() <= before + MAX_LOST + 2
    for _ in range(3):
        with pytest.raises(StalledError):
            pool.submit(int).result(PATIENCE_S)
    assert pool.num_lost == MAX_LOST
    gate.set()
    wait_until(lambda: pool.num_lost == 0)
    assert pool.submit(int).result(PATIENCE_S) == 0


def test_calls_that_hang_one_after_the_other_cost_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is always a younger one that has not been given up yet."""
    monkeypatch.setattr(threads, "STALL_S", 2.0)
    pool, gate = Threads("test", 2), threading.Event()
    futures: list[Future[bool]] = []
    try:
        with contextlib.suppress(StalledError):
            for _ in range(4 * MAX_LOST):
                futures.append(pool.submit(gate.wait))
                time.sleep(0.01)  # it begins
                pool.tick(1.1)  # the one before is given up, this one is not
        assert pool.num_lost + len(pool._members) <= MAX_LOST + 2
        assert len(futures) < 4 * MAX_LOST, "new calls do not fail"
    finally:
        gate.set()
        pool.shutdown()


def test_a_call_that_has_just_come_does_not_pay_for_those_given_up_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drive answers again, and the watch looks while all threads are busy for the first time since."""
    monkeypatch.setattr(threads, "STALL_S", 2.0)
    pool, dead, gate = Threads("test", 1), threading.Event(), threading.Event()
    given_up = [pool.submit(dead.wait) for _ in range(2)]
    for _ in range(3):
        pool.tick(1.0)
    assert all(isinstance(future.exception(0), StalledError) for future in given_up)
    later = [pool.submit(gate.wait) for _ in range(2)]
    pool.tick(1.0)
    gate.set()
    try:
        assert all(future.result(PATIENCE_S) for future in later)
    finally:
        dead.set()
        pool.shutdown()


def test_shutdown_does_not_wait_for_what_hangs(pool: Threads) -> None:
    gate = threading.Event()
    future = pool.submit(gate.wait)
    pool.shutdown()  # waits until it is given up
    error = future.exception(0)
    assert isinstance(error, StalledError)
    gate.set()
    error.landed[0].result(PATIENCE_S)


def test_what_nobody_is_left_to_begin_is_given_up_at_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "STALL_S", 2.0)
    monkeypatch.setattr(threads, "MAX_LOST", 1)
    pool, gate, begun = Threads("test", 1, Watch()), threading.Event(), threading.Event()
    pool.submit(lambda: (begun.set(), gate.wait()))
    assert begun.wait(PATIENCE_S)
    for _ in range(2):
        pool.tick(1.0)
    queued = pool.submit(int)
    pool.tick(1.0)
    pool.shutdown()
    gate.set()
    assert isinstance(queued.exception(0.5), StalledError)


def test_a_call_refused_for_want_of_a_thread_is_never_made(pool: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's executor keeps it queued, and the next thread writes where others have their bytes by then."""
    made: list[str] = []

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            pool.submit(made.append, "refused")
    pool.submit(made.append, "later").result(PATIENCE_S)
    assert made == ["later"]


def test_with_one_thread_left_the_rest_need_not_start(pool: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.submit(int).result(PATIENCE_S)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        futures = [pool.submit(int) for _ in range(5)]
        assert [future.result(PATIENCE_S) for future in futures] == [0] * 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_fails_its_call_and_is_replaced(pool: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(job: object) -> object:
        raise SystemExit  # as if it had come between two calls of ours

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threads, "_make", killed)
        with pytest.raises(OSError, match="killed"):
            pool.submit(int).result(PATIENCE_S)
        wait_until(lambda: threading.active_count() <= before + 1)  # the watch stays
    assert pool.submit(int).result(PATIENCE_S) == 0


def test_an_exception_in_a_callback_costs_no_thread(pool: Threads) -> None:
    gate = threading.Event()
    future = pool.submit(gate.wait)
    future.add_done_callback(lambda _: 1 // 0)
    gate.set()
    assert future.result(PATIENCE_S)
    assert pool.submit(int).result(PATIENCE_S) == 0


def test_the_interpreter_ends_though_a_thread_hangs() -> None:
    code = (
        "import threading; from tierstore import threads; threads.STALL_S = 0.2;"
        "pool = threads.Threads('t', 1, threads.Watch()); pool.submit(threading.Event().wait); print('going')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "going\n"
