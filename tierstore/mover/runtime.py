"""The machine as the engine sees it: time, threads, the lock between them, and how one thread waits for another.

In production that is the operating system. A simulation puts its own in the same place and so decides, from a seed, when time
passes and which thread goes on; the engine, its faces and all they call run unchanged.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from tierstore.clock import Clock, RealClock
from tierstore.mover.critical import CriticalLock, Uninterrupted

T = TypeVar("T")


class Lock(Protocol):
    """A non-reentrant mutex; see `CriticalLock`."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

    def try_acquire(self) -> bool:
        """Take it if it is free. Ends with `release`."""
        ...

    def release(self) -> None: ...


class Runtime(Protocol):
    """What the engine asks of the machine. All methods may be called from any thread."""

    clock: Clock

    def new_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that the engine's thread will run."""
        ...

    def new_lock(self, afterwards: Callable[[], None]) -> Lock:
        """The store's lock, which calls `afterwards` after every release."""
        ...

    def start_thread(self, target: Callable[[], None], name: str, *, daemon: bool = False) -> threading.Thread:
        """Start a thread. Raises RuntimeError when the system has none to give."""
        ...

    def join(self, thread: threading.Thread) -> None:
        """Wait for a thread to end."""
        ...

    def wait(self, future: Future[T], timeout: float | None = None) -> T:
        """`future.result`, on a thread that runs no loop.

        Raises:
            TimeoutError: It has not ended within `timeout` seconds.
        """
        ...


class Machine:
    """The operating system's threads and clock."""

    def __init__(self) -> None:
        self.clock: Clock = RealClock()

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    def new_lock(self, afterwards: Callable[[], None]) -> Lock:
        return CriticalLock(afterwards)

    def start_thread(self, target: Callable[[], None], name: str, *, daemon: bool = False) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=daemon)
        thread.start()
        return thread

    def join(self, thread: threading.Thread) -> None:
        thread.join()

    def wait(self, future: Future[T], timeout: float | None = None) -> T:
        """Ctrl-C may end the wait anywhere, see [Note: Ctrl-C under the lock]."""
        gate = threading.Lock()
        gate.acquire()
        with Uninterrupted():
            future.add_done_callback(lambda _: gate.release())
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        longest = 0.2 if sys.platform == "win32" else threading.TIMEOUT_MAX  # Windows hears Ctrl-C only between waits
        while not gate.acquire(timeout=min(longest, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimeoutError
        with Uninterrupted():
            return future.result()
