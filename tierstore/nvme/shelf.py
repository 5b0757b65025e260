"""A directory's shards: reading and writing payloads, which file a write goes to, and when a file is let go.

[Note: Who may touch a file]
A write goes in place into a working shard, else into a pooled file of the right length under a new name, else into a new one.
A shard is let go (pooled, or deleted if its bytes or its file are not to be trusted) when it was discarded and its last
reference is released.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterable
from functools import partial

from tierstore.catalog import Block
from tierstore.errors import ClosedError, TierFullError, TierstoreError, TransferError
from tierstore.nvme import names
from tierstore.nvme.checksums import checksum as sum_of
from tierstore.nvme.checksums import num_chunks
from tierstore.nvme.files import File, Files, Request, aligned_buffer, land, move_all, when_landed
from tierstore.nvme.safetensors import build_header
from tierstore.nvme.shards import Shard, ShardWriter, check_header, damage, io_error, read_payload
from tierstore.nvme.space import FIXED_BYTES, Relief, Space, no_relief
from tierstore.threads import StalledError, under_way

log = logging.getLogger(__name__)

MAX_UNSYNCED_HANDLES = 256
"""Files written through and not synced yet that stay open, so that the sync sees every error of a late write; the system
reports such an error to a handle opened later only if it has not forgotten the file meanwhile."""

SYNCS_AT_ONCE = 16
"""Shards synced together: a journal makes one entry for all that wait for it."""

RELOCATE_BYTES = 1 << 20

REWRITE = "write() the block anew, or open the directory again at its last commit"


class Shelf:
    """The shards of one directory. All methods belong to the engine's loop.

    A coroutine that is cancelled ends first, then raises: no bytes are in flight once it has returned or raised.

    Attributes:
        path: Absolute.
        files: The file system.
        checksum: Payloads are summed and verified.
        read_bytes: Payload bytes read since opening; likewise `written_bytes`.
        created_files: Shard files made anew since opening; likewise `reused_files`.
        on_suspect: Told of each shard whose sync has failed. Says whether its bytes are elsewhere too, and will be written anew.
    """

    def __init__(self, path: str, files: Files, *, checksum: bool) -> None:
        self.path = path
        self.files = files
        self.checksum = checksum
        self.read_bytes = 0
        self.written_bytes = 0
        self.created_files = 0
        self.reused_files = 0
        self._space = Space(files, path, FIXED_BYTES)
        self._shards: dict[str, Shard] = {}  # by file name, all but pooled ones
        self._next_shard = 1
        self._handles: dict[Shard, None] = {}  # shards written through a handle that is still open, oldest first
        self._retired: list[tuple[File, Shard]] = []  # handles to be closed at the next occasion, and what was written through them
        self._closed = False
        self.on_suspect: Callable[[Shard], bool] = lambda _: False

    @property
    def used_bytes(self) -> int:
        """All files of the directory; see [Note: Counting files]."""
        return self._space.used_bytes

    @property
    def limit_bytes(self) -> int:
        return self._space.limit_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` has been since opening."""
        return self._space.peak_bytes

    @property
    def direct(self) -> bool:
        """Payloads bypass the page cache."""
        return self.files.direct

    @property
    def closed(self) -> bool:
        """`close` has begun."""
        return self._closed

    def path_of(self, shard: Shard) -> str:
        return self._join(shard.file) if shard.adopted is None else shard.adopted.files[0].path

    # -- payloads -------------------------------------------------------------------------------------------------------

    async def read(self, shard: Shard, into: memoryview, *, offset: int = 0) -> None:
        """Fill `into` with the payload's bytes from `offset` on. See [Note: When checksums are verified].

        Args:
            shard: Not broken, and not being written.
            into: Best at a page-aligned address and of whole pages; otherwise it goes through the page cache.
            offset: Bytes from the payload's start, likewise best a multiple of 4096.

        Raises:
            ShardError: The bytes are not those that were written, or nobody knows. `into` holds rubbish.
            TransferError: The read failed. `into` holds rubbish.
        """
        self._check_open()
        assert shard.whole, f"{shard.file} cannot be read now"
        assert shard.adopted is None, "model files are read by others"
        into = into.cast("B")
        if offset < 0 or offset + len(into) > shard.payload_bytes:
            raise ValueError(f"{len(into)} bytes at {offset} are not within a payload of {shard.payload_bytes}")
        path = self.path_of(shard)
        _check_believable(shard, path)
        doubted = shard.suspect
        self.retain(shard)  # nobody rewrites it meanwhile
        try:
            if shard.header_unverified and self.checksum:
                await check_header(self.files, path, shard)
                shard.header_unverified = False
            await read_payload(self.files, path, shard, into, offset, verify=self.checksum)
            if shard.suspect and not doubted:
                raise OSError(errno.EIO, "a sync of the file failed meanwhile")  # what was read may be what it held before
        except OSError as error:
            raise io_error(error, f"reading block {shard.block.name!r}", path=path, block=shard.block.name) from error
        finally:
            self.release(shard)
        self.read_bytes += len(into)

    async def write(self, block: Block, source: memoryview, old: Shard | None = None) -> Shard:
        """Write a whole payload: in place if `old` is a working shard, else into another file. Not synced.

        Args:
            block: What the bytes are.
            source: `block.nbytes` bytes, best at a page-aligned address; they must not change meanwhile.
            old: The block's present shard. It stays valid if the result is another one: the caller then discards it.

        Raises:
            TierFullError: No room. If that is found before writing, `old` is intact.
            TransferError: The write failed. If `old` was being rewritten it is `broken` now, otherwise intact.
        """
        self._check_open()
        if len(source.cast("B")) != block.nbytes:
            raise ValueError(f"{source.nbytes} bytes are not the payload of {block.name!r}, {block.nbytes}")
        task = asyncio.ensure_future(self._write(block, source, old))
        try:
            return await land(task)
        except asyncio.CancelledError:
            if not task.cancelled() and task.exception() is None and task.result() is not old:
                self.discard(task.result())  # nobody will
            raise

    async def create(self, block: Block) -> ShardWriter:
        """Begin a shard that is written piece by piece, never over an older one.

        Raises:
            TierFullError: No room.
            TransferError: The file could not be made.
        """
        self._check_open()
        task = asyncio.ensure_future(self._create(block, self._relief))
        try:
            return await land(task)
        except asyncio.CancelledError:
            if not task.cancelled() and task.exception() is None:
                await task.result().abort()
            raise

    async def _write(self, block: Block, source: memoryview, old: Shard | None) -> Shard:
        writer = await self._rewrite(block, old) or await self._create(block, self._relief)
        try:
            await writer.write(0, source)
            return await writer.finish()
        except BaseException:
            await writer.abort()
            raise

    async def _rewrite(self, block: Block, old: Shard | None) -> ShardWriter | None:
        """A writer in place, or None where a shard may not be touched; see [Note: What a shard may be used for]."""
        if old is None or not old.working or old.block != block:
            return None
        old.writing = True
        file = old.handle or self.files.file(self.path_of(old), write=True)
        try:
            untouchable = (await file.stat()).links != 1
        except OSError:
            untouchable = True
        if untouchable:
            old.writing = False
            if old.handle is None:
                await _close_quietly(file)
            return None
        old.handle = file
        old.synced = False
        return ShardWriter(self, old, file, in_place=True)

    async def _create(self, block: Block, relief: Relief) -> ShardWriter:
        await self._close_retired()
        try:
            header = await self.files.work(build_header, block)
        except OSError as error:
            raise io_error(error, f"laying out block {block.name!r}", path=self.path, block=block.name) from error
        number = self._next_shard
        self._next_shard += 1
        shard = Shard(block, names.shard_name(block.name, number), number, len(header) + block.nbytes, len(header))
        shard.header_sum = sum_of(header)
        shard.writing = True
        self._shards[shard.file] = shard
        try:
            if not await self._reuse_file(shard):
                await self._make_file(shard, relief)
        except BaseException:
            del self._shards[shard.file]
            raise
        shard.handle = self.files.file(self.path_of(shard), write=True)
        try:
            buffer = aligned_buffer(len(header))
            buffer[:] = header
            await move_all(self.files, shard.handle.write, [Request(0, buffer)])
        except OSError as error:
            shard.hung += under_way(error)
            await self.unwritten(shard, in_place=False)
            raise io_error(error, f"writing block {block.name!r}", path=self.path_of(shard), block=block.name) from error
        return ShardWriter(self, shard, shard.handle, in_place=False)

    async def _reuse_file(self, shard: Shard) -> bool:
        name = self._space.take(shard.file_bytes)
        if name is None:
            return False
        try:
            status = await self.files.stat(self._join(name))
            if not status.regular or status.links != 1 or status.nbytes != shard.file_bytes:
                raise OSError("somebody else's by now")  # e.g. hard-linked by an export: drop our name only
            await self.files.replace(self._join(name), self.path_of(shard))
        except StalledError as error:
            # It may get its new name at any time: that is nobody's from now on, and the file stays counted.
            raise io_error(
                error, f"renaming a file for block {shard.block.name!r}", path=self.path_of(shard), block=shard.block.name
            ) from error
        except OSError as error:
            log.debug("%s is not rewritten: %s", name, error)
            self._space.doom(name, shard.file_bytes)
            return False
        self.reused_files += 1
        return True

    async def _relief(self) -> bool:
        """For who lacks space: wait for what may free some. False: there is nothing to wait for."""
        return False

    async def _make_file(self, shard: Shard, relief: Relief) -> None:
        """Make the file with room for all of it, so that a full drive is found before a byte is written."""
        block = shard.block.name
        await self._space.reserve(shard.file_bytes, relief, what=f"block {block!r}", block=block)
        path = self.path_of(shard)
        while True:
            file = self.files.file(path, write=True)
            try:
                try:
                    await file.create(shard.file_bytes)
                except BaseException:
                    await _close_quietly(file)
                    raise
                await file.close()
                self.created_files += 1
                return
            except OSError as error:
                failure = io_error(error, f"making a file for block {block!r}", path=path, block=block)
                gone = not isinstance(error, StalledError) and await self._unlink_quietly(shard.file)
                if gone and isinstance(failure, TierFullError) and (self._space.pool_bytes or await relief()):
                    await self._space.trim()  # the drive is fuller than the limit knows: give up what only waits
                    continue
                if gone:
                    self._space.give_back(shard.file_bytes)
                raise failure from error

    def written(self, shard: Shard) -> None:
        """A writer finished (for `ShardWriter`)."""
        self.written_bytes += shard.payload_bytes
        if shard.handle is not None and shard.handle.keeps_handle:
            self._handles.pop(shard, None)
            self._handles[shard] = None
        if len(self._handles) > MAX_UNSYNCED_HANDLES:
            oldest = next((candidate for candidate in self._handles if not candidate.writing), None)
            if oldest is not None:
                self._retire_handle(oldest)

    async def unwritten(self, shard: Shard, *, in_place: bool) -> None:
        """A writer gave up (for `ShardWriter`)."""
        shard.writing = False
        self._retire_handle(shard)
        if in_place:
            shard.broken = True
        else:
            shard.discarded = True
            del self._shards[shard.file]
            self._doom(shard)
        await self._close_retired()
        await self._space.trim(self._space.pool_bytes)

    # -- lifetimes ------------------------------------------------------------------------------------------------------

    def retain(self, shard: Shard) -> None:
        """Keep the shard's bytes as they are until `release`. Synchronous."""
        shard.references += 1

    def release(self, shard: Shard) -> None:
        assert shard.references > 0, f"{shard.file} was released more often than retained"
        shard.references -= 1
        if shard.discarded and not shard.references:
            self._let_go(shard)

    def discard(self, shard: Shard) -> None:
        """No block uses the shard as its current copy any more. Its file is let go once nothing refers to it. Synchronous."""
        if shard.discarded or self._closed:
            return
        assert not shard.writing, f"{shard.file} is being written"
        shard.discarded = True
        if not shard.references:
            self._let_go(shard)

    def _let_go(self, shard: Shard) -> None:
        self._retire_handle(shard)
        if self._shards.pop(shard.file, None) is None:
            return
        if shard.broken or shard.suspect:
            self._doom(shard)
        else:
            self._space.offer(shard.file, shard.file_bytes)

    def _doom(self, shard: Shard) -> None:
        """Have the file deleted, once no write that hangs can still change it. Until then its bytes are counted."""
        when_landed(shard.hung, partial(self._space.doom, shard.file, shard.file_bytes))

    def _retire_handle(self, shard: Shard) -> None:
        self._handles.pop(shard, None)
        if shard.handle is not None:
            self._retired.append((shard.handle, shard))
            shard.handle = None

    async def _close_retired(self) -> None:
        while self._retired:
            file, shard = self._retired.pop()
            try:
                await file.close()
            except OSError as error:  # a quota, or a drive over the network, may tell only now of bytes that it did not take
                log.debug("closing a handle of %s failed: %s", shard.file, error)
                if not (shard.synced or shard.discarded):
                    self._suspect(shard)

    # -- durability -----------------------------------------------------------------------------------------------------

    async def _sync_all(self, shards: Iterable[Shard]) -> None:
        """Sync all, a few at once, each however the others fare; then raise the first failure."""
        waiting = iter(shards)
        failures: list[TierstoreError] = []

        async def some() -> None:
            for shard in waiting:
                try:
                    await self._sync(shard)
                except TierstoreError as error:
                    failures.append(error)

        await asyncio.gather(*(some() for _ in range(SYNCS_AT_ONCE)))
        if failures:
            raise failures[0]

    async def _sync(self, shard: Shard) -> None:
        """Make a shard's bytes durable, and close its handle. A failure makes it suspect.

        Raises:
            TransferError, TierFullError: The sync failed.
        """
        if shard.synced:
            return
        self.retain(shard)  # a write that comes meanwhile goes elsewhere
        self._handles.pop(shard, None)
        file = shard.handle or self.files.file(self.path_of(shard), write=True)
        shard.handle = None
        try:
            await file.sync(shard.file_bytes)
            shard.synced = True
        except OSError as error:
            self._suspect(shard)
            raise io_error(error, f"syncing block {shard.block.name!r}", path=self.path_of(shard), block=shard.block.name) from error
        finally:
            await _close_quietly(file)
            self.release(shard)

    def _suspect(self, shard: Shard) -> None:
        """What was written may be lost, and nobody will be told again."""
        shard.suspect = True
        shard.unverified = set(range(num_chunks(shard.payload_bytes))) if shard.chunks is not None else set()
        shard.spare = self.on_suspect(shard)

    async def _relocate(self, shard: Shard) -> None:
        """Move a suspect shard's bytes into a new file. The shard stays the same object, so whoever holds it need not know.

        Raises:
            ShardError: What can be read back is not what was written.
            TierFullError, TransferError: The copy failed; the shard is as it was. Or its user is about to write it anew.
        """
        if shard.spare:
            raise TransferError(
                f"a sync of block {shard.block.name!r} failed while another commit needed its shard ({self.path_of(shard)})",
                remedy="repeat the call: the block is written anew",
                tier="nvme",
                path=self.path_of(shard),
                block=shard.block.name,
            )
        _check_believable(shard, self.path_of(shard))
        writer = await self._create(shard.block, no_relief)  # it is a commit that asks
        # An odd address sends the reads through the page cache, which may hold what the drive did not take.
        buffer = memoryview(bytearray(RELOCATE_BYTES + 1))[1:]
        old = self.files.file(self.path_of(shard))
        try:
            for offset in range(0, shard.payload_bytes, RELOCATE_BYTES):
                piece = buffer[: min(RELOCATE_BYTES, shard.payload_bytes - offset)]
                await move_all(self.files, old.read, [Request(shard.data_start + offset, piece)])
                await writer.write(offset, piece)
            copy = await writer.finish()
        except OSError as error:
            await writer.abort()
            if isinstance(error, TierstoreError):
                raise
            raise io_error(error, f"copying block {shard.block.name!r}", path=self.path_of(shard), block=shard.block.name) from error
        except BaseException:
            await writer.abort()
            raise
        finally:
            await _close_quietly(old)
        if shard.chunks is not None and copy.chunks is not None and copy.chunks != shard.chunks:
            self.discard(copy)
            problem = "a sync failed, and what can be read back is not what was written"
            raise damage(shard, self.path_of(shard), problem, remedy=REWRITE)
        self._swap_files(shard, copy)

    def _swap_files(self, shard: Shard, copy: Shard) -> None:
        """Let `shard` be the file of `copy`, which nobody holds, and have its own deleted."""
        del self._shards[shard.file], self._shards[copy.file]
        self._space.doom(shard.file, shard.file_bytes)
        shard.file, shard.number, shard.file_bytes, shard.data_start = copy.file, copy.number, copy.file_bytes, copy.data_start
        shard.header_sum, shard.chunks, shard.digest, shard.unverified = copy.header_sum, copy.chunks, copy.digest, copy.unverified
        shard.synced = shard.suspect = shard.spare = False
        shard.handle, copy.handle = copy.handle, None
        if copy in self._handles:
            del self._handles[copy]
            self._handles[shard] = None
        self._shards[shard.file] = shard

    # -- small things ---------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the directory {self.path} is closed", remedy="open another store", path=self.path)

    def _join(self, name: str) -> str:
        return os.path.join(self.path, name)

    async def _unlink_quietly(self, name: str) -> bool:
        """Whether the file is gone."""
        try:
            await self.files.unlink(self._join(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("could not delete %s in %s: %s", name, self.path, error)
            return False
        return True


def _check_believable(shard: Shard, path: str) -> None:
    """Without checksums nothing tells what a failed sync has dropped.

    Raises:
        ShardError: It may be anything.
    """
    if shard.suspect and shard.chunks is None:
        raise damage(shard, path, "a sync failed, and without checksums nobody knows what was lost", remedy=REWRITE)


async def _close_quietly(file: File) -> None:
    try:
        await file.close()
    except OSError as error:
        log.debug("closing a handle failed: %s", error)
