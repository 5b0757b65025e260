"""`AsyncTierStore`, and what both faces of a store share.

Both faces speak to one `Engine`, whose event loop runs on a thread of its own: a user's loop that is blocked delays no
transfer. The fast path of `use()` touches neither loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Collection, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch

from tierstore.counters import Stats, TierStats, WaitStats
from tierstore.errors import ClosedError, LeaseError, LeaseTimeoutError, OptionError
from tierstore.inputs import block_of, source_of, tier_of
from tierstore.mover import operations
from tierstore.mover.calls import Call, Ticket
from tierstore.mover.engine import Engine
from tierstore.mover.operations import Source, Tensors
from tierstore.nvme.directory import Commit
from tierstore.nvme.files import land
from tierstore.nvme.layouts import Layout, claims
from tierstore.opening import Options, open_engine
from tierstore.policies import Policy
from tierstore.requests import Owner, Record
from tierstore.residency import State, Tier
from tierstore.tiers.device import DTYPES
from tierstore.trace import Timeline, Trace

log = logging.getLogger("tierstore")
T = TypeVar("T")

Leased = Any
"""What a lease yields: a tensor, a mapping of names to tensors, or a tuple of these."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and dtype of one tensor of a block."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What `info(name)` tells.

    Attributes:
        name: The block's name.
        tensors: By name, in payload order.
        nbytes: Bytes it occupies on each tier that has it.
        tiers: Tiers that hold its newest content, fastest first.
        dirty: Not yet on the lowest tier.
        leases: Leases out on it; `write_leased` if one of them may write.
        hold: The tier it was ordered to stay on.
        frozen: Never written.
        adopted: Its newest content lies in model files; the first write ends that.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    nbytes: int
    tiers: tuple[str, ...]
    dirty: bool
    leases: int
    write_leased: bool
    hold: str | None
    frozen: bool
    adopted: bool = False


