"""The whole store, in the simulated world, on a drive that forgets: power cuts and kills at drawn moments of a run."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.crash.cuts import new_disk
from tests.crash.disk import EVERYTHING, NOTHING, CrashDisk, Survival
from tests.simulation.commits import State
from tests.simulation.decisions import Decisions
from tests.simulation.files import Change
from tests.simulation.opened import PATH, Opened
from tests.simulation.run import Outcome, Play, carry_out
from tests.simulation.scenario import Calls, Scenario, draw
from tests.simulation.users import Stage, names_in, tensors_of
from tests.simulation.world import BrokenPromiseError, World
from tierstore import TierStore
from tierstore.nvme import names
from tierstore.store import face_over

MAX_CRASHES = 4
"""Of one run, which goes on after each as if nothing had happened, and is over soon after the last."""

OFTEN, SELDOM = 0.2, 0.03
"""The chance of a crash after an event that changed the drive: while a commit is being made durable, and else."""


@dataclass(frozen=True)
class StoreCrash:
    """A crash.

    Attributes:
        how: In words.
        disk: What it left.
        least: The oldest generation that may be found.
        killed: The machine ran on.
    """

    how: str
    disk: CrashDisk
    least: int
    killed: bool


def scenario_of(seed: int) -> Scenario:
    """The first of some drawn scenarios in which something is committed."""
    rng = random.Random(f"crash {seed}")
    for number in range(1000 * seed, 1000 * seed + 1000):
        scenario = draw(number)
        if scenario.nvme and _commits((*scenario.threads, *scenario.tasks)):
            break
    return replace(scenario, keep=rng.choice((1, 1, 2, 3)), close_after=None, cuda=scenario.cuda and rng.random() < 0.2)


def _commits(users: tuple[Calls, ...]) -> bool:
    return sum(call[0] == "commit" for calls in users for call in calls) > 1


def run_store(seed: int) -> tuple[Outcome, int]:
    """One run. Returns what became of it, and how many crashes it had."""
    rng = random.Random(f"moments {seed}")
    scenario = scenario_of(seed)
    world = World(Decisions(seed), patience=scenario.slow, stickiness=scenario.sticky)
    disk = new_disk(journaled=rng.random() < 0.3, seed=str(seed), path=PATH)
    # What a failed sync has dropped is still to be read from the cache: else blocks that are nowhere else would be lost, rightly.
    disk.cache_keeps = True
    play = CrashPlay(world, scenario, disk, rng)
    outcome = carry_out(play)
    return outcome, len(play.crashes)


class CrashPlay(Play):
    """A run during which what a crash would leave is put by now and then, to be opened when it is over."""

    def __init__(self, world: World, scenario: Scenario, disk: CrashDisk, rng: random.Random) -> None:
        super().__init__(world, scenario, disk)
        self.crashes: list[StoreCrash] = []
        self._rng = rng
        self._changes: list[Change] = []
        self._going = True

    def open(self) -> Opened:
        opened = super().open()
        if self._going:
            self.world.watchers.append(lambda: self._crash(opened))
        return opened

    def end(self, stage: Stage, store: TierStore) -> None:
        stage.over = False
        super().end(stage, store)

    def reopen(self) -> None:
        self._going = False
        super().reopen()
        for number, crash in enumerate(self.crashes):
            self.world.note(f"main: opens what crash {number + 1} left: {crash.how}")
            try:
                self._check(crash)
            except BrokenPromiseError as error:
                raise BrokenPromiseError(f"after crash {number + 1}, {crash.how}: {error}") from error

    # -- crashes -----------------------------------------------------------------------------------------------------------------

    def _crash(self, opened: Opened) -> None:
        """Perhaps, if something is going on at the drive that was not a moment ago."""
        files = opened.files
        if not self._going or files is None or len(self.crashes) >= MAX_CRASHES:
            return
        under_way = [change for changes in files.changes.values() for change in changes]
        if under_way == self._changes:
            return
        self._changes = under_way
        decisive = any(names.shard_number(change.name) is None or change.doing == "sync" for change in under_way)
        if self._rng.random() >= (OFTEN if decisive else SELDOM):
            return
        disk = self.disk
        assert isinstance(disk, CrashDisk)
        least = self._least(disk)
        killed = self._rng.random() < 0.25
        survival = self._rng.choice((NOTHING, EVERYTHING, *[Survival.drawn(self._rng)] * 4))
        left = disk.kill(survival, under_way) if killed else disk.cut(survival, under_way)
        left.on_replace = lambda disk, name: None
        what = "the process was killed" if killed else "the power went off"
        how = f"{what} at {self.world.clock.now_ns() / 1e3:.1f} µs, under way: {', '.join(map(str, under_way)) or 'nothing'}"
        self.world.note(how)
        self.crashes.append(StoreCrash(how, left, least, killed))
        self.stage.over = len(self.crashes) >= MAX_CRASHES and not self.stage.calm  # at the end all is to be saved and read

    def _least(self, disk: CrashDisk) -> int:
        """Where directories cannot be synced and `CURRENT` could not be written, the commit before the last may be found instead."""
        told = sorted({0, *(commit.generation for commit in self.commits.asked if commit.generation is not None)})
        return told[-2] if disk.journaled and self.scenario.faults and len(told) > 1 else told[-1]

    def _check(self, crash: StoreCrash) -> None:
        """What is found was committed, is new enough, and can be gone on from."""
        self.disk = crash.disk
        opened, store, state = self._open_quietly()
        generation = self._check_state(store, state, crash.least)
        if crash.killed:
            self.disk = crash.disk.cut(NOTHING)
            _, again, found = self._open_quietly()
            if found != state:
                raise BrokenPromiseError(f"generation {generation} was opened, and after a power cut {found} was found")
            again.close()
        self.disk = crash.disk
        for name in sorted(store)[:2]:
            plan = self.scenario.plan(name)
            if not plan.frozen:
                values = self.model.begin(name, names_in(plan))
                store.write(name, tensors_of(plan, values))
                state |= {(name, tensor): value.stamp for tensor, value in values.items()}
        if opened.files is not None and self.scenario.nvme_pages is None:
            committed = store.commit({"commit": 0})
            self.disk = crash.disk.cut(NOTHING)
            _, after, found = self._open_quietly()
            if found != state or after.committed is None or after.committed.generation != committed:
                raise BrokenPromiseError(f"the next life committed {state} as {committed}, and after a power cut there was {found}")
            after.close()
        store.close()

    def _open_quietly(self) -> tuple[Opened, TierStore, State]:
        opened = self.open()
        opened.set_faults(0.0)
        store = face_over(TierStore, opened.engine)
        return opened, store, self.read_all(store)

    def _check_state(self, store: TierStore, state: State, least: int) -> int:
        generation = 0 if store.committed is None else store.committed.generation
        if generation < least:
            raise BrokenPromiseError(f"generation {generation} was found, and {least} was acknowledged")
        expected = self.commits.states.get(generation, {} if not generation else None)
        if state != expected:
            raise BrokenPromiseError(f"generation {generation} holds {state}, and was committed as {expected}")
        return generation
