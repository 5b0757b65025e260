"""What the store's calls do beyond leases: coroutines on the engine's loop that move bytes between the user's tensors and tiers.

Each takes the block from the scheduler, copies on a host thread, and books the result. Cancelled at any await, it gives
back what it took and leaves the block as it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass

import torch

from tierstore.catalog import Block, TensorSpec
from tierstore.errors import (
    BlockExistsError,
    CapacityError,
    FrozenError,
    LeaseError,
    NoDirectoryError,
    SizeError,
    TensorError,
    TierstoreError,
)
from tierstore.leases import no_content
from tierstore.mover.calls import Call, Capture
from tierstore.mover.engine import Engine
from tierstore.mover.failures import explaining
from tierstore.nvme.directory import Directory
from tierstore.nvme.layouts import Claim
from tierstore.nvme.manifest import encode_metadata
from tierstore.nvme.model_files import Model
from tierstore.nvme.shards import Entry, Shard
from tierstore.requests import HostAccess, Make, Owner, Place, Record, Save, Vacate
from tierstore.residency import Event, State, Tier
from tierstore.tiers.device import DTYPES, flat_bytes, view_of

log = logging.getLogger("tierstore")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """Tensors of a caller, and the events behind which CUDA streams have made them."""

    tensors: Tensors
    made: tuple[torch.cuda.Event, ...] = ()

    def wait(self) -> None:
        for event in self.made:
            event.synchronize()


async def put(engine: Engine, block: Block, source: Source, tier: Tier, owner: Owner) -> None:
    """Add a block. See `TierStore.put`."""
    with engine.lock:
        engine.check_open()
        record = engine.scheduler.new_record(block)
    request = Make(owner, (record,), tier=tier)
    try:
        await engine.request(request)
    except BaseException:
        with engine.lock:
            engine.scheduler.forget(record)  # if it never came so far as to be queued
        raise
    filled = False
    try:
        if tier is Tier.NVME:
            await _make_on_nvme(engine, record, source)
        else:
            with engine.lock:
                engine.placement.start_load(record, tier)
            if tier is Tier.RAM:
                await _on_host(engine, record, tier, "put()", _fill_host, engine, record, source)
            else:
                await _on_host(engine, record, tier, "put()", _fill_device, engine, record.gpu.offset, block, source)
            with engine.lock:
                engine.placement.finish_make(record, tier)
        filled = True
    finally:
        with engine.lock:
            if not filled and record.copy(tier).state is State.LOADING:
                engine.placement.finish_make(record, tier)
            engine.scheduler.make_ended(record, filled=filled, on_nvme=tier is Tier.NVME)
            if filled:
                engine.total_bytes += record.nbytes
            elif record in engine.shards and engine.directory is not None:
                engine.directory.discard(engine.shards.pop(record))
        engine.wake()


def _fill_host(engine: Engine, record: Record, source: Source) -> None:
    source.wait()
    storage, cpu = engine.host.tensor.untyped_storage(), torch.device("cpu")
    for spec in record.block.tensors:
        if spec.name in source.tensors:
            view_of(storage, cpu, record.ram.offset, spec).copy_(source.tensors[spec.name])


def _fill_device(engine: Engine, offset: int, block: Block, source: Source) -> None:
    source.wait()
    for spec in block.tensors:
        if spec.name in source.tensors and spec.nbytes:
            engine.copies.write(offset + spec.offset, source.tensors[spec.name])


async def _on_host(engine: Engine, record: Record, tier: Tier, call: str, function: Callable[..., None], *arguments: object) -> None:
    """Copy on a thread for a call of the user's.

    Raises:
        TransferError: Whatever went wrong, with block and tier.
    """
    with explaining(record, tier, f"{call} of block {record.block.name!r} on tier {tier.value!r}"):
        await engine.offload(function, *arguments)


async def adopt(engine: Engine, model: Model, claims: Sequence[Claim]) -> tuple[str, ...]:
    """Register blocks that lie in model files: all or none. See `TierStore.adopt`."""
    with engine.lock:
        engine.check_open()
        try:
            records = engine.scheduler.adopt([claim.block for claim in claims])
        except CapacityError as error:
            raise _too_large(error, claims) from error
        except BlockExistsError as error:
            claim = next(claim for claim in claims if claim.block.name == error.block)
            path, tensor = claim.adopted.files[0].path, claim.block.tensors[0].name
            raise BlockExistsError(
                f"{error.problem}, and {path} would be adopted as such (tensor {tensor!r})",
                remedy="adopt a model once, as a commit remembers it; or delete() the block, or give layout= a function for another name",
                path=path,
                tensor=tensor,
                block=error.block,
            ) from error
        for record, claim in zip(records, claims, strict=True):
            engine.shards[record] = Shard.of_model(claim.block, claim.adopted)
            engine.total_bytes += record.nbytes
    engine.wake()
    log.info("adopted %s: %d blocks, %d tensors", model.path, len(claims), sum(len(claim.block.tensors) for claim in claims))
    return tuple(claim.block.name for claim in claims)


def _too_large(error: CapacityError, claims: Sequence[Claim]) -> SizeError:
    claim = next(claim for claim in claims if claim.block.name == error.block)
    index, largest = max(enumerate(claim.block.tensors), key=lambda pair: pair[1].nbytes)
    path = claim.adopted.files[claim.adopted.places[index][0]].path
    return SizeError(
        f"{error.problem}; its largest tensor is {largest.name!r} of {path}, {largest.nbytes} bytes",
        need=error.need,
        have=error.have,
        remedy=f"raise {error.tier}=, or give layout= a function that makes smaller blocks",
        block=claim.block.name,
        tensor=largest.name,
        path=path,
        tier=error.tier,
    )


async def declare(engine: Engine, block: Block, owner: Owner) -> None:
    """Add a block without content, to be written by leases that are `fresh` in it. See [Note: Blank blocks] in `scheduler`."""
    with engine.lock:
        engine.check_open()
        record = engine.scheduler.new_record(block)
    try:
        await engine.request(Make(owner, (record,), tier=Tier.NVME if engine.directory is not None else Tier.RAM))
    except BaseException:
        with engine.lock:
            engine.scheduler.forget(record)
        raise
    made = False
    try:
        await asyncio.sleep(0)  # a cancellation that came when the request had been served strikes here
        made = True
    finally:
        with engine.lock:
            engine.scheduler.make_ended(record, filled=made, blank=True)
            if made:
                engine.total_bytes += record.nbytes
        engine.wake()


async def _make_on_nvme(engine: Engine, record: Record, source: Source) -> None:
    directory = need_directory(engine)
    await _on_host(engine, record, Tier.NVME, "put()", source.wait)
    with explaining(record, Tier.NVME, f"put() of block {record.block.name!r}", directory.path):
        await _write_shard(engine, directory, record, source, keep=False)


async def _write_shard(engine: Engine, directory: Directory, record: Record, source: Source, *, keep: bool) -> None:
    """Write a new shard piece by piece through transfer space.

    Args:
        keep: Bytes that `source` does not cover are taken from the present shard.
    """
    writer = await directory.create(record.block)
    gather = _Gather(record.block, source.tensors)
    reading = _reading(engine, record) if keep else nullcontext()
    try:
        async with reading as read, engine.slots.take(record.block.name) as slot:
            for start in range(0, record.nbytes, engine.slots.nbytes):
                length = min(engine.slots.nbytes, record.nbytes - start)
                with engine.transfer.memory[slot : slot + length] as piece:
                    if read is not None:
                        await read(piece, start)
                    target = engine.transfer.tensor[slot : slot + length]
                    await engine.offload(gather, start, target)
                    await writer.write(start, piece)
        shard = await writer.finish()
    except BaseException:
        await writer.abort()
        raise
    with engine.lock:
        engine.replace_shard(record, shard, record.version)


class _Gather:
    """Copies pieces of a payload, in order, from the tensors that make it up. One of them at a time is made contiguous."""

    def __init__(self, block: Block, tensors: Tensors) -> None:
        self._block = block
        self._tensors = tensors
        self._flat: tuple[str, torch.Tensor] | None = None

    def __call__(self, start: int, target: torch.Tensor) -> None:
        """Fill `target` with payload bytes [start, start + len(target))."""
        for spec, inside, outside, length in _overlaps(self._block, start, target.numel()):
            if spec.name in self._tensors:
                if self._flat is None or self._flat[0] != spec.name:
                    self._flat = (spec.name, flat_bytes(self._tensors[spec.name]))
                target[outside : outside + length].copy_(self._flat[1][inside : inside + length])


def _overlaps(block: Block, start: int, nbytes: int) -> Iterator[tuple[TensorSpec, int, int, int]]:
    """(tensor, offset in it, offset in the range, bytes) of the parts of tensors within a range of the payload."""
    for spec in block.tensors:
        low, high = max(spec.offset, start), min(spec.offset + spec.nbytes, start + nbytes)
        if low < high:
            yield spec, low - spec.offset, low - start, high - low


@asynccontextmanager
async def _host_access(
    engine: Engine, record: Record, owner: Owner, *, write: bool, doing: str, removing: bool = False
) -> AsyncIterator[HostAccess]:
    """Have the block's bytes to oneself (write) or steady (read), wherever they are."""
    with engine.lock:
        refuse_own_lease(record, owner, doing=doing, write=write)
    request = HostAccess(owner, (record,), write=write, removing=removing)
    await engine.request(request)
    try:
        yield request
    finally:
        with engine.lock:
            if not write:
                engine.scheduler.host_read_ended(request)
            elif record.locked:
                engine.scheduler.host_write_ended(record)
        engine.wake()


