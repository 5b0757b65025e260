"""Those who use the store in a run: threads on the blocking face, tasks on the asynchronous one, both carrying out the same calls."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from tests.simulation.commits import Commits, Committed
from tests.simulation.model import ABSENT, Model, Value, pattern, stamp_of
from tests.simulation.opened import Opened
from tests.simulation.scenario import FRESH, SCRATCH, SPENT, BlockPlan, Call, Calls, How, Scenario
from tests.simulation.world import BrokenPromiseError, World
from tierstore import AsyncTierStore, TierStore
from tierstore.catalog import PAGE, Block, lay_out
from tierstore.errors import (
    BlockExistsError,
    BlockNotFoundError,
    CapacityError,
    ClosedError,
    DeadlockError,
    LeaseError,
    LeaseTimeoutError,
    TierFullError,
    TransferError,
)
from tierstore.mover import operations
from tierstore.store import AsyncUse
from tierstore.sync import Use

T = TypeVar("T")
Wants = tuple[tuple[str, How], ...]


@dataclass
class Stage:
    """What all users of a run share.

    Attributes:
        holds: Blocks whose hold on the device has been confirmed.
        nested: Somebody asks for more while he leases: deadlocks may be reported.
        closing: The store is being closed under its users' hands.
        calm: Nobody else asks for anything and nothing fails any more: no call has an excuse.
        over: Nobody asks for anything any more that he has not asked for yet.
    """

    world: World
    scenario: Scenario
    model: Model
    opened: Opened
    commits: Commits
    nested: bool = False
    has_holds: bool = False
    closing: bool = False
    calm: bool = False
    over: bool = False
    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def faulty(self) -> bool:
        return self.scenario.faults > 0 or self.scenario.stuck is not None


class Blocking:
    """`TierStore` as coroutines that never suspend: the thread waits instead."""

    def __init__(self, store: TierStore, world: World) -> None:
        self._store = store
        self._world = world

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(*args: Any, **options: Any) -> Any:
            return method(*args, **options)

        return call

    def use(self, *names: str, write: Any, timeout: float | None) -> Any:
        return _BlockingUse(self._store.use(*names, write=write, timeout=timeout))

    def train(self, names: tuple[str, ...], write: list[str], timeout: float | None, **details: Any) -> Any:
        """As `use`, of some blocks `fresh` or `spent`."""
        return _BlockingUse(Use(self._store.engine, names, write, timeout, **details))

    async def declare(self, block: Block) -> None:
        self._store._run(operations.declare(self._store.engine, block, threading.get_ident()))

    async def sleep(self, seconds: float) -> None:
        self._world.sleep(int(seconds * 1e9))


class _BlockingUse:
    def __init__(self, context: Any) -> None:
        self._context = context

    async def __aenter__(self) -> Any:
        return self._context.__enter__()

    async def __aexit__(self, *details: Any) -> None:
        self._context.__exit__(*details)


class Waiting:
    """`AsyncTierStore`, and how a task sleeps."""

    def __init__(self, store: AsyncTierStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def train(self, names: tuple[str, ...], write: list[str], timeout: float | None, **details: Any) -> Any:
        return AsyncUse(self._store.engine, names, write, timeout, **details)

    async def declare(self, block: Block) -> None:
        await self._store._run(operations.declare(self._store.engine, block, asyncio.current_task()))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it suspended")


def tensors_of(plan: BlockPlan, values: dict[str, Value]) -> torch.Tensor | dict[str, torch.Tensor]:
    numel = plan.pages * PAGE // 8 // plan.tensors
    tensors = {name: pattern(value.stamp, numel) for name, value in values.items()}
    return next(iter(tensors.values())) if plan.tensors == 1 else tensors


def block_of(plan: BlockPlan) -> Block:
    """The block that `put` of its tensors would make."""
    numel = plan.pages * PAGE // 8 // plan.tensors
    single = plan.tensors == 1
    return lay_out(plan.name, [(plan.name if single else tensor, "I64", (numel,)) for tensor in names_in(plan)], single=single)


def names_in(plan: BlockPlan) -> list[str]:
    """The model's names of a block's tensors."""
    return [f"t{index}" for index in range(plan.tensors)]


def parts(plan: BlockPlan, given: Any) -> dict[str, torch.Tensor]:
    """What a lease or read gave, by tensor."""
    return {"t0": given} if plan.tensors == 1 else dict(given)


class User:
    """One thread, or one task, and what it leases.

    Args:
        name: For the history.
        face: A `Blocking` or a `Waiting`.
    """

    def __init__(self, name: str, stage: Stage, face: Any) -> None:
        self.name = name
        self.stage = stage
        self.world = stage.world
        self.model = stage.model
        self.face = face
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.newest: dict[tuple[str, str], int] = {}
        self.handles: list[tuple[Any, Committed]] = []

    async def run(self, calls: Calls) -> None:
        for call in calls:
            await self.call(call)
        for handle, committed in self.handles:
            await self._expecting(("commit", "result"), self._finish_commit(handle, committed))

    async def call(self, call: Call) -> None:
        if self.stage.over:
            return
        if call[0] == "cancel":
            await self._cancel(*call[1:])
            return
        await self._expecting(call, getattr(self, f"_{call[0]}")(*call[1:]))

    async def _expecting(self, call: Call, coroutine: Coroutine[Any, Any, None]) -> None:
        """Carry out a call; the errors it may end with here are no failure of the store."""
        what, since = describe(call), self.model.tick()
        self.world.note(f"{self.name}: {what}")
        outcome = "done"
        try:
            await coroutine
        except asyncio.CancelledError:
            self.world.note(f"{self.name}: cancelled in {what}")
            raise
        except Exception as error:
            if isinstance(error, BrokenPromiseError) or not self._expected(call, error, since):
                raise
            outcome = type(error).__name__
        self.stage.outcomes[f"{what.split()[0]} {outcome}"] += 1
        self.world.note(f"{self.name}: {outcome}: {what}")

    def _fits(self, call: Call) -> bool:
        """Whether what is wanted and what is leased surely fit on the device together: pages of one size leave no gaps."""
        scenario = self.stage.scenario
        if call[0] != "use" or any(plan.pages > 1 for plan in scenario.plans):
            return False
        wanted = {name for name, _ in call[1]} | set(+self.reads) | set(+self.writes)
        return len(wanted) <= scenario.gpu_pages

    def _expected(self, call: Call, error: Exception, since: int) -> bool:
        stage = self.stage
        if _lacks_content(error):
            return True  # checked where it was caught first
        if stage.calm:
            return isinstance(error, TierFullError) and stage.scenario.nvme_pages is not None
        leasing = bool(+self.reads) or bool(+self.writes)
        if isinstance(error, ClosedError):
            return stage.closing
        if isinstance(error, LeaseTimeoutError):
            return call[0] == "use" and call[2] is not None
        if isinstance(error, TierFullError):
            return stage.faulty or stage.scenario.nvme_pages is not None
        if isinstance(error, TransferError):
            return stage.faulty
        if isinstance(error, DeadlockError):
            return stage.nested and stage.model.last_crowded > since
        if isinstance(error, LeaseError):
            return leasing or (stage.has_holds and call[0] == "evict")
        if isinstance(error, CapacityError):
            if stage.opened.files is not None and stage.opened.files.has_hung:
                return True  # what it may still touch is kept out of use
            return stage.has_holds or (leasing and not self._fits(call))
        return isinstance(error, BlockNotFoundError | BlockExistsError)  # checked where they were caught first

    async def _cancel(self, after: int, call: Call) -> None:
        """Carry out a call in a task of its own, and cancel that."""
        inner = User(f"{self.name}'", self.stage, self.face)
        task = asyncio.ensure_future(inner.call(call))
        await asyncio.sleep(after / 1e6)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.handles += inner.handles

    # -- calls -------------------------------------------------------------------------------------------------------------------

    async def _use(self, wants: Wants, timeout: int | None, pause: int, inside: Calls) -> None:
        since = self.model.tick()
        names = tuple(name for name, _ in wants)
        fresh = [name for name, how in wants if how in (FRESH, SCRATCH)]
        lost = {name: self.model.begin_delete(name, names_in(self._plan(name))) for name in fresh}  # perhaps, if it comes too late
        spent: dict[str, dict[str, Value]] = {}
        doubtful: dict[str, dict[str, Value]] = {}
        try:
            async with self._asking(names, wants, fresh, None if timeout is None else timeout / 1e6) as given:
                for name in fresh:
                    self.model.never(lost.pop(name), name)
                leased = dict(zip(names, (given,) if len(names) == 1 else given, strict=True))
                try:
                    await self._leased(wants, leased, since, pause, inside)
                except BaseException:  # nothing is used up, and what was to be written whole may be nowhere
                    doubtful = {name: self.model.begin_delete(name, names_in(self._plan(name))) for name in fresh}
                    raise
                else:
                    used_up = [name for name, how in wants if how in (SPENT, SCRATCH) and not self.reads[name] + self.writes[name]]
                    spent = {name: self.model.begin_delete(name, names_in(self._plan(name))) for name in used_up}
        except (BlockNotFoundError, LeaseError) as error:
            if isinstance(error, BlockNotFoundError) or _lacks_content(error):
                self._missing(str(error.block), since)
            raise
        finally:
            for values in (*lost.values(), *doubtful.values()):
                self.model.end(values, certain=False)
            for values in spent.values():
                self.model.end(values, certain=True)

    def _asking(self, names: tuple[str, ...], wants: Wants, fresh: list[str], seconds: float | None) -> Any:
        write = [name for name, how in wants if how]
        spent = [name for name, how in wants if how in (SPENT, SCRATCH)]
        if fresh or spent:
            return self.face.train(names, write, seconds, fresh=fresh, spent=spent)
        return self.face.use(*names, write=write, timeout=seconds)

    async def _leased(self, wants: Wants, leased: dict[str, Any], since: int, pause: int, inside: Calls) -> None:
        model, owner = self.model, self._owner()
        scheduler = self.stage.opened.engine.scheduler
        places = {name: scheduler.find(name).gpu.offset for name, _ in wants}
        model.lease(owner, dict(wants), places)
        self.world.note(f"{self.name}: has {', '.join(f'{name}@{places[name]}' for name, _ in wants)}")
        views = {name: parts(self._plan(name), given) for name, given in leased.items()}
        for name, how in wants:
            (self.writes if how else self.reads)[name] += 1
            if self.writes[name] == bool(how):  # an outermost lease: what he wrote in an earlier one may be gone
                for tensor in views[name]:
                    self.newest.pop((name, tensor), None)
        seen: dict[tuple[str, str], int] = {}
        try:
            for name, how in wants:
                for tensor, view in views[name].items() if how not in (FRESH, SCRATCH) else ():
                    self._see(name, tensor, view, since, seen, nested=self.writes[name] > bool(how))
            await self._pause(pause)
            for name, how in wants:
                if how not in (False, SPENT):
                    await self._overwrite(name, views[name], pause)
            for call in inside:
                await self.call(call)
            await self._pause(pause)
            for name, _ in wants:
                for tensor, view in views[name].items():
                    self._see_again(name, tensor, view, seen)
        finally:
            for name, how in wants:
                (self.writes if how else self.reads)[name] -= 1
            model.release(owner, dict(wants), places)

    def _see(self, name: str, tensor: str, view: torch.Tensor, since: int, seen: dict[tuple[str, str], int], *, nested: bool) -> None:
        """Have the device look at a tensor at the beginning of a lease, perhaps inside a write lease of the same user."""
        until = self.model.tick()
        outer = self.newest.get((name, tensor)) if nested else None

        def look() -> None:
            stamp = stamp_of(view, f"{name}/{tensor}, leased by {self.name},")
            seen.setdefault((name, tensor), stamp)
            if outer is None:
                self.model.observe(name, tensor, stamp, since, until)
            elif stamp != outer:
                raise BrokenPromiseError(f"{name}/{tensor} is {stamp} in the inner lease and {outer} in the outer")

        self.stage.opened.on_device(look)

    def _see_again(self, name: str, tensor: str, view: torch.Tensor, seen: dict[tuple[str, str], int]) -> None:
        """Have the device look at a tensor at the end of a lease: nobody but the user himself may have changed it."""
        mine = self.newest.get((name, tensor)) if self.writes[name] else None

        def look() -> None:
            stamp = stamp_of(view, f"{name}/{tensor}, leased by {self.name},")
            expected = seen[name, tensor] if mine is None else mine
            if stamp != expected:
                raise BrokenPromiseError(f"{name}/{tensor} changed under {self.name}'s lease from {expected} to {stamp}")

        self.stage.opened.on_device(look)

    async def _overwrite(self, name: str, views: dict[str, torch.Tensor], pause: int) -> None:
        """Have the device write all tensors, half by half, with time in between."""
        values = self.model.begin(name, views)

        def fill(half: int) -> None:
            for tensor, view in views.items():
                middle = view.numel() // 2
                piece = slice(0, middle) if half == 0 else slice(middle, None)
                # `.data` has a version counter of its own: on a GPU, versions count when work is issued, not when it happens
                view.data[piece] = pattern(values[tensor].stamp, view.numel())[piece]

        self.stage.opened.on_device(lambda: fill(0))
        try:
            await self._pause(pause)
        finally:  # also when cancelled: what is half written would be nobody's value
            self.stage.opened.on_device(lambda: fill(1))
            for tensor in views:
                self.newest[name, tensor] = values[tensor].stamp
            self.model.end(values, certain=True)

    async def _read(self, name: str) -> None:
        since = self.model.tick()
        try:
            given = await self.face.read(name)
        except (BlockNotFoundError, LeaseError) as error:
            if isinstance(error, BlockNotFoundError) or _lacks_content(error):
                self._missing(name, since)
            raise
        for tensor, copy in parts(self._plan(name), given).items():
            self.model.observe(name, tensor, stamp_of(copy, f"{name}/{tensor}, read by {self.name},"), since)

    async def _write(self, name: str, which: int) -> None:
        """Replace some of the tensors."""
        plan = self._plan(name)
        if plan.frozen:
            return
        tensors = names_in(plan)
        chosen = tensors if which >= len(tensors) else [tensors[which]]
        await self._change(name, self.model.begin(name, chosen), lambda values: self.face.write(name, tensors_of(plan, values)))

    async def _put(self, name: str) -> None:
        plan = self._plan(name)
        since = self.model.tick()
        values = self.model.begin(name, names_in(plan))
        put = lambda values: self.face.put(name, tensors_of(plan, values), tier=plan.tier, frozen=plan.frozen)  # noqa: E731
        try:
            await self._change(name, values, put)
        except BlockExistsError:
            if not any(value.stamp != ABSENT and self._possible(name, value, since) for value in self._values(name)):
                raise BrokenPromiseError(f"put() finds {name} there, which it cannot be") from None
            raise

    async def _declare(self, name: str) -> None:
        await self.face.declare(block_of(self._plan(name)))

    async def _delete(self, name: str) -> None:
        values = self.model.begin_delete(name, names_in(self._plan(name)))
        await self._change(name, values, lambda _: self.face.delete(name))

    async def _change(self, name: str, values: dict[str, Value], change: Any) -> None:
        since = self.model.tick()
        certain = False
        try:
            await change(values)
            certain = True
        except (BlockNotFoundError, LeaseError) as error:
            if isinstance(error, BlockNotFoundError) or _lacks_content(error):
                self._missing(name, since)
            raise
        finally:
            self.model.end(values, certain=certain)

    async def _prefetch(self, *names: str) -> None:
        await self.face.prefetch(*names)

    async def _hold(self, name: str, tier: str) -> None:
        await self.face.hold(name, tier)

    async def _unhold(self, name: str) -> None:
        await self.face.unhold(name)

    async def _evict(self, name: str) -> None:
        await self.face.evict(name)

    async def _flush(self) -> None:
        await self.face.flush()

    async def _sleep(self, micros: int) -> None:
        await self._pause(micros)

    async def _commit(self, wait: bool) -> None:
        committed = self.stage.commits.ask()
        metadata = {"commit": committed.number}
        if wait:
            committed.generation = await self.face.commit(metadata)
        else:
            self.handles.append((await self.face.commit(metadata, wait=False), committed))

    async def _finish_commit(self, handle: Any, committed: Committed) -> None:
        result = handle.result()
        committed.generation = await result if asyncio.iscoroutine(result) else result

    # -- small things ------------------------------------------------------------------------------------------------------------

    async def _pause(self, micros: int) -> None:
        if micros:
            await self.face.sleep(micros / 1e6)
        else:
            self.world.switch()

    def _plan(self, name: str) -> BlockPlan:
        return self.stage.scenario.plan(name)

    def _owner(self) -> str:
        return self.name

    def _missing(self, name: str, since: int) -> None:
        """The store says that there is no such block."""
        for tensor in names_in(self._plan(name)):
            self.model.observe(name, tensor, ABSENT, since)

    def _values(self, name: str) -> list[Value]:
        return list(self.model.register(name, "t0").values.values())

    def _possible(self, name: str, value: Value, since: int) -> bool:
        return self.model.register(name, "t0").last_moment(value) >= since


def _lacks_content(error: Exception) -> bool:
    return isinstance(error, LeaseError) and "has no content" in str(error)


def describe(call: Call) -> str:
    """A call in the history."""
    if call[0] != "use":
        return " ".join(map(str, call))
    names = ", ".join(name + (f" {how}" if isinstance(how, str) else " for writing" if how else "") for name, how in call[1])
    return f"use {names}" + (f" within {call[2]} µs" if call[2] is not None else "")
