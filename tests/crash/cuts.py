"""Crashes at every single change that a life makes, and lives on what they left."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

from tests.crash import model
from tests.crash.disk import EVERYTHING, NOTHING, CrashDisk, Survival
from tests.crash.ledger import Ledger
from tests.crash.life import PATH, Life, Plan
from tests.crash.recovery import Checker
from tests.simulation.files import name_of
from tests.simulation.world import BrokenPromiseError
from tierstore.catalog import PAGE
from tierstore.nvme import names

LIVES = 3
ACTIONS = 8

EVERY = 3
"""The next life is tried on every so many of the crashes: it takes longer than all else."""

TIGHT_BYTES = 48 * PAGE
"""A limit that holds three or four generations of five blocks; the pool has to give way, and now and then there is no room."""


FLIPS = 24
"""Bits that are flipped after each life, one at a time."""


@dataclass(frozen=True)
class Crash:
    """One crash.

    Attributes:
        number: Of the change before whose end it came.
        how: In words.
        disk: What it left.
        ledger: What may be there.
        killed: The machine ran on.
    """

    number: int
    how: str
    disk: CrashDisk
    ledger: Ledger
    killed: bool


@dataclass
class Cuts:
    """What became of one seed.

    Attributes:
        changes: Changes at which a crash came.
        crashes: Different ones that were looked at.
        openings: Of directories.
        failure: None if all held.
        story: What each life did to the drive.
    """

    changes: int = 0
    crashes: int = 0
    openings: int = 0
    failure: BrokenPromiseError | None = None
    story: list[str] = field(default_factory=list)


class Collector:
    """Has a life crash before each change ends: all that is not durable lost, nothing lost, and what is drawn; killed, too.

    Args:
        rng: Draws.
        drawn: Power cuts that are drawn, at each change.
    """

    def __init__(self, rng: random.Random, drawn: int) -> None:
        self.crashes: list[Crash] = []
        self.num_changes = 0
        self._rng = rng
        self._drawn = drawn
        self._seen: set[tuple[int, int, bool]] = set()

    def __call__(self, life: Life) -> None:
        self.num_changes += 1
        under_way = life.door.under_way_changes
        self._note(life, "power cut, all lost", life.disk.cut(NOTHING))
        self._note(life, "power cut, nothing lost", life.disk.cut(EVERYTHING, under_way))
        for _ in range(self._drawn):
            self._note(life, "power cut", life.disk.cut(Survival.drawn(self._rng), under_way))
        self._note(life, "killed", life.disk.kill(Survival.drawn(self._rng), under_way), killed=True)

    def _note(self, life: Life, how: str, disk: CrashDisk, *, killed: bool = False) -> None:
        key = (disk.signature(), id(life.ledger), killed)
        if key not in self._seen:
            self._seen.add(key)
            self.crashes.append(Crash(len(life.door.log), how, disk, life.ledger, killed))


def new_disk(*, journaled: bool, seed: str, path: str = PATH) -> CrashDisk:
    """An empty drive, on which the directory has a place."""
    disk = CrashDisk(journaled=journaled, rng=random.Random(f"disk {seed}"))
    disk.directories.add(path)
    model.place(disk)
    return disk


def run_cuts(seed: int, *, lives: int = LIVES, actions: int = ACTIONS, drawn: int = 1) -> Cuts:
    """Lives in a row, each on what a drawn crash of the one before left, and each crashing at every change."""
    return asyncio.run(_run_cuts(seed, lives, actions, drawn))


def described(error: Exception) -> str:
    return str(error) if isinstance(error, BrokenPromiseError) else f"{type(error).__name__}: {error}"


async def _flip_bits(checker: Checker, disk: CrashDisk, life: Life, rng: random.Random) -> None:
    """One bit at a time of what a life has left, in as many manifests as shards, and of the model."""
    kinds = [
        [path for path in disk.files if names.manifest_generation(name_of(path)) is not None],
        [path for path in disk.files if names.shard_number(name_of(path)) is not None and path.startswith(PATH) and life.plan.checksum],
        [path for path in disk.files if name_of(path) == names.CURRENT],
        [model.MODEL],
    ]
    for paths in (rng.choice(kinds) for _ in range(FLIPS)):
        if paths:
            path = rng.choice(paths)
            damaged = disk.kill(NOTHING)
            damaged.flip(path, rng.randrange(8 * len(disk.get(path))))
            await checker.check_damaged(damaged, life.ledger, life.plan, path)


async def _run_cuts(seed: int, lives: int, actions: int, drawn: int) -> Cuts:
    rng = random.Random(f"cuts {seed}")
    disk = new_disk(journaled=rng.random() < 0.3, seed=str(seed))
    limit = rng.choice((None, None, TIGHT_BYTES))
    ledger = Ledger()
    result = Cuts()
    for number in range(lives):
        collector = Collector(rng, drawn)
        plan = Plan.drawn(rng, actions, limit)
        life = Life(disk, plan, f"{seed}.{number}", ledger, watch=collector)
        what = f"life {number + 1}"
        checker = Checker()
        try:
            await life.run()
            for index, crash in enumerate(collector.crashes):
                what = f"life {number + 1}, {crash.how} at change {crash.number}"
                goes_on = index % EVERY == number
                await checker.check(crash.disk.kill(NOTHING), crash.ledger, plan, killed=crash.killed, goes_on=goes_on)
                result.crashes += 1
            what = f"life {number + 1}, damaged"
            await _flip_bits(checker, disk.cut(EVERYTHING), life, rng)
        except Exception as error:  # anything else that comes up is a bug of the store, too
            result.failure = BrokenPromiseError(f"{what} (keep {plan.keep}, journaled {disk.journaled}): {described(error)}")
        result.story += [f"life {number + 1}: {plan}", *(f"{index}: {change}" for index, change in enumerate(life.door.log))]
        result.changes += collector.num_changes
        result.openings += checker.num_openings
        if result.failure is not None:
            break
        crash = rng.choice(collector.crashes)
        disk, ledger = crash.disk, crash.ledger
    return result
