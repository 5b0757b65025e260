"""`AsyncTierStore`, and what both faces of a store share.

Both faces speak to one `Engine`, whose event loop runs on a thread of its own: a user's loop that is blocked delays no
transfer. The fast path of `use()` touches neither loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Coroutine, Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from tierstore.catalog import PAGE, Block, check_text, lay_out
from tierstore.clock import RealClock
from tierstore.counters import Stats, TierStats, WaitStats
from tierstore.errors import ClosedError, LeaseError, LeaseTimeoutError, OptionError, SizeError, TensorError
from tierstore.hardware import measure_hardware, resolve_budgets, resolve_device
from tierstore.mover import operations
from tierstore.mover.budget import NUM_SLOTS, RING_SLOTS, slot_bytes
from tierstore.mover.engine import Call, Engine, Ticket
from tierstore.mover.operations import Source, Tensors
from tierstore.mover.streams import Copies, CudaCopies, ThreadCopies
from tierstore.nvme.directory import Commit, Directory
from tierstore.nvme.files import land
from tierstore.placement import Limits, Placement
from tierstore.policies import Policy, resolve
from tierstore.requests import Owner, Record
from tierstore.residency import State, Tier
from tierstore.scheduler import Scheduler
from tierstore.tiers.device import DTYPES, NAMES, DeviceArena
from tierstore.tiers.ram import HostArena
from tierstore.trace import Link, Timeline, Trace
from tierstore.units import LinkRates

log = logging.getLogger("tierstore")
T = TypeVar("T")

Leased = Any
"""What a lease yields: a tensor, a mapping of names to tensors, or a tuple of these."""


@dataclass(frozen=True)
class Options:
    """The arguments of `TierStore`, as given."""

    gpu: int | str
    ram: int | str
    nvme: str | os.PathLike[str] | None
    device: str | torch.device | None
    nvme_limit: int | str | None
    page_locked: bool | Literal["auto"]
    policy: str | Policy
    direct_io: bool | Literal["auto"]
    checksum: bool
    keep: int
    generation: int | None


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


def open_engine(options: Options) -> Engine:
    """Open directory and arenas, and start the engine. Blocks: memory is touched and page-locked.

    Raises:
        SizeError, OptionError, CapacityError, BusyError, DirectoryError, ShardError, TierFullError: see `TierStore`.
    """
    check_options(options)
    device = resolve_device(options.device)
    policy = resolve(options.policy)
    budgets = resolve_budgets(
        options.gpu,
        options.ram,
        options.nvme_limit,
        device=device,
        hardware=measure_hardware(device, options.nvme),
    )
    directory = None
    if options.nvme is not None:
        directory = Directory.open(
            options.nvme,
            limit=None if options.nvme_limit in (None, "auto") else budgets.nvme_limit_bytes,
            checksum=options.checksum,
            keep=options.keep,
            generation=options.generation,
            direct_io=options.direct_io,
        )
    try:
        return _assemble(options, device, policy, budgets.gpu_bytes, budgets.ram_bytes, directory)
    except BaseException:
        if directory is not None:
            asyncio.run(directory.close())
        raise


def check_options(options: Options) -> None:
    """Refuse what can be refused by its look alone.

    Raises:
        OptionError: An option that is out of range, of the wrong type or without meaning for this store.
    """
    switch, whole = 'True, False or "auto"', "a whole number"
    wanted = {
        "page_locked": (options.page_locked in (True, False, "auto"), switch),
        "direct_io": (options.direct_io in (True, False, "auto"), switch),
        "checksum": (isinstance(options.checksum, bool), "True or False"),
        "keep": (type(options.keep) is int and options.keep >= 1, f"{whole} from 1 on"),
        "generation": (options.generation is None or type(options.generation) is int, f"{whole}, or None for the newest"),
        "nvme": (options.nvme is None or _is_path(options.nvme), "the path of one directory, or None"),
    }
    for option, (right, need) in wanted.items():
        if not right:
            have = repr(getattr(options, option))
            raise OptionError(f"{option}= is not understood", need=need, have=have, remedy=f"give {option}= as such, or leave it out")
    if options.nvme is None and (options.generation is not None or options.keep != 1):
        raise OptionError("keep= and generation= are about commits", need="a directory", have="nvme=None", remedy="name a directory with nvme=")


def _is_path(value: object) -> bool:
    try:
        path = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        return False
    return isinstance(path, str) and path != "" and "\0" not in path


def _assemble(
    options: Options, device: torch.device, policy: Policy, gpu_bytes: int, ram_bytes: int, directory: Directory | None
) -> Engine:
    cuda = device.type == "cuda"
    slot = slot_bytes(ram_bytes)
    transfer_bytes = slot * (NUM_SLOTS + (RING_SLOTS if cuda else 0))
    if ram_bytes < transfer_bytes + PAGE:
        raise SizeError(
            f"ram={options.ram!r} is too small to hold any block beside transfer space",
            need=f"at least {transfer_bytes + PAGE} bytes",
            have=f"{ram_bytes} bytes",
            remedy="raise ram=",
            option="ram",
            size=options.ram,
        )
    lock_pages = cuda and options.page_locked is not False
    clock = RealClock()
    rates = LinkRates()
    placement = Placement(
        gpu_bytes=gpu_bytes,
        ram_bytes=max(0, ram_bytes - transfer_bytes),
        has_nvme=directory is not None,
        policy=policy,
        seconds_per_byte={
            Link.H2D: 1 / rates.h2d_bytes_per_s,
            Link.D2H: 1 / rates.d2h_bytes_per_s,
            Link.NVME_READ: 1 / rates.nvme_read_bytes_per_s,
            Link.NVME_WRITE: 1 / rates.nvme_write_bytes_per_s,
        },
        limits=dict.fromkeys(Link, Limits()),
        clock=clock,
    )
    arena = DeviceArena(gpu_bytes, device)
    threads = min(16, os.cpu_count() or 1)
    host = HostArena(max(1, placement.capacity_bytes(Tier.RAM)), page_lock=lock_pages, threads=threads)
    transfer = HostArena(transfer_bytes, page_lock=lock_pages, threads=threads)
    if options.page_locked is True and cuda and host.page_lock_error is not None:
        host.close()
        transfer.close()
        remedy = 'lower ram= or use page_locked="auto"'
        raise OptionError("the RAM tier could not be page-locked", need=f"{host.nbytes} bytes", have=host.page_lock_error, remedy=remedy)
    copies: Copies = CudaCopies(arena, host, transfer, (slot * NUM_SLOTS, slot)) if cuda else ThreadCopies(arena, host)
    engine = Engine(
        Scheduler(placement, clock),
        device=arena,
        host=host,
        copies=copies,
        directory=directory,
        transfer=transfer,
        slot_bytes=slot,
        clock=clock,
    )
    if directory is not None:
        for entry in directory.entries.values():
            record = engine.scheduler.recover(entry.block)
            engine.shards[record] = entry.shard
            engine.committed_versions[record] = record.version
            engine.total_bytes += record.nbytes
        if directory.committed is not None:
            log.info("resumed generation %d with %d blocks", directory.committed.generation, len(directory.entries))
    return engine


class StoreBase:
    """What needs no waiting, and is the same on both faces. Any thread."""

    _engine: Engine | None

    @property
    def engine(self) -> Engine:
        """The engine; for this package's own modules."""
        if self._engine is None:
            raise ClosedError("the store is not open", remedy="enter it with `async with`, or await it")
        self._engine.check_open()
        return self._engine

    def __contains__(self, name: object) -> bool:
        record = self.engine.scheduler.names.get(name)  # type: ignore[call-overload]
        return record is not None and record.born

    def __iter__(self) -> Iterator[str]:
        engine = self.engine
        with engine.lock:
            return iter([name for name, record in engine.scheduler.names.items() if record.born])

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
                    held_bytes=sum(record.nbytes for record in placement.held.values() if record.hold is tier),
                    hits=hits,
                    misses=misses,
                    evictions=placement.evictions[tier],
                )
            if directory is not None:
                tiers["nvme"] = TierStats(
                    capacity_bytes=directory.limit_bytes,
                    used_bytes=directory.used_bytes,
                    peak_bytes=directory.peak_bytes,
                    num_blocks=sum(record.nvme_version == record.version for record in records),
                    held_bytes=sum(record.nbytes for record in placement.held.values() if record.hold is Tier.NVME),
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
            )

    def _records(self, names: tuple[str, ...]) -> tuple[Record, ...]:
        engine = self.engine
        with engine.lock:
            return tuple(engine.scheduler.find(name) for name in names)

    def _hint(self, names: tuple[str, ...]) -> None:
        engine = self.engine
        with engine.lock:
            engine.scheduler.hint([engine.scheduler.find(name) for name in names])
        engine.wake()

    def _unhold(self, name: str) -> None:
        engine = self.engine
        with engine.lock:
            engine.scheduler.set_hold(engine.scheduler.find(name), None)
        engine.wake()


