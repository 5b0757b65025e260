"""A world in which one thread runs at a time, and a seed decides which: threads as actors, events in simulated time, a history.

[Note: The baton]
Every actor is a thread of its own, so that the store's code runs unmodified, but only the one with the baton runs. It gives the
baton on at switch points: before the store's lock is taken and after it is released, where it waits, and at each turn of an event loop.
Handing over is the release of one lock and the wait for another, so a run is a function of its decisions alone.

[Note: Time]
Simulated I/O, time-outs and delays are events. Time moves to the next event when no actor can run, or when the world decides that the
actors are slow. When no actor can run and no event is due, those who wait will wait for ever: a lost wake-up or a deadlock.

[Note: After a failure]
Nothing is unwound: every thread of the run stays where it is, parked, so that the state that failed can be looked at, and no
`finally` of the store's runs in a world that has ended. The threads are daemons.
"""

from __future__ import annotations

import heapq
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import xxhash

from tests.simulation.decisions import Decisions
from tierstore.clock import SimulatedClock

MAX_STEPS = 60_000
"""Switch points of one run. No run that ends takes a tenth of it."""

MAX_IDLE_STEPS = 4_000
"""Switch points in a row at which actors run though nothing happens that they could be waiting for: somebody spins."""


class BrokenPromiseError(AssertionError):
    """The store broke a promise; the message says which."""


class Actor:
    """A thread of the world.

    Attributes:
        doing: What it waits for, for the message of a deadlock.
    """

    __slots__ = ("doing", "ended", "go", "name", "ready", "target", "thread")

    def __init__(self, name: str, target: Callable[[], None]) -> None:
        self.name = name
        self.target = target
        self.go = threading.Lock()
        self.go.acquire()
        self.thread: threading.Thread | None = None
        self.ready = True
        self.ended = False
        self.doing = "starting"