def refuse_own_lease(record: Record, owner: Owner, *, doing: str, write: bool) -> None:
    """Under the lock.

    Raises:
        LeaseError: The caller itself holds a lease that the call would wait for.
    """
    if record.writer == owner or (write and owner in record.readers):
        raise LeaseError(
            f"{doing} of block {record.block.name!r} inside one's own lease of it would never end",
            remedy="leave the lease first",
            block=record.block.name,
        )


async def read(engine: Engine, record: Record, owner: Owner) -> dict[str, torch.Tensor]:
    """Copy the newest values. See `TierStore.read`."""
    async with _host_access(engine, record, owner, write=False, doing="read()") as access:
        assert access.tier is not None
        flat = {spec.name: torch.empty(spec.nbytes, dtype=torch.uint8) for spec in record.block.tensors}
        if access.tier is Tier.NVME:
            path = engine.directory.path if engine.directory is not None else None
            with explaining(record, Tier.NVME, f"read() of block {record.block.name!r}", path):
                await _read_shard(engine, record, flat)
        else:
            await _on_host(engine, record, access.tier, "read()", _copy_out, engine, record, access.tier, flat)
    return {spec.name: flat[spec.name].view(DTYPES[spec.dtype]).reshape(spec.shape) for spec in record.block.tensors}


