"""The store's one lock, and what protects its holders from Ctrl-C.

[Note: Ctrl-C under the lock]
CPython runs signal handlers in the main thread between any two bytecodes, so a `KeyboardInterrupt` could strike in the middle
of the scheduler's bookkeeping. While the main thread holds the lock, SIGINT is only noted; the handler that was there runs
right after the release. Handlers not set from Python, or set to ignore or default, are left alone.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType


class CriticalLock:
    """A non-reentrant mutex; `with lock:` also defers SIGINT in the main thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._main = threading.main_thread().ident
        self._previous: object = None
        self._noted: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                signal.signal(signal.SIGINT, self._note)
                self._previous = handler
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        if threading.get_ident() == self._main and self._previous is not None:
            previous, self._previous = self._previous, None
            noted, self._noted = self._noted, None
            signal.signal(signal.SIGINT, previous)  # type: ignore[arg-type]
            if noted is not None:
                previous(*noted)  # type: ignore[operator]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = (number, frame)
