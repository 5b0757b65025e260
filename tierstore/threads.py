"""Threads that block in the engine's stead: small pools that lose a thread to a call that hangs, and go on.

[Note: A call that never returns]
A system call on a dead drive or a lost network share may not return for minutes, or never. A watched pool gives such a call up
after `STALL_S`: whoever waits for it gets `StalledError`, and its thread counts as lost and is replaced. The call itself cannot be
ended. It may come back at any time and touch the memory it was given, so `StalledError.landed` tells when it has; until then that
memory must not be reused. A lost thread whose call has returned joins the pool again, or ends. A pool that has lost `MAX_LOST`
threads starts no more: once those it still has are lost too, new calls fail at once.

Time is counted in ticks of the watch, not on the clock: while the process or the machine was stopped, nobody stalled.

The standard library's executor would not do: it waits for a hung thread at exit, and a call that was refused because no thread
could be started stays in its queue, to be made by some later thread when its memory belongs to somebody else.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

STALL_S = 60.0
"""A call that has not returned after so many seconds is given up. Linux resets an NVMe drive that does not answer after 30 s,
and then often completes the request: that has to be waited for."""

TICKS = 8
"""The watch looks so many times within `STALL_S`: a call is given up at most an eighth late."""

MAX_LOST = 16
"""Hung threads beyond which a pool starts no others in their place."""


class StalledError(OSError):
    """A call was given up. See [Note: A call that never returns].

    Attributes:
        seconds: How long it had been waited for.
        landed: One future per call that may still touch its memory, resolved when it has returned; empty if none had begun.
    """

    def __init__(self, seconds: float, landed: tuple[Future[None], ...] = ()) -> None:
        super().__init__(errno.ETIMEDOUT, f"no answer for {seconds:g} s")
        self.seconds = seconds
        self.landed = landed


class NoThreadError(OSError):
    """The system starts no more threads: the call was not made, and will not be."""


def under_way(error: BaseException | None) -> tuple[Future[None], ...]:
    """The calls behind an error that may still touch memory, also where it was raised `from` a `StalledError`."""
    while error is not None:
        if isinstance(error, StalledError):
            return tuple(future for future in error.landed if not future.done())
        error = error.__cause__
    return ()


class _Job:
    """A call. `ticks`: for how long it has been under way, or before that, in the queue."""

    __slots__ = ("call", "future", "landed", "patience_s", "ticks")

    def __init__(self, call: Callable[[], Any], patience_s: float) -> None:
        self.call = call
        self.future: Future[Any] = Future()
        self.landed: Future[None] = Future()
        self.patience_s = patience_s
        self.ticks = 0


class Threads(Executor):
    """At most `num_threads` daemon threads, started when first needed; and lost ones beside them.

    Args:
        name: Of the threads, with a number behind it.
        num_threads: How many work at once.
        watch: Gives up what hangs; None: calls that cannot hang.
    """

    def __init__(self, name: str, num_threads: int, watch: Watch | None = None) -> None:
        self._name = name
        self._max_threads = num_threads
        self._watch = watch
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[_Job] = deque()
        self._running: dict[_Job, threading.Thread] = {}
        self._members: set[threading.Thread] = set()  # all but lost ones
        self._num_idle = 0
        self._num_started = 0
        self.num_lost = 0
        self._closed = False
        self._idle_ticks = 0  # since a call returned, while some are queued
        if watch is not None:
            watch.add(self)
        _LIVE.add(self)

    def submit(self, call: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return self.start(partial(call, *args, **kwargs))

    def start(self, call: Callable[[], T], patience_s: float = 0.0) -> Future[T]:
        """Make the call on a thread. Any thread.

        Args:
            call: What blocks.
            patience_s: Seconds beyond `STALL_S` that it may take.

        Raises:
            NoThreadError: There is no thread, and the system starts none. The call will not be made.
            StalledError: All are lost. Neither will it.
            RuntimeError: After `shutdown`.
        """
        job = _Job(call, patience_s)
        with self._changed:
            if self._closed:
                raise RuntimeError(f"the threads {self._name} have been shut down")
            self._queue.append(job)
            try:
                self._staff()
            except BaseException:
                self._queue.remove(job)
                raise
            self._changed.notify()
        if self._watch is not None:
            self._watch.begin()
        return job.future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse new calls; wait for those there are, but not for lost ones."""
        with self._changed:
            self._closed = True
            dropped = list(self._queue) if cancel_futures else []
            if cancel_futures:
                self._queue.clear()
            self._changed.notify_all()
        for job in dropped:
            job.future.cancel()
        while wait:
            with self._changed:
                member = next(iter(self._members - {threading.current_thread()}), None)
            if member is None:
                break
            member.join(0.05 if self._watch is not None else None)  # it may be lost meanwhile
        if wait:
            self._give_up_queued()
        if wait and self._watch is not None:
            self._watch.remove(self)

    def _give_up_queued(self) -> None:
        """There is no thread left to begin these, and none can be had."""
        with self._changed:
            queued, self._queue = self._queue, deque()
        for job in queued:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(StalledError(0.0))

    # -- the threads ---------------------------------------------------------------------------------------------------------

    def _staff(self) -> None:
        """Start a thread if one is needed. Under the lock.

        Raises:
            OSError: There is none, and none can be had.
        """
        if self._num_idle >= len(self._queue) or len(self._members) >= self._max_threads:
            return
        if self.num_lost >= MAX_LOST:
            if self._members:
                return  # else one call at a time that hangs could cost any number of threads
            raise StalledError(STALL_S)
        self._num_started += 1
        thread = threading.Thread(target=self._work, name=f"{self._name}_{self._num_started}", daemon=True)
        self._members.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._members.discard(thread)
            if not self._members:
                raise NoThreadError(errno.EAGAIN, f"no thread for {self._name}: {error}") from error
        except BaseException:
            self._members.discard(thread)
            raise

    def _work(self) -> None:
        me = threading.current_thread()
        job: _Job | None = None
        try:
            while (job := self._next(me)) is not None:
                result, error = _make(job)
                mine = self._finish(job)
                if not mine:
                    job.landed.set_result(None)
                elif error is None:
                    job.future.set_result(result)
                else:
                    job.future.set_exception(error)
                del result, error
                if not mine and not self._rejoin(me):
                    return
                job = None
        finally:  # also of a thread that was killed from outside
            self._leave(me, job)

    def _next(self, me: threading.Thread) -> _Job | None:
        """The next call to make; None when there will be none."""
        with self._changed:
            while True:
                while self._queue:
                    job = self._queue.popleft()
                    if job.future.set_running_or_notify_cancel():
                        job.ticks = 0
                        self._running[job] = me
                        return job
                if self._closed:
                    return None
                self._num_idle += 1
                try:
                    self._changed.wait()
                finally:
                    self._num_idle -= 1

    def _finish(self, job: _Job) -> bool:
        """The call has returned. Whether it had not been given up."""
        with self._changed:
            self._idle_ticks = 0
            return self._running.pop(job, None) is not None

    def _rejoin(self, me: threading.Thread) -> bool:
        """A lost thread is back. Whether there is work for it."""
        with self._changed:
            self.num_lost -= 1
            if self._closed or len(self._members) >= self._max_threads:
                return False
            self._members.add(me)
            return True

    def _leave(self, me: threading.Thread, job: _Job | None) -> None:
        """A thread ends. Nobody waits for what it had begun."""
        with self._changed:
            self._members.discard(me)
            broken = job is not None and self._running.pop(job, None) is not None
            if self._queue and not self._members:
                self._replace()
            self._changed.notify_all()
        if broken and job is not None:
            job.future.set_exception(OSError(errno.EIO, f"the thread {me.name} was killed"))

    def _replace(self) -> None:
        try:
            self._staff()
        except OSError:
            return  # the next call to come tries again, or the watch gives these up

    # -- the watch -----------------------------------------------------------------------------------------------------------

    def tick(self, seconds: float) -> bool:
        """So much time has passed: give up what hangs. Called by the watch; returns whether anything is left to be watched."""
        with self._changed:
            hung = self._tick_running(seconds)
            self._idle_ticks += bool(self._queue)
            waited_s = self._idle_ticks * seconds
            for job in self._queue:
                job.ticks += 1
            stuck: list[_Job] = []
            if self._queue and waited_s > STALL_S + max((job.patience_s for job in self._running), default=0.0):
                # Only who has waited for so long himself: others may have come just now, and the drive back with them.
                late = [job for job in self._queue if job.ticks * seconds > STALL_S]
                stuck = [job for job in late if job.future.set_running_or_notify_cancel()]
                self._queue = deque(job for job in self._queue if job.ticks * seconds <= STALL_S)
            if self._queue:
                self._replace()
            busy = bool(self._running or self._queue)
        for job in hung:
            job.future.set_exception(StalledError(job.ticks * seconds, (job.landed,)))
        for job in stuck:  # nobody has begun these
            job.future.set_exception(StalledError(job.ticks * seconds))
        return busy

    def _tick_running(self, seconds: float) -> list[_Job]:
        """The calls that hang from now on; their threads are lost. Under the lock."""
        hung: list[_Job] = []
        for job in list(self._running):
            job.ticks += 1
            if job.ticks * seconds > STALL_S + job.patience_s:
                self._members.discard(self._running.pop(job))
                self.num_lost += 1
                hung.append(job)
        return hung