def _copy_out(engine: Engine, record: Record, tier: Tier, flat: dict[str, torch.Tensor]) -> None:
    for spec in record.block.tensors:
        if tier is Tier.RAM:
            begin = record.ram.offset + spec.offset
            flat[spec.name].copy_(engine.host.tensor[begin : begin + spec.nbytes])
        elif spec.nbytes:
            engine.copies.read(record.gpu.offset + spec.offset, flat[spec.name])


async def _read_shard(engine: Engine, record: Record, flat: dict[str, torch.Tensor]) -> None:
    async with _reading(engine, record) as read, engine.slots.take(record.block.name) as slot:
        for start in range(0, record.nbytes, engine.slots.nbytes):
            length = min(engine.slots.nbytes, record.nbytes - start)
            with engine.transfer.memory[slot : slot + length] as piece:
                await read(piece, start)
            await engine.offload(_scatter, record.block, engine.transfer.tensor[slot : slot + length], start, flat)


Read = Callable[[memoryview, int], Awaitable[None]]
"""Fills a piece with payload bytes from an offset on; the next piece begins where this one ends."""


@asynccontextmanager
async def _reading(engine: Engine, record: Record) -> AsyncIterator[Read]:
    """Read a block from the drive, from its beginning to its end. What was read counts once this has ended."""
    shard = engine.shards[record]
    if shard.adopted is not None:
        async with engine.models.stream(shard) as stream:
            yield lambda piece, _: stream.read(piece)
        return
    directory = need_directory(engine)
    directory.retain(shard)  # nobody rewrites it meanwhile
    try:
        yield lambda piece, start: directory.read(shard, piece, offset=start)
    finally:
        directory.release(shard)


def _scatter(block: Block, piece: torch.Tensor, start: int, flat: dict[str, torch.Tensor]) -> None:
    for spec, inside, outside, length in _overlaps(block, start, piece.numel()):
        flat[spec.name][inside : inside + length].copy_(piece[outside : outside + length])


