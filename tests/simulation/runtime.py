"""The machine as the engine sees it, made of a `World`: its clock, its threads, its lock and its event loops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tests.simulation.world import Actor, BrokenPromiseError, World

T = TypeVar("T")

HOST_NS = 100_000
"""The longest a host thread takes to begin, and again to end, what is given to it."""


class SimulatedLoop(asyncio.BaseEventLoop):
    """asyncio's own loop, first in first out as always, on an actor: it waits, and tells the time, through the world."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self._world = world
        self._name = name
        self._selector = self
        self._awake = False
        self._actor: Actor | None = None

    def time(self) -> float:
        return self._world.clock.now_ns() / 1e9

    def select(self, timeout: float | None) -> list[Any]:
        """What `BaseEventLoop` calls at each turn to wait until there is something to do."""
        world = self._world
        self._actor = world.current
        if timeout is not None and timeout <= 0:
            world.switch()
        else:
            deadline = None if timeout is None else world.clock.now_ns() + int(timeout * 1e9) + 1
            world.wait_until(lambda: self._awake, f"something to do in {self._name}", deadline)
        self._awake = False
        return []

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        self._awake = True
        if self._actor is not None:
            self._world.notify(self._actor)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Every call on an actor of its own."""
        future: asyncio.Future[T] = self.create_future()
        world = self._world

        def land(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result: T | None = None
            failure: BaseException | None = None
            world.sleep(world.jitter(HOST_NS))
            try:
                result = func(*args)
            except Exception as error:
                failure = error
            world.sleep(world.jitter(HOST_NS))
            if not self.is_closed():
                self.call_soon_threadsafe(land, result, failure)

        world.spawn("host", work)
        return future


class SimulatedLock:
    """The store's lock. A burst under it is one step of the world; before and after it, others may run."""

    def __init__(self, world: World, afterwards: Callable[[], None]) -> None:
        self._world = world
        self._afterwards = afterwards
        self._held = False

    def __enter__(self) -> None:
        self._world.switch()
        if self._held:
            raise BrokenPromiseError("the store's lock is taken by who has it already, or by who waits under it")
        self._held = True

    def __exit__(self, *_: object) -> None:
        self.release()
        self._world.switch()

    def try_acquire(self) -> bool:
        if self._held:
            return False
        self._held = True
        return True

    def release(self) -> None:
        self._held = False
        self._afterwards()
        self._world.watch()


class SimulatedRuntime:
    """See `tierstore.mover.runtime.Runtime`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.clock = world.clock
        self._actors: dict[threading.Thread, Actor] = {}

    def new_loop(self) -> asyncio.AbstractEventLoop:
        return SimulatedLoop(self._world, "the engine")

    def new_lock(self, afterwards: Callable[[], None]) -> SimulatedLock:
        return SimulatedLock(self._world, afterwards)

    def start_thread(self, target: Callable[[], None], name: str, *, daemon: bool = False) -> threading.Thread:
        actor = self._world.spawn(name.removeprefix("tierstore-"), target)
        assert actor.thread is not None
        self._actors[actor.thread] = actor
        return actor.thread

    def join(self, thread: threading.Thread) -> None:
        self._world.join(self._actors[thread])

    def wait(self, future: Future[T], timeout: float | None = None) -> T:
        world = self._world
        me = world.current
        assert me is not None, "an event waits for a future"
        future.add_done_callback(lambda _: world.notify(me))
        deadline = None if timeout is None else world.clock.now_ns() + max(0, int(timeout * 1e9))
        if not world.wait_until(future.done, "an answer of the engine", deadline):
            raise TimeoutError
        return future.result()