class World:
    """Actors, events, time and their order.

    Args:
        decisions: Chooses.
        patience: How often the actors are slow: the chance that the next event comes although an actor could run.
        stickiness: How often the same actor simply goes on where another could.

    Attributes:
        watchers: Called after every event, and wherever the store says that something has happened.
        current: The actor that runs; None while an event happens.
    """

    def __init__(self, decisions: Decisions, *, patience: float = 0.05, stickiness: float = 0.3) -> None:
        self.decisions = decisions
        self.clock = SimulatedClock()
        self.history: list[tuple[int, str, str]] = []
        self.watchers: list[Callable[[], None]] = []
        self.current: Actor | None = None
        self.failure: BaseException | None = None
        self.failure_text = ""
        self.steps = 0
        self.idle_steps = 0
        self._slow = patience
        self._sticky = stickiness
        self._actors: list[Actor] = []
        self._ready: list[Actor] = []
        self._events: list[tuple[int, int, str, Callable[[], None]]] = []
        self._numbers = 0
        self._joiners: dict[Actor, list[Actor]] = {}
        self._over = threading.Lock()
        self._over.acquire()

    # -- the outside ---------------------------------------------------------------------------------------------------------

    def run(self, main: Callable[[], None]) -> None:
        """Run `main` as the first actor, until it and all whom it started have ended.

        Raises:
            BrokenPromiseError: Something did not hold; everything stays as it was then, see [Note: After a failure].
        """
        first = self.spawn("main", main)
        self._ready.remove(first)
        self.current = first
        first.go.release()
        self._over.acquire()
        if self.failure is not None:
            if isinstance(self.failure, BrokenPromiseError):
                raise self.failure
            raise BrokenPromiseError(f"{type(self.failure).__name__}: {self.failure}\n{self.failure_text}") from self.failure
        for actor in self._actors:
            assert actor.thread is not None
            actor.thread.join()

    def note(self, what: str) -> None:
        """Write into the history."""
        self.history.append((self.clock.now_ns(), self.current.name if self.current is not None else "-", what))

    def digest(self) -> str:
        """A sum over all that happened, and when."""
        running = xxhash.xxh3_64()
        for entry in self.history:
            running.update(repr(entry).encode())
        running.update(repr(sorted(self.decisions.taken.items())).encode())
        return running.hexdigest()

    def story(self, last: int | None = None) -> str:
        """The history as text, one line per entry: time, actor, what."""
        entries = self.history if last is None else self.history[-last:]
        return "\n".join(f"{time / 1e3:12.1f} µs  {actor:<12} {what}" for time, actor, what in entries)

    # -- actors ----------------------------------------------------------------------------------------------------------------

    def spawn(self, name: str, target: Callable[[], None]) -> Actor:
        """Start an actor. It runs when it is chosen."""
        actor = Actor(name, target)
        actor.thread = threading.Thread(target=self._run, args=(actor,), name=name, daemon=True)
        self._actors.append(actor)
        self._ready.append(actor)
        actor.thread.start()
        return actor

    def switch(self) -> None:
        """A point at which somebody else may run. Nothing during an event, which is over in no time."""
        me = self.current
        if me is None:
            return
        self._ready.insert(0, me)
        self._give_on(me)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else runs meanwhile; nothing inside may wait."""
        me, self.current = self.current, None
        try:
            yield
        finally:
            self.current = me

    def wait_until(self, condition: Callable[[], bool], doing: str, deadline_ns: int | None = None) -> bool:
        """Wait for a condition; whoever makes it true calls `notify`. False: `deadline_ns` came first."""
        me = self.current
        if me is None:
            raise BrokenPromiseError(f"an event would have to wait: {doing}")
        while not condition():
            if deadline_ns is not None and self.clock.now_ns() >= deadline_ns:
                return False
            me.ready = False
            me.doing = doing
            if deadline_ns is not None:
                self.at(deadline_ns, "", lambda: self.notify(me))
            self._give_on(me)
        return True

    def notify(self, actor: Actor) -> None:
        """Have an actor that waits look at its condition again."""
        if not actor.ready and not actor.ended:
            actor.ready = True
            self._ready.append(actor)

    def sleep(self, duration_ns: int) -> None:
        until = self.clock.now_ns() + duration_ns
        self.wait_until(lambda: False, "sleeping", until)

    def join(self, actor: Actor) -> None:
        me = self.current
        assert me is not None
        waiters = self._joiners.setdefault(actor, [])
        waiters.append(me)
        self.wait_until(lambda: actor.ended, f"the end of {actor.name}")

    # -- events ----------------------------------------------------------------------------------------------------------------

    def after(self, delay_ns: int, what: str, call: Callable[[], None]) -> None:
        """Have something happen later. `what` is for the history; empty for what is not worth a line."""
        self.at(self.clock.now_ns() + delay_ns, what, call)

    def at(self, time_ns: int, what: str, call: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (time_ns, self._numbers, what, call))

    def jitter(self, longest_ns: int) -> int:
        """A delay of up to `longest_ns`: mostly short, now and then all of it."""
        return longest_ns * (0, 1, 2, 4, 8, 16, 64)[self.decisions.draw(7)] // 64

    def fail(self, error: BaseException) -> None:
        """End the run. Does not return on an actor's thread."""
        if self.failure is None:
            self.failure = error
            self.failure_text = "".join(traceback.format_exception(error))
            self._over.release()
        _park()

    # -- inside ----------------------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        for watcher in self.watchers:
            watcher()

    def _run(self, actor: Actor) -> None:
        actor.go.acquire()
        try:
            actor.target()
        except BaseException as error:
            self.fail(error)
        actor.ended = True
        for waiter in self._joiners.get(actor, []):
            self.notify(waiter)
        if all(other.ended for other in self._actors):
            self._over.release()
            return
        try:
            following = self._choose(None)
        except BaseException as error:
            self.fail(error)
        self.current = following
        following.go.release()

    def _give_on(self, me: Actor) -> None:
        try:
            following = self._choose(me)
        except BaseException as error:
            self.fail(error)
        self.current = following
        if following is not me:
            following.go.release()
            me.go.acquire()

    def _choose(self, me: Actor | None) -> Actor:
        """The next to run; makes events happen before that. Takes it out of the ready ones."""
        self.current = None
        self.steps += 1
        self.idle_steps += 1
        if self.steps > MAX_STEPS:
            raise BrokenPromiseError(f"the run does not end: {self.steps} steps\n{self.waiting()}")
        if self.idle_steps > MAX_IDLE_STEPS:
            raise BrokenPromiseError(f"somebody spins: {self.idle_steps} steps in which nothing happened\n{self.waiting()}")
        while True:
            ready = self._ready
            if not ready:
                if not self._events:
                    raise BrokenPromiseError(f"nobody can go on, and nothing is to come\n{self.waiting()}")
                self._happen()
            elif self._events and self._slow and self.decisions.chance(self._slow):
                self._happen()
            elif ready[0] is me and not self.decisions.chance(1 - self._sticky):
                return ready.pop(0)
            else:
                return ready.pop(self.decisions.draw(len(ready)))

    def _happen(self) -> None:
        time_ns, _, what, call = heapq.heappop(self._events)
        now = self.clock.now_ns()
        if time_ns > now:
            self.clock.advance(time_ns - now)
        self.idle_steps = 0
        if what:
            self.note(what)
        call()
        if what:
            self.watch()

    def waiting(self) -> str:
        """Who waits for what."""
        lines = [f"{actor.name}: {'ready' if actor.ready else actor.doing}" for actor in self._actors if not actor.ended]
        return "\n".join([*lines, f"{len(self._events)} events to come"])


def _park() -> None:
    """See [Note: After a failure]."""
    gate = threading.Lock()
    gate.acquire()
    gate.acquire()
