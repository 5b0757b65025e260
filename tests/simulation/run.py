"""One run: a world, a store in it, its users, and what is checked at the end."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from tests.simulation.commits import Commits, State
from tests.simulation.cuda import Streams, simulated_cuda
from tests.simulation.decisions import Decisions
from tests.simulation.files import Disk
from tests.simulation.invariants import Invariants, check_quiet
from tests.simulation.links import Pace
from tests.simulation.model import Model, stamp_of
from tests.simulation.opened import Opened, open_simulated
from tests.simulation.runtime import SimulatedLoop
from tests.simulation.scenario import Calls, Scenario, count_calls
from tests.simulation.users import Blocking, Stage, User, Waiting, block_of, drive, names_in, parts, tensors_of
from tests.simulation.world import BrokenPromiseError, World
from tierstore import AsyncTierStore, TierStore
from tierstore.mover import operations
from tierstore.store import face_over


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        failure: None if all held.
        digest: Of all that happened.
    """

    failure: BrokenPromiseError | None
    world: World
    outcomes: Counter[str]
    digest: str


def run(scenario: Scenario, seed: int, script: Mapping[int, int] | None = None) -> Outcome:
    """Run a scenario with the seed's decisions, or with those of a script."""
    world = World(Decisions(seed, script), patience=scenario.slow, stickiness=scenario.sticky)
    return carry_out(Play(world, scenario))


def carry_out(play: Play) -> Outcome:
    """Run a play to its end, or to the first promise that is broken."""
    world = play.world
    failure: BrokenPromiseError | None = None
    with _quiet_machine(), simulated_cuda(play.machine) if play.machine is not None else nullcontext():
        try:
            world.run(play.main)
        except BrokenPromiseError as error:
            failure = error
    return Outcome(failure, world, play.outcomes, world.digest())


@contextmanager
def _quiet_machine() -> Iterator[None]:
    """No log lines, and no collection of garbage, which would run finalisers at moments that no seed decides."""
    collecting, disabled = gc.isenabled(), logging.root.manager.disable
    gc.disable()
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        if collecting:
            gc.enable()


class Play:
    """The run from its first actor's point of view.

    Args:
        disk: What the directory lies on; None: a drive that forgets nothing.
    """

    def __init__(self, world: World, scenario: Scenario, disk: Disk | None = None) -> None:
        self.world = world
        self.scenario = scenario
        self.model = Model()
        self.disk = disk or Disk()
        self.commits = Commits(self.model, self.disk)
        self.outcomes: Counter[str] = Counter()
        self.machine = Streams(world, Pace()) if scenario.cuda else None

    def main(self) -> None:
        world, scenario = self.world, self.scenario
        opened = self.open()
        stage = self.stage = Stage(world, scenario, self.model, opened, self.commits, outcomes=self.outcomes)
        calls = [*scenario.threads, *scenario.tasks]
        stage.nested = any(call[0] == "use" and call[4] for each in calls for call in _plain(each))
        stage.has_holds = any(call[0] == "hold" for each in calls for call in _all(each))
        store = face_over(TierStore, opened.engine)
        self._put_all(store)
        opened.set_faults(scenario.faults, scenario.stuck)
        actors = [
            world.spawn(f"thread-{index}", lambda index=index, calls=calls: self._thread(stage, store, f"thread-{index}", calls))
            for index, calls in enumerate(scenario.threads)
        ]
        if scenario.tasks:
            actors.append(world.spawn("tasks", lambda: self._tasks(stage)))
        if scenario.close_after is not None:
            world.sleep(scenario.close_after * 1000)
            stage.closing = True
            world.note("main: closes the store")
            store.close()
        for actor in actors:
            world.join(actor)
        self.end(stage, store)
        if scenario.nvme:
            self.reopen()

    def open(self) -> Opened:
        """Open a store on what the disk holds, and watch it."""
        opened = open_simulated(self.world, self.scenario, self.disk, self.machine)
        self.world.watchers[:] = [Invariants(self.world, self.model, opened).check]
        return opened

    def _put_all(self, store: TierStore) -> None:
        for plan in self.scenario.blocks:
            values = self.model.begin(plan.name, names_in(plan))
            store.put(plan.name, tensors_of(plan, values), tier=plan.tier, frozen=plan.frozen)
            self.model.end(values, certain=True)
        for plan in self.scenario.blanks:
            store._run(operations.declare(store.engine, block_of(plan), "main"))

    def _thread(self, stage: Stage, store: TierStore, name: str, calls: Calls) -> None:
        drive(User(name, stage, Blocking(store, self.world)).run(calls))

    def _tasks(self, stage: Stage) -> None:
        loop = SimulatedLoop(self.world, "the tasks")
        asyncio.set_event_loop(loop)
        store = face_over(AsyncTierStore, stage.opened.engine)

        async def all_of_them() -> None:
            users = [User(f"task-{index}", stage, Waiting(store)) for index in range(len(self.scenario.tasks))]
            await asyncio.gather(*(user.run(calls) for user, calls in zip(users, self.scenario.tasks, strict=True)))

        try:
            loop.run_until_complete(all_of_them())
        finally:
            store._engine = None
            loop.close()
            asyncio.set_event_loop(None)

    def end(self, stage: Stage, store: TierStore) -> None:
        """When the faults have stopped, everything can be saved and read, and nothing is left over."""
        if stage.closing:
            return
        opened = stage.opened
        opened.set_faults(0.0)
        stage.calm = True
        check_quiet(self.world, store, opened)
        user = User("main", stage, Blocking(store, self.world))
        for name in list(store):
            drive(user.call(("read", name)))
        full = stage.outcomes["flush TierFullError"]
        drive(user.call(("flush",)))
        for name in list(store) if stage.outcomes["flush TierFullError"] == full else ():
            assert not store.info(name).dirty, f"{name} is dirty after flush()"
        if self.scenario.nvme:
            drive(user.call(("commit", True)))
        check_quiet(self.world, store, opened)
        store.close()

    def reopen(self) -> None:
        """The directory holds the last commit, whole."""
        self.world.note("main: opens the directory again")
        opened = self.open()
        opened.set_faults(0.0)
        store = face_over(TierStore, opened.engine)
        state = self.read_all(store)
        if store.committed is not None:
            self.commits.check_found(store.committed.generation, state)
        elif self.commits.newest or state:
            raise BrokenPromiseError(f"no commit was found; generation {self.commits.newest} was acknowledged, and {state} is there")
        store.close()

    def read_all(self, store: TierStore) -> State:
        """What a store holds that was just opened."""
        state: State = {}
        for name in store:
            for index, copy in enumerate(parts(self.scenario.plan(name), store.read(name)).values()):
                state[name, f"t{index}"] = stamp_of(copy, f"{name} of the generation that was found")
        return state


def _plain(calls: Calls) -> Iterator[tuple[object, ...]]:
    for call in calls:
        yield call[2] if call[0] == "cancel" else call


def _all(calls: Calls) -> Iterator[tuple[object, ...]]:
    for call in _plain(calls):
        yield call
        if call[0] == "use":
            yield from _all(call[4])  # type: ignore[arg-type]


__all__ = ["Outcome", "count_calls", "run"]