class UseBase:
    """The context of one `use()`: what both faces do on entering and leaving."""

    def __init__(self, engine: Engine, names: tuple[str, ...], write: bool | str | Collection[str], timeout: float | None) -> None:
        self._engine = engine
        self._names = names
        self._timeout = timeout
        self._ticket: Ticket | None = None
        self._watched: list[tuple[str, torch.Tensor, int]] = []
        if timeout is not None and not (isinstance(timeout, int | float) and timeout == timeout):
            raise OptionError("timeout= is not understood", need="seconds, or None", have=repr(timeout), remedy="give it as such")
        if isinstance(write, bool):
            self._write: bool | frozenset[str] = write
            return
        wanted = [write] if isinstance(write, str) else list(write) if isinstance(write, Collection) else None
        if wanted is None:
            raise LeaseError("write= is not understood", need="True, False or names", have=repr(write), remedy="give it as such")
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise LeaseError(f"write= names blocks that use() does not: {unknown!r}", remedy="name them in use() too")
        self._write = frozenset(wanted)

    def _check_fresh(self) -> None:
        if self._ticket is not None:
            raise LeaseError("one use() context cannot be entered twice", remedy="call use() again")

    def _begin(self, owner: Owner) -> Future[None] | None:
        self._ticket = Ticket(owner)
        return self._engine.begin_use(self._ticket, self._names, self._write)

    def _yield(self) -> Leased:
        assert self._ticket is not None
        tensors = self._engine.tensors(self._ticket)
        writes = self._ticket.writes
        by_name: dict[str, Leased] = {}
        for record, views in tensors.items():
            block = record.block
            if record.id not in writes and record.writer is None:
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
        try:
            self._engine.end_use(ticket)
        finally:
            if ticket.lease is not None:
                self._engine.abandon(ticket)
            self._ticket = None  # only now: if Ctrl-C strikes, the finaliser ends the lease
        if changed and not failed:
            name = changed[0]
            raise LeaseError(f"block {name!r} was changed under a lease that only reads", remedy="use(..., write=True)", block=name)

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


