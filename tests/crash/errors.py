"""Errors without a crash: every single change of a life fails in every way that it can, and the same process goes on."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tests.crash.cuts import described, new_disk
from tests.crash.disk import EVERYTHING, NOTHING, CrashDisk, Survival
from tests.crash.door import EVERY_FAULT, Fault
from tests.crash.ledger import Ledger
from tests.crash.life import Life, Plan
from tests.crash.recovery import Checker
from tests.simulation.world import BrokenPromiseError
from tierstore.catalog import PAGE
from tierstore.errors import DirectoryError, ShardError, TierFullError, TransferError

ACTIONS = 6
BURST = 3
"""Changes in a row that fail, where it is not one alone."""

FULL = 6
MOST_ROOM_BYTES = 24 * PAGE
"""Lives on a drive that has room for so many bytes more at most."""

AFTERMATH = 5
"""Crashes after an error, soon."""


@dataclass
class Errors:
    """What became of one seed.

    Attributes:
        changes: Changes that were made to fail.
        runs: Lives that had one fail.
        failure: None if all held.
        story: The changes of the life that failed.
    """

    changes: int = 0
    runs: int = 0
    failure: BrokenPromiseError | None = None
    story: list[str] = field(default_factory=list)


def run_errors(seed: int, *, actions: int = ACTIONS, every: int = 1) -> Errors:
    """One life, again and again, each time with other changes failing.

    Args:
        seed: Decides what the life does.
        actions: How much.
        every: Strike only so many-th changes.
    """
    return asyncio.run(_run_errors(seed, actions, every))


async def _run_errors(seed: int, actions: int, every: int) -> Errors:
    rng = random.Random(f"errors {seed}")
    start = new_disk(journaled=rng.random() < 0.3, seed=str(seed))
    plan = replace(Plan.drawn(rng, actions, None), closes=False)
    before = Life(start, plan, f"before {seed}", Ledger())
    await before.open()
    await before.write_many()
    await before.commit()
    await before.write_many()
    start = start.kill(NOTHING)
    undisturbed = Life(start.kill(NOTHING), plan, str(seed), before.ledger)
    await undisturbed.run()
    await undisturbed.commit()
    result = Errors()
    for number, change in enumerate(undisturbed.door.log):
        for kind, fault in enumerate(EVERY_FAULT):
            if not fault.fits(change) or (number + kind + seed) % every:
                continue
            burst = fault.code == errno.EIO and number % 4 == 0
            faults = dict.fromkeys(range(number, number + (BURST if burst else 1)), fault)
            aftermath = Aftermath(random.Random(f"aftermath {seed} {number} {kind}"))
            life = Life(start.kill(NOTHING), plan, str(seed), before.ledger, faults=faults, watch=aftermath)
            try:
                await _strike(life, faults)
                await aftermath.check(plan)
            except Exception as error:
                what = f"{'changes' if burst else 'change'} {number} ({change}) fails with {fault}"
                result.failure = BrokenPromiseError(f"{what}, checksum {plan.checksum}, journaled {start.journaled}: {described(error)}")
                result.story = [f"{index}: {done}" for index, done in enumerate(life.door.log)]
                return result
            result.runs += 1
            result.changes += len(life.door.struck)
    for number in range(FULL):
        life = Life(start.kill(NOTHING), plan, str(seed), before.ledger)
        life.disk.capacity = life.disk.used_bytes() + rng.randint(0, MOST_ROOM_BYTES)
        try:
            await _strike(life, {})
        except Exception as error:
            result.failure = BrokenPromiseError(f"with room for {life.disk.capacity} bytes, number {number}: {described(error)}")
            result.story = [f"{index}: {done}" for index, done in enumerate(life.door.log)]
            return result
        result.runs += 1
        result.changes += len(life.failed)
    return result


class Aftermath:
    """Crashes while a life still stumbles over an error."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._left: list[tuple[CrashDisk, Ledger]] = []

    def __call__(self, life: Life) -> None:
        if life.door.struck and len(self._left) < AFTERMATH and self._rng.random() < 0.5:
            self._left.append((life.disk.cut(Survival.drawn(self._rng), life.door.under_way_changes), life.ledger))

    async def check(self, plan: Plan) -> None:
        for disk, ledger in self._left:
            await Checker().check(disk, ledger, plan, killed=False, goes_on=False)


async def _strike(life: Life, faults: Mapping[int, Fault]) -> None:
    """A life in which something fails: the last commit stands, the process goes on, and what it commits then stays."""
    while True:
        try:
            await life.open()
            break
        except (DirectoryError, TransferError, TierFullError) as error:
            _expect_struck(life, error)
    checker = Checker()
    troubles = 0
    for _ in range(life.plan.actions):
        await life.act()
        if len(life.door.struck) + len(life.failed) > troubles:
            troubles = len(life.door.struck) + len(life.failed)
            await _check(checker, life, life.disk.cut(NOTHING))
            await _check(checker, life, life.disk.cut(EVERYTHING))
    for error in life.failed:
        _expect_struck(life, error)
    life.disk.capacity = None
    while len(life.door.log) <= max(faults, default=-1):  # where an error has cut things short, the drive may still fail
        await life.write_many()
    life.failed.clear()
    if not await life.commit() and not (_lost(life) and await life.commit()):
        raise BrokenPromiseError(f"the drive is well again, and a commit fails: {life.failed[-1]}")
    if not any(change.doing == "sync" for change in life.door.struck):
        life.check_links()
    await _check(checker, life, life.disk.cut(NOTHING))
    await life.directory.close()
    checker.check_left_over(life.disk, life.directory, life.plan, fails=bool(life.door.struck))


async def _check(checker: Checker, life: Life, disk: CrashDisk) -> None:
    disk.capacity = None  # the next life has room
    await checker.check(disk, life.ledger, life.plan, killed=False)


def _lost(life: Life) -> bool:
    """The last error says that bytes are gone that a sync has dropped; they were written again since."""
    return isinstance(life.failed[-1], ShardError) and any(change.doing == "sync" for change in life.door.struck)


def _expect_struck(life: Life, error: Exception) -> None:
    full = isinstance(error, TierFullError) and life.disk.capacity is not None
    if not life.door.struck and not full:
        raise BrokenPromiseError(f"nothing failed, and yet: {error}") from error
