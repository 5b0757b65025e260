"""What the engine keeps of its callers: leases asked for, coroutines run for them, commits under way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tierstore.errors import ClosedError
from tierstore.mover.failures import engine_failed
from tierstore.nvme.shards import Shard
from tierstore.pace import Span
from tierstore.requests import Lease, Owner, Record, Save, Use

if TYPE_CHECKING:
    from tierstore.mover.engine import Engine

T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """One `use()`: what it asks for and what it was given.

    Attributes:
        writes, fresh, spent: As in `Use`.
        used: Its tensors were handed out.
        stream: What `Copies.lease` returned then.
        span: Takes its marks.
    """

    owner: Owner
    records: tuple[Record, ...] = ()
    writes: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()
    spent: frozenset[int] = frozenset()
    request: Use | None = None
    lease: Lease | None = None
    used: bool = False
    stream: object = None
    span: Span | None = None


@dataclass(eq=False)
class Capture:
    """What a commit in flight needs: shards already there, and versions still to be written."""

    request: Save
    taken: bool = False
    shards: dict[Record, Shard] = field(default_factory=dict)
    needs: dict[Record, int] = field(default_factory=dict)
    versions: dict[Record, int] = field(default_factory=dict)
    ended: Future[None] = field(default_factory=Future)


class Call(Generic[T]):
    """A coroutine that runs on the engine's loop for a caller on another thread.

    Attributes:
        result: What it returned or raised. May be given up by whoever waits for it.
        ended: Resolved once nothing of the coroutine is left, also after `cancel`.
        task: Runs it; None until it begins.
    """

    def __init__(self, engine: Engine, coroutine: Coroutine[Any, Any, T], finally_do: Callable[[], None] | None = None) -> None:
        """Use `Engine.call`."""
        self._finally_do = finally_do
        self.result: Future[T] = Future()
        self.ended: Future[None] = Future()
        self.engine = engine
        self._coroutine = coroutine
        self.task: asyncio.Task[T] | None = None

    def cancel(self) -> None:
        """Have it give back what it took, and end. Any thread; at once."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self.engine.loop.call_soon_threadsafe(self._cancel)

    def drop(self) -> None:
        """It never began, and nobody waits for it."""
        self._coroutine.close()

    def refuse(self) -> None:
        """It will never begin: the engine is gone."""
        self._coroutine.close()
        self._finish(None, ClosedError("the store's engine failed", remedy="open the directory again; the last commit is intact"))

    def run_alone(self) -> None:
        """Run it on a loop of its own, on this thread: the engine's thread is gone."""
        result: T | None = None
        error: BaseException | None = None
        try:
            result = asyncio.run(self._coroutine)
        except BaseException as failure:
            error = failure
        self._finish(result, error)

    def begin(self) -> None:
        self.task = self.engine.loop.create_task(self._coroutine)
        self.engine.tasks.add(self.task)
        self.task.add_done_callback(self._end)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def _end(self, task: asyncio.Task[T]) -> None:
        self.engine.tasks.discard(task)
        if task.cancelled():
            failure = self.engine.failure
            self._finish(None, asyncio.CancelledError() if failure is None else engine_failed(failure))
        elif (error := task.exception()) is not None:
            self._finish(None, error)
        else:
            self._finish(task.result(), None)

    def _finish(self, result: T | None, error: BaseException | None) -> None:
        try:
            if self._finally_do is not None:
                self._finally_do()
        finally:
            self.engine.calls.discard(self)
            if self.result.set_running_or_notify_cancel():
                if error is None:
                    self.result.set_result(result)  # type: ignore[arg-type]
                else:
                    self.result.set_exception(error)
            self.ended.set_result(None)