async def write(engine: Engine, record: Record, source: Source, owner: Owner) -> None:
    """Replace values in place, in the fastest host-side place that has them. See `TierStore.write`."""
    if record.block.frozen:
        raise FrozenError(f"block {record.block.name!r} is frozen", remedy="put it without frozen=", block=record.block.name)
    async with _host_access(engine, record, owner, write=True, doing="write()"):
        placement = engine.placement
        if record.blank:
            raise no_content(record)
        if record.ram.valid and not (record.gpu.valid and record.hold is Tier.GPU):
            try:
                await _on_host(engine, record, Tier.RAM, "write()", _fill_host, engine, record, source)
            finally:  # also if cancelled: by then the bytes have changed
                with engine.lock:
                    record.version += 1
                    if record.gpu.state is not State.ABSENT:
                        placement.discard(record, Tier.GPU)
                    if placement.has_nvme:
                        placement.revive_ram(record, Event.WRITE)
        elif record.gpu.valid:
            try:
                await _on_host(engine, record, Tier.GPU, "write()", _fill_device, engine, record.gpu.offset, record.block, source)
            finally:
                with engine.lock:
                    record.version += 1
                    record.gpu.apply(Event.WRITE)
                    placement.supersede_ram(record)
                    engine.device.invalidate([record.id])  # now: who leases it next must not be blamed for this change
        else:
            directory = need_directory(engine)
            await _on_host(engine, record, Tier.NVME, "write()", source.wait)
            with engine.lock:
                record.version += 1
            try:
                with explaining(record, Tier.NVME, f"write() of block {record.block.name!r}", directory.path):
                    partly = any(spec.name not in source.tensors for spec in record.block.tensors)
                    await _write_shard(engine, directory, record, source, keep=partly)
            except BaseException:
                with engine.lock:
                    record.version -= 1
                raise
            with engine.lock:
                record.nvme_version = record.version
                if record.ram.state is State.STALE and record.ram.settled:
                    placement.drop(record, Tier.RAM)


async def delete(engine: Engine, record: Record, owner: Owner) -> None:
    async with _host_access(engine, record, owner, write=True, doing="delete()", removing=True):
        with engine.lock:
            engine.scheduler.host_write_ended(record)
            engine.scheduler.forget(record)
            engine.total_bytes -= record.nbytes
            shard = engine.shards.pop(record, None)
            if shard is not None and engine.directory is not None:
                engine.directory.discard(shard)
            if shard is not None and shard.adopted is not None:
                engine.models.forget(shard)


async def hold(engine: Engine, record: Record, tier: Tier, owner: Owner) -> None:
    """Order a block to stay on a tier, and wait until it is there."""
    if tier is Tier.NVME:
        need_directory(engine)
    with engine.lock:
        refuse_own_lease(record, owner, doing="hold()", write=tier is Tier.NVME)
        engine.placement.check_hold(record, tier)
        before = record.hold
        engine.scheduler.set_hold(record, tier)
    request = Vacate(owner, (record,)) if tier is Tier.NVME else Place(owner, (record,), tier=tier)
    try:
        await engine.request(request)
    except BaseException:
        with engine.lock:
            engine.scheduler.set_hold(record, before)
        raise


async def evict(engine: Engine, record: Record, owner: Owner) -> None:
    with engine.lock:
        refuse_own_lease(record, owner, doing="evict()", write=True)
        if record.hold in (Tier.GPU, Tier.RAM):
            raise LeaseError(
                f"block {record.block.name!r} is held on tier {record.hold.value!r}", remedy="unhold() it first", block=record.block.name
            )
    await engine.request(Vacate(owner, (record,)))


async def flush(engine: Engine, owner: Owner) -> None:
    with engine.lock:
        refuse_own_writes(engine, owner, "flush()")
    await engine.request(Save(owner, ()))


def refuse_own_writes(engine: Engine, owner: Owner, doing: str) -> None:
    """Under the lock.

    Raises:
        LeaseError: The caller holds a write lease, which the call would wait for.
    """
    if engine.scheduler.holds_write(owner):
        raise LeaseError(f"{doing} inside one's own write lease would never end", remedy="leave the lease first")


