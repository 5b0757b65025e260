"""The store's one lock, and what protects its holders from Ctrl-C.

[Note: Ctrl-C under the lock]
CPython runs signal handlers in the main thread between any two bytecodes, so a `KeyboardInterrupt` could strike in the middle
of the scheduler's bookkeeping. While the main thread holds the lock, SIGINT is only noted; the handler that was there runs
right after the release. Handlers not set from Python, or set to ignore or default, are left alone.

It could as well strike inside the library's own locks: a `threading.Condition` interrupted on leaving stays locked for ever,
and with it whoever completes the future. `Uninterrupted` guards such calls; the wait itself is one call into C.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# The C functions behind the signal module, which wraps every call in enum conversions: 1 µs instead of 10.
_fast: Any = sys.modules.get("_signal", signal)
get_handler, set_handler = _fast.getsignal, _fast.signal
SIGINT = int(signal.SIGINT)


class Uninterrupted:
    """`with Uninterrupted():` SIGINT in the main thread is only noted, and handled on leaving. For what is over in no time."""

    __slots__ = ("_noted", "_previous")

    def __enter__(self) -> None:
        self._previous: Any = None
        self._noted: tuple[int, FrameType | None] | None = None
        if threading.current_thread() is threading.main_thread():
            handler = get_handler(SIGINT)
            if callable(handler):
                self._previous = handler
                set_handler(SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            set_handler(SIGINT, self._previous)
            if self._noted is not None:
                self._previous(*self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = (number, frame)


class CriticalLock:
    """A non-reentrant mutex; `with lock:` also defers SIGINT in the main thread.

    Args:
        afterwards: Called right after every release, before a SIGINT that was noted is handled.
    """

    def __init__(self, afterwards: Callable[[], None]) -> None:
        self._afterwards = afterwards
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._previous: object = None
        self._noted: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            handler = get_handler(SIGINT)
            if callable(handler):
                set_handler(SIGINT, self._note)
                self._previous = handler
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._afterwards()
        if threading.get_ident() == self._main and self._previous is not None:
            previous, self._previous = self._previous, None
            set_handler(SIGINT, previous)
            noted, self._noted = self._noted, None
            if noted is not None:
                previous(*noted)  # type: ignore[operator]

    def try_acquire(self) -> bool:
        """Take it if it is free, for a finaliser, which may run anywhere. SIGINT is not deferred. Ends with `release`."""
        return self._lock.acquire(blocking=False)

    def release(self) -> None:
        self._lock.release()
        self._afterwards()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = (number, frame)