class StoreBase:
    """What needs no waiting, and is the same on both faces. Any thread."""

    _engine: Engine | None

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is None or engine.closed or engine.forked or sys.is_finalizing():
            return
        log.warning("a store was dropped without close(); it is closed now")
        with contextlib.suppress(RuntimeError):  # the interpreter ends and starts no more threads
            engine.runtime.start_thread(partial(close_dropped, engine), "tierstore-close")

    def __repr__(self) -> str:
        engine = self._engine
        if engine is None or engine.closed:
            state = "not open"
        else:
            state = f"{len(engine.scheduler.names)} blocks" + (f" in {engine.directory.path}" if engine.directory is not None else "")
        return f"<{type(self).__name__}: {state}>"

    @property
    def engine(self) -> Engine:
        """The engine; for this package's own modules."""
        if self._engine is None:
            raise ClosedError("the store is not open", remedy="enter it with `async with`, or await it")
        self._engine.check_open()
        return self._engine

    def __contains__(self, name: object) -> bool:
        record = self.engine.scheduler.names.get(name)  # type: ignore[call-overload]
        return record is not None and record.born is not None

    def __iter__(self) -> Iterator[str]:
        engine = self.engine
        with engine.lock:
            return iter([name for name, record in engine.scheduler.names.items() if record.born is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def device(self) -> torch.device:
        """Where leased tensors are."""
        return self.engine.device.device

    @property
    def committed(self) -> Commit | None:
        """The last commit's generation and metadata, or None."""
        directory = self.engine.directory
        return directory.committed if directory is not None else None

    @property
    def trace(self) -> Trace:
        """The most recent accesses; `save(path)` keeps them for replay."""
        return self.engine.scheduler.trace

    @property
    def timeline(self) -> Timeline:
        """The most recent transfers and waits; `save("timeline.json")` for Perfetto."""
        return self.engine.timeline

    def info(self, name: str) -> BlockInfo:
        """What is known of one block now.

        Raises:
            BlockNotFoundError: No such block.
        """
        engine = self.engine
        with engine.lock:
            record = engine.scheduler.find(name)
            tensors = {spec.name: TensorInfo(spec.shape, DTYPES[spec.dtype], spec.nbytes) for spec in record.block.tensors}
            lowest_is_ram = not engine.placement.has_nvme
            dirty = record.gpu.state in (State.DIRTY, State.SAVING) if lowest_is_ram else record.nvme_version != record.version
            dirty &= not record.blank
            return BlockInfo(
                name=name,
                tensors=tensors,
                nbytes=record.nbytes,
                tiers=tuple(str(tier) for tier in record.tiers),
                dirty=dirty,
                leases=sum(record.readers.values()) + record.writer_depth,
                write_leased=record.writer is not None,
                hold=None if record.hold is None else str(record.hold),
                frozen=record.block.frozen,
                adopted=operations.lies_in_model(engine, record),
            )

    def stats(self) -> Stats:
        """A snapshot of all counters."""
        engine = self.engine
        with engine.lock:
            placement, directory = engine.placement, engine.directory
            records = placement.records.values()
            tiers: dict[str, TierStats] = {}
            for tier in (Tier.GPU, Tier.RAM):
                arena = placement.arenas[tier]
                extra = engine.transfer.nbytes if tier is Tier.RAM else 0
                hits, misses = placement.ram_hits, placement.ram_misses
                if tier is Tier.GPU:
                    hits, misses = engine.scheduler.hits, engine.scheduler.misses
                tiers[str(tier)] = TierStats(
                    capacity_bytes=arena.capacity_bytes + extra,
                    used_bytes=arena.used_bytes + extra,
                    peak_bytes=arena.peak_bytes + extra,
                    num_blocks=sum(record.copy(tier).valid for record in records),
                    held_bytes=placement.held_bytes(tier),
                    hits=hits,
                    misses=misses,
                    evictions=placement.evictions[tier],
                    quarantined_bytes=engine.quarantined_bytes if tier is Tier.RAM else 0,
                )
            if directory is not None:
                tiers["nvme"] = TierStats(
                    capacity_bytes=directory.limit_bytes,
                    used_bytes=directory.used_bytes,
                    peak_bytes=directory.peak_bytes,
                    num_blocks=sum(record.nvme_version == record.version for record in records),
                    held_bytes=placement.held_bytes(Tier.NVME),
                )
            return Stats(
                tiers=tiers,
                links={str(link): counters.copy() for link, counters in engine.links.items()},
                waits={cause: WaitStats(waits.count, waits.ns) for cause, waits in list(engine.waits.items())},
                accesses=engine.scheduler.trace.num_accesses,
                compactions=placement.compactions,
                direct_io=directory.direct if directory is not None else None,
                page_locked_bytes=engine.host.page_locked_bytes + engine.transfer.page_locked_bytes,
                commits=engine.commits,
                models=engine.models.stats.copy(),
            )

    def _records(self, names: tuple[str, ...]) -> tuple[Record, ...]:
        engine = self.engine
        with engine.lock:
            return tuple(engine.scheduler.find(name) for name in names)

    def _hint(self, names: tuple[str, ...]) -> None:
        engine = self.engine
        with engine.lock:
            engine.scheduler.hint([engine.scheduler.find(name) for name in names])
            engine.wanted = True

    def _unhold(self, name: str) -> None:
        engine = self.engine
        with engine.lock:
            engine.scheduler.set_hold(engine.scheduler.find(name), None)
            engine.wanted = True


Face = TypeVar("Face", bound=StoreBase)


def face_over(face: type[Face], engine: Engine) -> Face:
    """A `TierStore` or `AsyncTierStore` over an engine that runs already, for simulations. The face closes it."""
    store = face.__new__(face)
    store._engine = engine
    return store


class UseBase:
    """The context of one `use()`: what both faces do on entering and leaving."""

    def __init__(
        self,
        engine: Engine,
        names: tuple[str, ...],
        write: bool | str | Collection[str],
        timeout: float | None,
        *,
        fresh: Collection[str] = (),
        spent: Collection[str] = (),
        owner: Owner | None = None,
        plain: bool = False,
    ) -> None:
        """Note what is asked for.

        Args:
            engine, names, write, timeout: As in `TierStore.use`.
            fresh, spent: Names among those written; see [Note: Blank blocks] in `scheduler`.
            owner: On whose behalf; None: the thread's or task's that enters.
            plain: Autograd is to save none of the tensors, and changes are not looked for.
        """
        self._engine = engine
        self._plain = plain
        self._fresh, self._spent, self._owner = fresh, spent, owner
        self._names = names
        self._timeout = timeout
        self._ticket: Ticket | None = None
        self._watched: list[tuple[str, torch.Tensor, int]] = []
        if timeout is not None and not (isinstance(timeout, int | float) and timeout == timeout):
            raise OptionError("timeout= is not understood", need="seconds, or None", have=repr(timeout), remedy="give it as such")
        if isinstance(write, bool):
            self._write: bool | frozenset[str] = write
            assert write or not (fresh or spent)
            return
        wanted = [write] if isinstance(write, str) else list(write) if isinstance(write, Collection) else None
        if wanted is None:
            raise LeaseError("write= is not understood", need="True, False or names", have=repr(write), remedy="give it as such")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise LeaseError(f"write= names blocks that use() does not: {unknown!r}", remedy="name them in use() too")
        self._write = frozenset(wanted)
        assert self._write >= {*fresh, *spent}

    def _check_unused(self) -> None:
        if self._ticket is not None:
            raise LeaseError("one use() context cannot be entered twice", remedy="call use() again")

    def _begin(self, owner: Owner) -> Future[None] | None:
        self._ticket = Ticket(owner if self._owner is None else self._owner)
        return self._engine.begin_use(self._ticket, self._names, self._write, self._fresh, self._spent)

    def _yield(self) -> Leased:
        assert self._ticket is not None
        tensors = self._engine.tensors(self._ticket, plain=self._plain)
        writes = self._ticket.writes
        by_name: dict[str, Leased] = {}
        for record, views in tensors.items():
            block = record.block
            if not self._plain and record.id not in writes and record.writer is None:
                self._watched += [(block.name, view, view._version) for view in views]
            by_name[block.name] = views[0] if block.single else {spec.name: view for spec, view in zip(block.tensors, views, strict=True)}
        values = tuple(by_name[name] for name in self._names)
        return values[0] if len(values) == 1 else values

    def _end(self, failed: bool) -> None:
        ticket = self._ticket
        assert ticket is not None
        # Before the lease ends: the next writer's changes count on the same counter.
        changed = [name for name, tensor, version in self._watched if tensor._version != version]
        self._watched = []
        self._engine.end_use(ticket, failed=failed)
        self._ticket = None  # only now, see `_drop`
        if changed and not failed:
            name = changed[0]
            raise LeaseError(f"block {name!r} was changed under a lease that only reads", remedy="use(..., write=True)", block=name)

    def _drop(self) -> None:
        """Entering or leaving failed, perhaps because Ctrl-C struck: have no lease and no request.

        If it strikes before the first line of `__exit__`, the finaliser does the same once the exception has been dropped.
        """
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._engine.abandon(ticket)

    def _timed_out(self) -> LeaseTimeoutError:
        cause = self._ticket.request.cause if self._ticket is not None and self._ticket.request is not None else "lease"
        return LeaseTimeoutError(
            f"no lease on {', '.join(map(repr, self._names))} within {self._timeout} s",
            have=f"last waited for: {cause}",
            remedy="release other leases, raise the timeout or the budgets",
            cause=cause,
        )

    def __del__(self) -> None:
        ticket = self._ticket
        if ticket is not None and (ticket.lease is not None or ticket.request is not None):
            self._engine.abandon_dropped(ticket)


def close_dropped(engine: Engine) -> None:
    """Close a store that nobody has any more. On a thread of its own: finalisers run anywhere, also under the lock."""
    call = engine.begin_close(operations.close(engine))
    if call is not None:
        operations.shut_down_after(engine, call)
        warn_of_loss(call.result.result())


def warn_of_loss(lost: int) -> None:
    if lost:
        log.warning("a store was closed with %d block(s) changed, added or deleted since the last commit: only commit() keeps that", lost)


class AsyncUse(UseBase):
    """`async with store.use(...)`."""

    async def __aenter__(self) -> Leased:
        self._check_unused()
        try:
            future = self._begin(asyncio.current_task())
            if future is not None:
                assert self._ticket is not None
                try:
                    async with asyncio.timeout(self._timeout):
                        await asyncio.wrap_future(future)
                except TimeoutError:
                    raise self._timed_out() from None
                self._engine.finish_wait(self._ticket)
            return self._yield()
        except BaseException:
            self._drop()
            raise

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            self._end(kind is not None)
        except BaseException:
            self._drop()
            raise


async def _finish(call: Call[T]) -> T:
    """Wait for a call. Cancelled, it cancels the call too, and raises when nothing of that is left."""
    try:
        return await asyncio.wrap_future(call.result)
    except asyncio.CancelledError:
        call.cancel()
        await land(asyncio.wrap_future(call.ended))
        raise


class CommitBase:
    """A commit under way; what needs no waiting."""

    def __init__(self, call: Call[int]) -> None:
        self._call = call

    def __repr__(self) -> str:
        if not self.done():
            return f"<{type(self).__name__}: under way>"
        result = self._call.result
        failed = result.cancelled() or result.exception() is not None
        return f"<{type(self).__name__}: {'failed' if failed else f'generation {result.result()}'}>"

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._call.result.done()


class AsyncCommitHandle(CommitBase):
    """A commit under way."""

    async def result(self, timeout: float | None = None) -> int:
        """The generation, once the commit is durable.

        Raises:
            TimeoutError: Not yet; the commit goes on.
            TierstoreError: It failed; the previous commit stands.
        """
        async with asyncio.timeout(timeout):
            return await asyncio.shield(asyncio.wrap_future(self._call.result))


class AsyncTierStore(StoreBase):
    """`TierStore` with coroutines: `async with AsyncTierStore(...) as store`, or `store = await AsyncTierStore(...)`.

    The arguments and methods are those of `TierStore`. Owners of leases are asyncio tasks instead of threads.
    """

    def __init__(
        self,
        gpu: int | str = "auto",
        ram: int | str = "auto",
        nvme: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        nvme_limit: int | str | None = None,
        page_locked: bool | Literal["auto"] = "auto",
        policy: str | Policy = "lookahead",
        direct_io: bool | Literal["auto"] = "auto",
        checksum: bool = True,
        keep: int = 1,
        generation: int | None = None,
    ) -> None:
        """Note the arguments; the store opens on a thread when it is entered or awaited."""
        self._options = Options(gpu, ram, nvme, device, nvme_limit, page_locked, policy, direct_io, checksum, keep, generation)
        self._engine = None
        self._opening: asyncio.Future[Engine] | None = None

    async def __aenter__(self) -> AsyncTierStore:
        if self._engine is None:
            self._opening = self._opening or asyncio.ensure_future(asyncio.to_thread(open_engine, self._options))
            opening = self._opening
            try:
                self._engine = await land(opening)
            except asyncio.CancelledError:
                if self._engine is None and opening.done() and not opening.cancelled() and opening.exception() is None:
                    self._engine = opening.result()
                    await self.close()
                raise
            finally:
                self._opening = None
        return self

    def __await__(self) -> Generator[Any, None, AsyncTierStore]:
        return self.__aenter__().__await__()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await _finish(self.engine.call(coroutine))

    async def put(self, name: str, tensors: torch.Tensor | Tensors, *, tier: str = "ram", frozen: bool = False) -> None:
        """Add a block; see `TierStore.put`."""
        source, single = source_of(name, tensors)
        await self._run(make(self.engine, name, source, single, tier, frozen, asyncio.current_task()))

    async def adopt(self, path: str | os.PathLike[str], *, layout: Layout = "layers") -> tuple[str, ...]:
        """Register the tensors of a model where they lie; see `TierStore.adopt`."""
        model = await self._run(self.engine.models.survey(path))
        return await self._run(operations.adopt(self.engine, model, claims(model, layout)))

    def use(self, *names: str, write: bool | str | Collection[str] = False, timeout: float | None = None) -> AsyncUse:
        """Lease blocks; see `TierStore.use`."""
        return AsyncUse(self.engine, names, write, timeout)

    async def prefetch(self, *names: str) -> None:
        """Hint that these blocks are used soon; see `TierStore.prefetch`."""
        self._hint(names)

    async def read(self, name: str) -> torch.Tensor | dict[str, torch.Tensor]:
        """A copy of the newest values; see `TierStore.read`."""
        (record,) = self._records((name,))
        return unwrap(record, await self._run(operations.read(self.engine, record, asyncio.current_task())))

    async def write(self, name: str, tensors: torch.Tensor | Tensors) -> None:
        """Replace values in place; see `TierStore.write`."""
        (record,) = self._records((name,))
        source, _ = source_of(name, tensors)
        operations.check_tensors(record.block, source.tensors)
        await self._run(operations.write(self.engine, record, source, asyncio.current_task()))

    async def hold(self, name: str, tier: str) -> None:
        """Keep a block on a tier; see `TierStore.hold`."""
        (record,) = self._records((name,))
        await self._run(operations.hold(self.engine, record, tier_of(tier), asyncio.current_task()))

    async def unhold(self, name: str) -> None:
        """End a hold; see `TierStore.unhold`."""
        self._unhold(name)

    async def evict(self, name: str) -> None:
        """Take a block off the fast tiers; see `TierStore.evict`."""
        (record,) = self._records((name,))
        await self._run(operations.evict(self.engine, record, asyncio.current_task()))

    async def delete(self, name: str) -> None:
        """Remove a block; see `TierStore.delete`."""
        (record,) = self._records((name,))
        await self._run(operations.delete(self.engine, record, asyncio.current_task()))

    async def commit(self, metadata: Any = None, *, wait: bool = True) -> int | AsyncCommitHandle:
        """Make the present state durable; see `TierStore.commit`."""
        call = operations.start_commit(self.engine, asyncio.current_task(), metadata, wait=wait)
        if not wait:
            return AsyncCommitHandle(call)
        return await _finish(call)

    async def flush(self) -> None:
        """Write all dirty blocks back; see `TierStore.flush`."""
        await self._run(operations.flush(self.engine, asyncio.current_task()))

    async def close(self) -> None:
        """End cleanly; see `TierStore.close`."""
        engine = self._engine
        if engine is None or engine.forked:
            return
        call = engine.begin_close(operations.close(engine))
        if call is None:  # another task closes it, or has
            await asyncio.shield(asyncio.wrap_future(engine.ended))
            return

        async def end() -> None:
            try:
                warn_of_loss(await asyncio.wrap_future(call.result))
            finally:
                try:
                    await asyncio.to_thread(engine.shut_down)
                except RuntimeError:  # the system starts no more threads
                    if not engine.ended.done():
                        engine.shut_down()

        await land(end())


async def make(engine: Engine, name: str, source: Source, single: bool, tier: str, frozen: bool, owner: Owner) -> None:
    """Lay the block out and add it."""
    where = tier_of(tier)
    if where is Tier.NVME:
        operations.need_directory(engine)
    await operations.put(engine, block_of(name, source, single=single, frozen=frozen), source, where, owner)


def unwrap(record: Record, tensors: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
    return next(iter(tensors.values())) if record.block.single else tensors
