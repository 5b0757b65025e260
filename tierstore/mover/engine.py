"""The engine: one thread with an event loop that carries out what the scheduler orders, and answers those who wait.

[Note: Threads and the lock]
The scheduler's state is changed only under `lock`, in short bursts: by whoever attends to it, by the reports of finished orders, and
where callers take or release a lease or submit a request. Orders are decided and booked in one burst, so none can be stale when it is
carried out. Nothing waits under the lock, and futures are resolved outside it.

[Note: Who attends]
To attend is to book what has landed, let the scheduler decide, and start its orders. One thread at a time does that (`_issuing`), and
whoever comes meanwhile leaves a mark (`_asked`) and goes: the other looks again before he goes himself. It is the engine's thread where a
copy has landed or a coroutine asks. But who waits for a lease, or has ended one, attends himself: two threads that issue work to a GPU take
the interpreter's lock from each other with every call, and wait for it longer than the calls take. What is done on the drive is started
by the loop in any case.

[Note: Abandoned requests]
A waiter can leave at any time: time-out, cancellation, Ctrl-C. `abandon` then withdraws the request, or gives back what it was
granted meanwhile; the lease is stored in the ticket under the lock, so there is no moment at which it is granted and unknown.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from tierstore.counters import LinkStats, WaitStats
from tierstore.errors import ClosedError, ForkedError, TierFullError
from tierstore.mover.budget import Slots
from tierstore.mover.calls import Call, Capture, Ticket
from tierstore.mover.critical import Uninterrupted
from tierstore.mover.failures import engine_failed, explained
from tierstore.mover.models import Models
from tierstore.mover.runtime import Runtime
from tierstore.mover.streams import Copies
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import when_landed
from tierstore.nvme.shards import Shard
from tierstore.requests import LINK_OF, Action, Order, Record, Request, Use
from tierstore.residency import Tier
from tierstore.scheduler import Scheduler
from tierstore.threads import NoThreadError, Threads, under_way
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena
from tierstore.trace import Kind, Link, Timeline, TransferEvent, WaitEvent

log = logging.getLogger("tierstore")
T = TypeVar("T")

ACCESS_BATCH = 64
"""Accesses the policy may lag behind while there is nothing to decide."""

ROUNDS = 4
"""Looks at the scheduler, one right behind the other, before the rest is left to the engine's thread."""

DYING_ROUNDS = 3


