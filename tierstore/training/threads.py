"""Which units run on which thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from tierstore.training.structure import Unit


class Local(threading.local):
    """The units that run on this thread, the outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self._running: list[Unit] = []

    def has(self, unit: Unit) -> bool:
        """Whether a unit around this one has put its parameters into their places."""
        return any(id(unit.module) in outer.inside for outer in self._running)

    @contextlib.contextmanager
    def running(self, unit: Unit) -> Iterator[None]:
        self._running.append(unit)
        try:
            yield
        finally:
            self._running.pop()