def _make(job: _Job) -> tuple[Any, BaseException | None]:
    try:
        return job.call(), None
    except BaseException as error:
        return None, error


class Watch:
    """A thread that looks at pools `TICKS` times per `STALL_S` while any of them has calls under way."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # whoever hears of a stall may begin another call
        self._pools: list[Threads] = []
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, pool: Threads) -> None:
        with self._lock:
            self._pools.append(pool)

    def remove(self, pool: Threads) -> None:
        """The last one ends the thread."""
        with self._lock:
            if pool in self._pools:
                self._pools.remove(pool)
            if self._pools:
                return
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def begin(self) -> None:
        """A call is under way. Where the system starts no thread, it goes unwatched until the next one."""
        with self._lock:
            if self._thread is None and self._pools:
                self._stop = threading.Event()
                thread = threading.Thread(target=self._run, args=(self._stop,), name="tierstore-watch", daemon=True)
                with contextlib.suppress(RuntimeError):
                    thread.start()
                    self._thread = thread

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(tick_s := STALL_S / TICKS):
            with self._lock:
                if stop.is_set():
                    return
                busy = [pool.tick(tick_s) for pool in self._pools]
                if not any(busy):
                    self._thread = None
                    return


# Calls under way are waited for before the interpreter goes; a hung one only until it is given up.
_LIVE: weakref.WeakSet[Threads] = weakref.WeakSet()


def _at_exit() -> None:
    for pool in list(_LIVE):
        pool.shutdown()


# The private hook runs before daemon threads are frozen and other pools are shut down, the public one after that.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_LIVE.clear)  # a child has none of the threads