def start_commit(engine: Engine, owner: Owner, metadata: object, *, wait: bool) -> Call[int]:
    """Fix the state to commit: from here on nobody begins to write before it is taken. Any thread.

    Args:
        engine, owner, metadata: As in `TierStore.commit`.
        wait: The owner does nothing else until it has ended.

    Returns:
        The commit under way, whose result is the generation.

    Raises:
        OptionError: The metadata is not JSON.
        NoDirectoryError: There is nowhere to commit to.
        LeaseError: Inside one's own write lease.
    """
    fixed = json.loads(encode_metadata(metadata))  # the caller may change it as soon as this returns
    need_directory(engine)
    with engine.lock:
        engine.check_open()
        refuse_own_writes(engine, owner, "commit()")
        capture = Capture(Save(owner, (), commit=True, waited=wait))
        future = engine.submit(capture.request)
        engine.captures.append(capture)
        try:
            call = engine.call_locked(_finish_commit(engine, capture, future, fixed), lambda: _end_commit(engine, capture))
        except BaseException:
            engine.captures.remove(capture)
            raise
    engine.wake()
    return call


async def _finish_commit(engine: Engine, capture: Capture, future: Future[None], metadata: object) -> int:
    """Save what is dirty, then make it durable. Returns the generation."""
    try:
        await engine.served(capture.request, future)
        in_order = sorted(capture.shards, key=lambda record: record.id)  # in which they were put, whenever they were saved
        entries = [Entry(record.block, capture.shards[record]) for record in in_order]
        generation = await need_directory(engine).commit(entries, metadata)
        await engine.models.warn_of_changes(capture.shards.values(), generation)
    except TierstoreError as error:
        if not capture.request.waited:  # nobody may ever ask the handle
            log.error("a commit failed: %s", error)
        raise
    engine.committed_versions = capture.versions
    engine.commits += 1
    return generation


def _end_commit(engine: Engine, capture: Capture) -> None:
    """Let go of what a commit took, however it ended."""
    with engine.lock:
        engine.withdraw(capture.request)
        engine.captures.remove(capture)
    engine.wake()
    for shard in capture.shards.values():
        need_directory(engine).release(shard)
    capture.ended.set_result(None)


async def close(engine: Engine) -> int:
    """End cleanly. Returns how many blocks are not as the last commit has them."""
    await engine.finish_commits()
    await engine.drain()
    lost = 0
    if engine.directory is not None:
        present = [record for record in engine.placement.records.values() if record.born is not None and not record.blank]
        changed = [
            record for record in present if engine.committed_versions.get(record) != record.version and not lies_in_model(engine, record)
        ]
        lost = len({record.block.name for record in [*changed, *(engine.committed_versions.keys() - set(present))]})
        await engine.directory.close()
    return lost


def lies_in_model(engine: Engine, record: Record) -> bool:
    """Whether the newest content of a block is in the model files that it was adopted from. Then nothing is lost if it is not committed."""
    shard = engine.shards.get(record)
    return shard is not None and shard.adopted is not None and record.nvme_version == record.version


def shut_down_after(engine: Engine, call: Call[int]) -> None:
    """The last step of closing, for a thread of its own: stop the engine once `close` has ended, well or not."""
    engine.runtime.wait(call.ended)
    engine.shut_down()


def need_directory(engine: Engine) -> Directory:
    if engine.directory is None:
        raise NoDirectoryError("the store has no NVMe tier", remedy="open it with nvme=DIRECTORY")
    return engine.directory


def check_tensors(block: Block, tensors: Tensors) -> None:
    """Refuse values that do not fit the block they should replace.

    Raises:
        TensorError: An unknown name, another shape or another dtype.
    """
    specs = {spec.name: spec for spec in block.tensors}
    for name, tensor in tensors.items():
        spec = specs.get(name)
        if spec is None:
            known = ", ".join(map(repr, specs))
            raise TensorError(f"block {block.name!r} has no tensor {name!r}", have=known, remedy="write only what it has", block=block.name)
        if tensor.dtype != DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
            raise TensorError(
                f"tensor {name!r} of block {block.name!r} cannot be replaced by one of another shape or dtype",
                need=f"{DTYPES[spec.dtype]} of shape {spec.shape}",
                have=f"{tensor.dtype} of shape {tuple(tensor.shape)}",
                remedy="convert it, or delete() the block and put() a new one",
                block=block.name,
                tensor=name,
            )