def source_of(block: str, tensors: torch.Tensor | Tensors) -> tuple[Source, bool]:
    """Check what a caller gave, and note where its making stands. Returns (source, it was one bare tensor).

    Raises:
        TensorError: Something that is not a dense tensor of real numbers with values.
    """
    check_text(block, what="block name", block=block)
    single = isinstance(tensors, torch.Tensor)
    mapping: Tensors = {block: tensors} if isinstance(tensors, torch.Tensor) else tensors
    if not isinstance(mapping, Mapping) or not mapping:
        have = f"an empty {type(mapping).__name__}" if isinstance(mapping, Mapping) else type(mapping).__name__
        raise TensorError(
            f"block {block!r} needs tensors",
            need="a tensor, or a mapping of names to one or more",
            have=have,
            remedy="wrap it with torch.as_tensor(), or name what it should hold",
            block=block,
        )
    checked: dict[str, torch.Tensor] = {}
    made: torch.cuda.Event | None = None
    for name, tensor in mapping.items():
        problem, remedy = _unsuitable(tensor)
        if problem:
            raise TensorError(
                f"tensor {name!r} of block {block!r} {problem}", need="a dense tensor with values", remedy=remedy, block=block, tensor=name
            )
        checked[name] = tensor.detach()
        if tensor.is_cuda and made is None:
            made = torch.cuda.Event(blocking=True)
            made.record(torch.cuda.current_stream(tensor.device))
    return Source(checked, made), single


