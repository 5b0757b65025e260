"""The file system as one life of a directory sees it: every change counts, takes some turns of the loop, may fail, and is watched."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from tests.crash.disk import CrashDisk
from tests.simulation.files import Change, SimulatedFiles
from tests.simulation.links import Pace

T = TypeVar("T")

MAX_TURNS = 4
"""Turns of the loop that a change takes at most, so that several are under way and end in any order."""


@dataclass(frozen=True)
class Fault:
    """A change fails.

    Attributes:
        code: With this error; 0: a write moves fewer bytes than asked.
        cache_keeps: For a sync: what it drops is still to be read.
    """

    code: int
    cache_keeps: bool = True

    def fits(self, change: Change) -> bool:
        if self.code == errno.ENOSPC:
            return change.doing in ("create", "write", "save")
        if self.code in (0, errno.EINTR):
            return change.doing == "write"
        return self.cache_keeps or change.doing == "sync"


EVERY_FAULT = (Fault(errno.EIO), Fault(errno.ENOSPC), Fault(0), Fault(errno.EINTR), Fault(errno.EIO, cache_keeps=False))


class Door(SimulatedFiles):
    """See `tierstore.nvme.files.Files`. No clock: changes end in an order that the seed decides.

    Args:
        disk: What it leads to.
        rng: Decides how many turns each change takes; None: all are done at once.
        faults: Changes that fail, by their number.
        on_change: Called before each change takes place, when it and others are under way.

    Attributes:
        log: All changes in the order in which they took place.
        struck: Changes that were made to fail.
    """

    def __init__(
        self,
        disk: CrashDisk,
        rng: random.Random | None = None,
        *,
        faults: Mapping[int, Fault] | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(disk, Pace())
        self.disk: CrashDisk = disk
        self.log: list[Change] = []
        self.struck: list[Change] = []
        self._rng = rng
        self._faults = faults or {}
        self._on_change = on_change

    @property
    def under_way_changes(self) -> list[Change]:
        return [change for changes in self.changes.values() for change in changes]

    async def elapse(
        self,
        what: str,
        complete: Callable[[], T],
        *,
        nbytes: int = 0,
        link: str = "",
        fault: int = 0,
        changes: tuple[Change, ...] = (),
    ) -> T:
        if not changes or self._rng is None:
            return complete()
        number = self.begin(changes)
        try:
            for left in range(len(changes), 0, -1):
                for _ in range(self._rng.randint(0, MAX_TURNS)):
                    await asyncio.sleep(0)
                self.changes[number] = changes[-left:]
                self._on_change()
                short = self._pass(changes[-left])
                if left > 1:
                    changes[-left].carry_out(self.disk)
        finally:
            del self.changes[number]
        if len(changes) > 1:
            changes[-1].carry_out(self.disk)
            return None  # type: ignore[return-value]
        return self._half(changes[0]) if short else complete()

    def _pass(self, change: Change) -> bool:
        """Count a change; fail it if it is its turn. Whether it moves fewer bytes than asked."""
        number = len(self.log)
        self.log.append(change)
        fault = self._faults.get(number)
        if fault is None or not fault.fits(change):
            return False
        self.struck.append(change)
        if fault.code == errno.EINTR:
            raise InterruptedError
        if fault.code:
            self.disk.cache_keeps = fault.cache_keeps
            self.disk.fail(change)
            raise OSError(fault.code, os.strerror(fault.code))
        return True

    def _half(self, change: Change) -> T:
        path, offset, data = change.args
        half = max(1, len(data) // 2)
        self.disk.write(path, offset, data[:half])
        return half  # type: ignore[return-value]