class Engine:
    """Owns the loop, the lock and all that moves. Made and closed by the store."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        device: DeviceArena,
        host: HostArena,
        copies: Copies,
        directory: Directory | None,
        transfer: HostArena,
        slot_bytes: int,
        runtime: Runtime,
        checksum: bool = True,
        direct_io: bool | Literal["auto"] = "auto",
    ) -> None:
        self.scheduler = scheduler
        self.placement = scheduler.placement
        self._on_device = self.placement.arenas[Tier.GPU]
        self.device = device
        self.host = host
        self.transfer = transfer
        self.copies = copies
        self.directory = directory
        self.runtime = runtime
        self.clock = runtime.clock
        self.lock = runtime.new_lock(self._wake_if_wanted)
        self.wanted = False
        self.timeline = Timeline()
        self.links = {link: LinkStats() for link in Link}
        self.waits: dict[str, WaitStats] = {}
        self.shards: dict[Record, Shard] = {}
        self.captures: list[Capture] = []
        self.committed_versions: dict[Record, int] = {}
        self.commits = 0
        self.total_bytes = 0
        self.unsettled: dict[str, Callable[[], None]] = {}  # block -> does what was put off until it is asked for
        self.before_commit: list[Callable[[], None]] = []  # write what is to go into it
        self.closed = False
        self.forked = False
        self.failure: BaseException | None = None
        self._futures: dict[Request, Future[None]] = {}
        self._started_ns: dict[int, int] = {}
        self._woken = False  # the engine's thread is about to attend
        self._issuing = threading.Lock()  # only ever tried, never waited for; see [Note: Who attends]
        self._issuer = 0
        self._asked = False
        self.placement.pace.between = copies.between
        copies.hurried = partial(bool, self._futures)  # not a method: the copies would keep the engine alive
        copies.timing = partial(getattr, self.placement.pace, "measuring")
        self._reports: deque[tuple[Order, BaseException | None, int]] = deque()  # copies that have ended, and when; not booked yet
        self.tasks: set[asyncio.Task[Any]] = set()
        self.calls: set[Call[Any]] = set()
        self.ended: Future[None] = Future()
        self._closing = False
        self._stopping = False
        self._dying = False
        self._landed = asyncio.Event()
        self._lacking: set[Record | None] = set()  # blocks for which the drive had no room when last tried
        if directory is not None:
            directory.on_suspect = self._distrust
        self._hosts = Threads("tierstore-host", 2)
        self.slots = Slots(slot_bytes)
        self.models = Models(self.slots, transfer.memory, self.clock, checksum=checksum, direct_io=direct_io)
        self.loop = runtime.new_loop()
        self.loop.set_exception_handler(self._unexpected)
        try:
            self._thread = runtime.start_thread(self._run, "tierstore-engine", daemon=True)
        except BaseException:
            self.loop.close()
            raise
        _LIVE.add(self)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        failure: BaseException = RuntimeError("its thread was stopped")
        try:
            if self.device.device.type == "cuda":
                torch.cuda.set_device(self.device.device)
            self.loop.run_forever()
        except BaseException as error:
            failure = error
        finally:
            if not self._stopping:
                self._dying = True
                self._died(failure)
            self.loop.close()
            for call in [call for call in self.calls if call.task is None]:  # came while it died
                call.refuse()

    # -- callers' threads --------------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        if self.forked:
            raise ForkedError("this store belongs to the parent process", remedy="open data in the child, use the store in the parent")
        if self.closed or self._closing:
            raise ClosedError("the store is closed", remedy="open a new TierStore")
        if self.failure is not None:
            raise engine_failed(self.failure)

    def begin_use(
        self,
        ticket: Ticket,
        names: tuple[str, ...],
        write: bool | frozenset[str],
        fresh: Collection[str] = (),
        spent: Collection[str] = (),
    ) -> Future[None] | None:
        """Lease at once if the blocks are ready, else queue the request. Short; any thread.

        Args:
            ticket: Takes the lease, or the request.
            names: The blocks.
            write: Whether all, or which of them, may be written.
            fresh, spent: Names among the written; see [Note: Blank blocks] in `scheduler`.

        Returns:
            None when `ticket.lease` is set, else what to wait for.
        """
        with Uninterrupted():
            future, attend = self._try_use(ticket, names, write, fresh, spent)
            if attend:
                self._attend()
        return future

    def _try_use(
        self, ticket: Ticket, names: tuple[str, ...], write: bool | frozenset[str], fresh: Collection[str], spent: Collection[str]
    ) -> tuple[Future[None] | None, bool]:
        with self.lock:
            self.check_open()
            if not names:
                return None, False  # nothing to lease
            mark = self._mark() if self.placement.pace.measuring else None
            scheduler = self.scheduler
            ticket.records = (
                (scheduler.find(names[0]),) if len(names) == 1 else tuple(dict.fromkeys(scheduler.find(name) for name in names))
            )
            if write is True:
                ticket.writes = frozenset(record.id for record in ticket.records)
            elif write:
                ticket.writes = frozenset(scheduler.find(name).id for name in write)
            if fresh or spent:
                ticket.fresh = frozenset(scheduler.find(name).id for name in fresh)
                ticket.spent = frozenset(scheduler.find(name).id for name in spent)
            ticket.lease = scheduler.try_use(ticket.owner, ticket.records, ticket.writes, ticket.fresh, ticket.spent)
            future: Future[None] | None = None
            if ticket.lease is None:
                request = Use(ticket.owner, ticket.records, writes=ticket.writes, fresh=ticket.fresh, spent=ticket.spent)
                future = self.submit(request)
                ticket.request = request
            elif fresh:  # extents may be in other hands already, which no `_look` has seen
                self.device.invalidate(self.placement.left_device)
            ticket.span = scheduler.note_use(ticket.records, ticket.writes, ticket.fresh, mark)
            # While copies are under way, somebody will look when they have landed, or when this lease ends.
            return future, future is not None or (not self.placement.flying and self._has_work())

    def _mark(self) -> object:
        """See `pace`, [Note: Marks]."""
        mark = self.copies.mark()
        return self.clock.now_ns() if mark is None else mark

    def finish_wait(self, ticket: Ticket) -> None:
        """The future of `begin_use` has resolved: take the lease over, and note the wait."""
        request = ticket.request
        assert request is not None
        end_ns = self.clock.now_ns()
        with self.lock:
            ticket.lease, request.lease = request.lease, None
            ticket.request = None
            self.note_wait(request.cause, request.queued_ns, end_ns, tuple(record.block.name for record in ticket.records))

    def tensors(self, ticket: Ticket, *, plain: bool = False) -> dict[Record, tuple[torch.Tensor, ...]]:
        """The leased tensors, usable on the caller's current stream from here on.

        Args:
            plain: Autograd is to save none of them; see `DeviceArena.plain_tensors`.
        """
        records = ticket.records
        if ticket.fresh:
            self.copies.take([(record.gpu.offset, record.nbytes) for record in records if record.id in ticket.fresh])
        ticket.stream = self.copies.lease([(record.gpu.offset, record.nbytes) for record in records])
        ticket.used = True
        if ticket.span is not None:
            ticket.span.granted = self._mark()
        if plain:
            return {record: self.device.plain_tensors(record.block, record.gpu.offset) for record in records}
        return {record: self.device.tensors(record.id, record.block, record.gpu.offset) for record in records}

    def end_use(self, ticket: Ticket, *, failed: bool = False) -> None:
        """Release the lease. What was queued on the caller's current stream counts as part of it.

        Args:
            failed: An exception leaves it; see `Scheduler.give_back`.
        """
        if ticket.lease is None or self.forked:
            return
        start_ns = self.clock.now_ns()
        waited = self.copies.release([(record.gpu.offset, record.nbytes) for record in ticket.records])
        if ticket.span is not None:
            ticket.span.released = self._mark()
        with Uninterrupted():
            with self.lock:
                lease, ticket.lease = ticket.lease, None
                if lease is None:
                    return
                if failed:
                    self.scheduler.give_back(lease)
                else:
                    self.scheduler.release(lease)
                # What is held on the device leaves no room behind: while copies are under way, somebody will look when they have landed.
                stays = self.placement.flying and not self._futures and all(record.hold is Tier.GPU for record in ticket.records)
                attend = not stays and self._has_work()
                if waited:
                    self.note_wait("run-ahead", start_ns, start_ns + waited, tuple(record.block.name for record in ticket.records))
            if attend:
                self._attend()

    def abandon(self, ticket: Ticket) -> None:
        """Whatever became of the ticket, nothing of it remains. See [Note: Abandoned requests]."""
        if self.forked:
            return
        with self.lock:
            self._abandon(ticket)

    def _abandon(self, ticket: Ticket) -> None:
        self.wanted = True
        request, ticket.request = ticket.request, None
        lease, ticket.lease = ticket.lease, None
        if request is not None:
            if request.lease is not None:
                lease, request.lease = request.lease, None
            elif not request.resolved:
                self.scheduler.cancel(request)
                self._futures.pop(request, None)
        if lease is not None:
            if ticket.used:  # kernels that read the extents may still be queued on the stream that took the lease
                self.copies.note_use([(record.gpu.offset, record.nbytes) for record in lease.records], ticket.stream)
            self.scheduler.give_back(lease)

    def abandon_dropped(self, ticket: Ticket) -> None:
        """As `abandon`, from a finaliser: at once, so that the thread that dropped it can go on, or later if it runs under the lock."""
        if self.forked or self.closed:
            return
        with Uninterrupted():
            if self.lock.try_acquire():
                try:
                    self._abandon(ticket)
                finally:
                    self.lock.release()
            else:
                left = Ticket(ticket.owner, request=ticket.request, lease=ticket.lease, used=ticket.used, stream=ticket.stream)
                with contextlib.suppress(RuntimeError):  # the loop is closed, and so is the store
                    self.loop.call_soon_threadsafe(self.abandon, left)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> Call[T]:
        """Run a coroutine on the engine's loop. Any thread."""
        with self.lock:
            return self.call_locked(coroutine)

    def call_locked(self, coroutine: Coroutine[Any, Any, T], finally_do: Callable[[], None] | None = None) -> Call[T]:
        """As `call`, under the lock.

        Args:
            finally_do: Called on the loop at the end, also of a coroutine that was cancelled before its first step.
        """
        try:
            self.check_open()
        except BaseException:
            coroutine.close()
            raise
        return self._begin(Call(self, coroutine, finally_do))

    def _begin(self, call: Call[T]) -> Call[T]:
        self.calls.add(call)
        try:
            self.loop.call_soon_threadsafe(call.begin)
        except RuntimeError as error:  # the loop ended right now
            self.calls.discard(call)
            call.drop()
            raise engine_failed(self.failure or error) from error
        return call

    def begin_close(self, coroutine: Coroutine[Any, Any, T]) -> Call[T] | None:
        """Run the coroutine that closes the store. None: somebody closes it already; `ended` is set when that is done."""
        with self.lock:
            if self._closing or self.forked:
                coroutine.close()
                return None
            self._closing = True
            call = Call(self, coroutine)
            if not self._dying:
                return self._begin(call)
        try:
            self.runtime.start_thread(partial(self._close_alone, call), "tierstore-close")
        except RuntimeError:
            self._close_alone(call)
        return call

    def _close_alone(self, call: Call[T]) -> None:
        """Run the call that closes the store once the engine's thread has ended: here, on a loop of its own."""
        self.runtime.join(self._thread)
        call.run_alone()

    def wake(self) -> None:
        """Have the scheduler looked at soon. Any thread; cheap when already asked for. Under the lock, set `wanted` instead."""
        with Uninterrupted():
            self._wake()

    def _wake_if_wanted(self) -> None:
        if self.wanted:
            self.wanted = False
            self._wake()

    def _wake(self) -> None:
        self._asked = True
        if not self._woken and not self.forked:
            self._woken = True
            try:
                if threading.current_thread() is self._thread:
                    self.loop.call_soon(self._pump)  # the other call writes to a socket, and gives up the interpreter's lock for it
                else:
                    self.loop.call_soon_threadsafe(self._pump)
            except RuntimeError:  # the loop is closed, and so is the store
                self._woken = False

    def note_wait(self, cause: str, start_ns: int, end_ns: int, blocks: tuple[str, ...]) -> None:
        self.waits.setdefault(cause, WaitStats()).add(end_ns - start_ns)
        self.timeline.waits.append(WaitEvent(blocks, cause, start_ns, end_ns, threading.current_thread().name))

    def _has_work(self) -> bool:
        """Whether the engine should look at once: blocks are missing on the device, or somebody waits."""
        scheduler = self.scheduler
        missing = self._on_device.used_bytes != self.total_bytes - self.placement.blank_bytes
        return scheduler.busy or missing or scheduler.num_unlearned >= ACCESS_BATCH

    # -- the engine's thread -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Future[None]:
        """Queue a request. Under the lock."""
        self.scheduler.submit(request)
        future = self._futures[request] = Future()
        return future

    async def request(self, request: Request) -> None:
        """Queue a request and wait until it is served. On the loop; cancelling withdraws it.

        If the cancellation comes after the request was served, it returns: the caller gives back what it got, and stops at
        its next await.
        """
        with self.lock:
            self.check_open()
            future = self.submit(request)
        self.wake()
        await self.served(request, future)

    async def served(self, request: Request, future: Future[None]) -> None:
        try:
            await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self.lock:
                if request.resolved and request.error is None:
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()  # again, to strike at the next await
                    return
                self.withdraw(request)
            self.wake()
            raise

    def withdraw(self, request: Request) -> None:
        """Nobody waits for the request any more. Under the lock."""
        if not request.resolved:
            self.scheduler.cancel(request)
        self._futures.pop(request, None)

    def _pump(self) -> None:
        """The engine's thread was woken."""
        self._woken = False
        self._attend()

    def _attend(self) -> None:
        """Let the scheduler decide, carry out its orders, answer those who wait; again, while somebody asks for it meanwhile.

        Any thread; see [Note: Who attends]. Uninterrupted.
        """
        self._asked = True
        for _ in range(ROUNDS):
            if not self._issuing.acquire(blocking=False):
                return
            self._issuer = threading.get_ident()
            try:
                self._asked = False
                self._look()
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._issuer = 0
                self._issuing.release()
            if not self._asked:  # read behind the release: who came before it has left his mark, and who came after it got in
                return
        self._wake()

    def _look(self) -> None:
        self._book_landed()
        if self.closed or self.failure is not None:
            return
        with self.lock:
            # What it takes hold of for a commit is the loop's. Asked here: a commit may begin while this waits for the lock.
            elsewhere = bool(self.captures) and threading.current_thread() is not self._thread
            if not elsewhere:
                orders, again = self.scheduler.advance()
                self.device.invalidate(self.placement.left_device)
                self._capture()
                resolved, self.scheduler.resolved = self.scheduler.resolved, []
                answers = [(request, self._futures.pop(request, None)) for request in resolved]
        if elsewhere:
            self._wake()
            return
        for request, future in answers:
            if future is None:
                if request.error is not None:
                    log.warning("in the background: %s", request.error)
            elif future.set_running_or_notify_cancel():
                if request.error is None:
                    future.set_result(None)
                else:
                    future.set_exception(request.error)
        for order in orders:
            self._start(order)
        if again:
            self._asked = True

    def _book_landed(self) -> None:
        """Book what the copies have to report."""
        self.copies.poll()
        while self._reports:
            self._finish(*self._reports.popleft())

    def _fail(self, error: BaseException) -> None:
        """A bug of ours: nobody may wait for ever."""
        self.failure = self.failure or error
        log.critical("the engine failed", exc_info=error)
        self._has_landed()  # `drain` waits for nothing any more
        with self.lock:  # who found no failure under it has his future among these
            futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                future.set_exception(engine_failed(error))

    def _died(self, error: BaseException) -> None:
        """The thread ends before its time: have every coroutine give back what it took, and tell who waits."""
        with contextlib.suppress(BaseException):  # logging may fail too, where this thread is being killed
            self._fail(error)
        for call in [call for call in self.calls if call.task is None]:
            call.begin()
        for _ in range(DYING_ROUNDS):  # each may be struck again
            tasks = asyncio.all_tasks(self.loop)
            if not tasks:
                break
            for task in tasks:
                task.cancel()
            with contextlib.suppress(BaseException):
                self.loop.run_until_complete(asyncio.wait(tasks))
        with contextlib.suppress(BaseException):
            self.loop.run_until_complete(asyncio.sleep(0))  # the callbacks of the last of them

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A callback of the loop raised."""
        loop.default_exception_handler(context)
        if "handle" in context and self.failure is None:
            self._fail(context["exception"])

    def _start(self, order: Order) -> None:
        self._started_ns[order.number] = now_ns = self.clock.now_ns()
        if order.action in (Action.READ, Action.WRITE):
            if threading.current_thread() is self._thread:
                self._transfer(order)
            else:
                self._soon(self._transfer, order)
            return
        if order.action in LINK_OF and not self.copies.asynchronous:
            self.placement.rates.started(LINK_OF[order.action], now_ns)
        try:
            self.copies.start(order, self._ordered, self._done)
        except Exception as error:  # of the driver, or of a thread pool that is shutting down
            self._done(order, error)

    def _transfer(self, order: Order) -> None:
        """Start what the drive has to do. On the loop."""
        self.placement.rates.started(LINK_OF[order.action], self.clock.now_ns())
        self._spawn(self._read(order) if order.action is Action.READ else self._write(order))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _soon(self, callback: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody cares any more
            self.loop.call_soon_threadsafe(callback, *arguments)

    def _ordered(self, order: Order, _: BaseException | None) -> None:
        """Any thread."""
        try:
            with self.lock:
                self.placement.ordered(order)
        except BaseException as failure:
            self._fail(failure)
            raise
        if order.action is not Action.H2D or self._futures:  # what has come in makes room for nothing, but somebody may wait for it
            self._look_again()

    def _done(self, order: Order, error: BaseException | None) -> None:
        """A copy has ended. Any thread."""
        self._reports.append((order, error, self.clock.now_ns()))
        self._look_again()

    def _look_again(self) -> None:
        if self._issuer == threading.get_ident():
            self._asked = True
        else:
            self._wake()

    def _finish(self, order: Order, error: BaseException | None, end_ns: int) -> None:
        """Book an order that has ended: copies as part of `_look`, what the drive has done on the loop."""
        on_device = self.copies.asynchronous and order.action not in (Action.READ, Action.WRITE)
        if error is not None and on_device and not isinstance(error, NoThreadError):
            self._has_landed()
            self._fail(error)  # an error of CUDA is there to stay: this process cannot use the device any more
            return
        hung = under_way(error)
        with self.lock:
            if error is None:
                self.placement.done(order)
                if self._lacking and order.action is Action.WRITE:
                    self._lacking.discard(order.record)
            else:
                error = explained(order, error, self._path_for(order))
                self.placement.failed(order, error, hung=bool(hung))
        if error is not None:
            quiet = self.closed or order.kind is Kind.DEMAND  # nobody misses it any more, or its caller hears of it
            quiet |= isinstance(error, TierFullError) and not self._note_full(order)
            log.log(logging.INFO if quiet else logging.WARNING, "a transfer failed: %s", error)
        if hung and order.action is Action.READ:
            when_landed(hung, lambda: self._end_quarantine(order.offset_ram))
        self._count(order, error, end_ns)
        self._has_landed()

    def _has_landed(self) -> None:
        if threading.current_thread() is self._thread:
            self._landed.set()
        elif self.closed or self.failure is not None:  # only `drain` waits for it
            self._soon(self._landed.set)

    def _note_full(self, order: Order) -> bool:
        """The drive had no room for a block. Whether that is news: until it is there, blocks are tried again and again."""
        news = not self._lacking
        self._lacking.add(order.record)
        return news

    @property
    def quarantined_bytes(self) -> int:
        """Of RAM, transfer space included: what calls that hang may still write into."""
        return sum(self.placement.quarantined.values()) + self.slots.num_quarantined * self.slots.nbytes

    def _end_quarantine(self, offset: int) -> None:
        """A read that was given up has returned after all. On the loop."""
        with self.lock:
            self.placement.end_quarantine(offset)
        self.wake()

    def _path_for(self, order: Order) -> str | None:
        """The file a transfer reads or writes. On the loop."""
        shard = self.shards.get(order.record) if order.record is not None and order.action in (Action.READ, Action.WRITE) else None
        if shard is not None and shard.adopted is not None:
            return shard.adopted.files[0].path if order.action is Action.READ else None
        return self.directory.path_of(shard) if self.directory is not None and shard is not None else None

    async def _read(self, order: Order) -> None:
        record, directory = order.record, self.directory
        assert record is not None
        error: BaseException | None = None
        try:
            shard = self.shards[record]
            with self.host.memory[order.offset_ram : order.offset_ram + order.nbytes] as target:
                if shard.adopted is not None:
                    await self.models.read(shard, target)
                else:
                    assert directory is not None
                    await directory.read(shard, target)
        except BaseException as failure:  # also cancellation: the order must be answered whatever happens
            error = failure
        self._finish(order, error, self.clock.now_ns())
        self.wake()

    async def _write(self, order: Order) -> None:
        record, directory = order.record, self.directory
        assert record is not None
        assert directory is not None
        old = self.shards.get(record)
        error: BaseException | None = None
        try:
            with self.host.memory[order.offset_ram : order.offset_ram + order.nbytes] as source:
                shard = await directory.write(record.block, source, old)
        except BaseException as failure:
            error = failure
        else:
            with self.lock:
                self.replace_shard(record, shard, order.version)
        self._finish(order, error, self.clock.now_ns())
        self.wake()

    def replace_shard(self, record: Record, shard: Shard, version: int) -> None:
        """A shard was written with this version of the block. Under the lock, on the loop."""
        assert self.directory is not None
        old = self.shards.get(record)
        if old is not None and old is not shard:
            self.directory.discard(old)
            self.models.forget(old)
        self.shards[record] = shard
        for capture in self.captures:
            if capture.needs.get(record) == version:
                del capture.needs[record]
                self.directory.retain(shard)
                capture.shards[record] = shard

    def _distrust(self, shard: Shard) -> bool:
        """A sync failed, and the system may have dropped what it could not write: what memory has too is saved anew. On the loop.

        Returns:
            Whether nobody depends on the shard's bytes any more.
        """
        with self.lock:
            record = next((record for record, other in self.shards.items() if other is shard), None)
            return record is None or self.placement.distrust_nvme(record)

    def _capture(self) -> None:
        """Take hold of the shards that a commit needs, at the instant at which its state was fixed. Under the lock."""
        for capture in self.captures:
            if capture.taken or not capture.request.started:
                continue
            assert self.directory is not None
            capture.taken = True
            capture.versions = capture.request.versions
            for record, version in capture.versions.items():
                if record.nvme_version == version:
                    self.directory.retain(self.shards[record])
                    capture.shards[record] = self.shards[record]
                else:
                    capture.needs[record] = version

    def _count(self, order: Order, error: BaseException | None, end_ns: int) -> None:
        start_ns = self._started_ns.pop(order.number, end_ns)
        link = LINK_OF.get(order.action)
        if link is None or order.record is None:
            return
        took_s = self.copies.took(order)
        if not self.copies.asynchronous or order.action in (Action.READ, Action.WRITE):
            self.placement.rates.ended(link, 0 if error is not None else order.nbytes, end_ns)
        elif took_s is not None and error is None:
            self.placement.rates.took(link, order.nbytes, took_s)
        if error is not None:
            self.links[link].failures += 1
        else:
            self.links[link].add(order.nbytes, str(order.kind), end_ns - start_ns)
        self.timeline.transfers.append(
            TransferEvent(link, order.record.block.name, order.kind, order.nbytes, order.queued_ns, start_ns, end_ns, error is not None)
        )

    async def offload(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run blocking host work in a thread. If cancelled, it is waited for first: nothing stays in flight."""
        future = self.loop.run_in_executor(self._hosts, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                await asyncio.wait([future])
            raise

    # -- the end ---------------------------------------------------------------------------------------------------------------

    async def finish_commits(self) -> None:
        """Let commits end whose state is fixed, or can be at once. New calls are refused already."""
        while True:
            self._attend()
            fixed = [capture for capture in self.captures if capture.request.started or capture.request.resolved]
            if not fixed:
                return
            for capture in fixed:
                await asyncio.wrap_future(capture.ended)

    async def drain(self) -> None:
        """Refuse who waits, let transfers under way end. The store is closed from here on."""
        with self.lock:
            self.closed = self.scheduler.closing = True
            others = [call for call in self.calls if call.task is not asyncio.current_task()]
            for request in list(self.scheduler.waiting.values()):
                self.scheduler.cancel(request)
                future = self._futures.pop(request, None)
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_exception(ClosedError("the store was closed", remedy="open a new TierStore"))
        for call in others:
            await asyncio.wrap_future(call.ended)
        while transfers := self.tasks - {asyncio.current_task()}:
            await asyncio.wait(transfers)
        while self.placement.flying and self.failure is None:
            self._landed.clear()
            await self._landed.wait()

    def shut_down(self) -> None:
        """Stop the loop and free the arenas. After `drain`, from any other thread. Repeatable."""
        if self.ended.done():
            return
        if self.quarantined_bytes:
            log.warning("closed while reads hang that were given up: %d bytes of RAM stay mapped until they return", self.quarantined_bytes)
        with contextlib.ExitStack() as steps:  # last in, first out, each whatever became of the others
            steps.callback(self.ended.set_result, None)
            steps.callback(self.device.close)
            steps.callback(self.transfer.close)
            steps.callback(self.host.close)
            steps.callback(self._hosts.shutdown)
            steps.callback(self.models.close)
            steps.callback(self._close_directory)
            steps.callback(self._stop)
            steps.callback(self.copies.close)
            steps.callback(self._forget_marks)
            _LIVE.discard(self)

    def _forget_marks(self) -> None:
        with self.lock:
            self.placement.pace.end()

    def _close_directory(self) -> None:
        """Only where the call that should have closed it came to nothing, because the engine's thread ended."""
        if self.directory is not None and not self.directory.closed:
            asyncio.run(self.directory.close())

    def _stop(self) -> None:
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self.loop.call_soon_threadsafe(self.loop.stop)
        self.runtime.join(self._thread)

    def leave(self) -> None:
        """The program ends with the store open. Waits for commits under way; nothing else is kept."""
        if self.forked or self.closed or self._closing or self.failure is not None:
            return
        log.warning("the program ends with a store open: what was not committed is gone (use `with TierStore(...)`, or call close())")
        if self.captures:
            with contextlib.suppress(ClosedError):  # it failed or was closed just now
                self.call(self.finish_commits()).ended.result()

    def forget_in_child(self) -> None:
        self.forked = True
        self.lock = self.runtime.new_lock(self._wake_if_wanted)  # the parent's may be held by a thread that the child does not have
        self.wanted = False
        self.models.forget_in_child()
        if self.directory is not None:
            self.directory.forget_in_child()


# Forked children (data-loader workers) inherit the store's memory but none of its threads: they must never touch it.
_LIVE: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_LIVE):
        engine.forget_in_child()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)


def _at_exit() -> None:
    """The interpreter ends and takes the thread pools with it: commits under way still end, then an open store orders nothing more."""
    for engine in list(_LIVE):
        engine.leave()
        engine.closed = True


# The private hook runs before the thread pools are shut down, the public one after that.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