def _unsuitable(tensor: object) -> tuple[str, str]:
    if not isinstance(tensor, torch.Tensor):
        return f"is not a tensor but {type(tensor).__name__}", "wrap it with torch.as_tensor()"
    if tensor.is_meta:
        return "is on the meta device and has no values", "initialise it first"
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout})", "store .to_dense(), or its indices and values"
    if tensor.is_complex():
        return f"is complex ({tensor.dtype})", "store torch.view_as_real(tensor)"
    if tensor.dtype not in NAMES:
        return f"has the dtype {tensor.dtype}, which safetensors cannot hold", f"convert it to one of {', '.join(map(str, NAMES))}"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"is on the device {tensor.device}", "move it to the CPU"
    return "", ""


def block_of(name: str, source: Source, *, single: bool, frozen: bool) -> Block:
    specs = [(tensor, NAMES[value.dtype], tuple(value.shape)) for tensor, value in source.tensors.items()]
    return lay_out(name, specs, single=single, frozen=frozen)


def tier_of(value: str | Tier) -> Tier:
    """A tier by name.

    Raises:
        OptionError: There is no such tier.
    """
    try:
        return Tier(value)
    except ValueError:
        raise OptionError(f"unknown tier {value!r}", need="'gpu', 'ram' or 'nvme'", remedy="name one of these") from None


def warn_of_loss(lost: int) -> None:
    if lost:
        log.warning("closed with %d block(s) that were changed, added or deleted since the last commit: that is undone", lost)


class AsyncUse(UseBase):
    """`async with store.use(...)`."""

    async def __aenter__(self) -> Leased:
        self._check_fresh()
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
            ticket, self._ticket = self._ticket, None
            if ticket is not None:
                self._engine.abandon(ticket)
            raise

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._end(kind is not None)


async def _finish(call: Call[T]) -> T:
    """Wait for a call. Cancelled, it cancels the call too, and raises when nothing of that is left."""
    try:
        return await asyncio.wrap_future(call.result)
    except asyncio.CancelledError:
        call.cancel()
        await land(asyncio.wrap_future(call.ended))
        raise


class AsyncCommitHandle:
    """A commit under way."""

    def __init__(self, future: Future[int]) -> None:
        self._future = future

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    async def result(self, timeout: float | None = None) -> int:
        """The generation, once the commit is durable.

        Raises:
            TimeoutError: Not yet; the commit goes on.
            TierstoreError: It failed; the previous commit stands.
        """
        async with asyncio.timeout(timeout):
            return await asyncio.shield(asyncio.wrap_future(self._future))


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
        return await _finish(call) if wait else AsyncCommitHandle(call.result)

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
            await asyncio.to_thread(engine.ended.wait)
            return

        async def end() -> None:
            try:
                warn_of_loss(await asyncio.wrap_future(call.result))
            finally:
                await asyncio.to_thread(engine.shut_down)

        await land(end())


async def make(engine: Engine, name: str, source: Source, single: bool, tier: str, frozen: bool, owner: Owner) -> None:
    """Lay the block out and add it."""
    where = tier_of(tier)
    if where is Tier.NVME:
        operations.need_directory(engine)
    await operations.put(engine, block_of(name, source, single=single, frozen=frozen), source, where, owner)


def unwrap(record: Record, tensors: dict[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
    return next(iter(tensors.values())) if record.block.single else tensors
