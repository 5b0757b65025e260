"""The portable path: a handle of its own for each request, through aiofiles, which has no positional reads.

[Note: Hops]
Each call of a handle is a hop to a thread and back. At most as many requests of one operation are under way as there are threads:
more would open all their files first, read into all their buffers then, and sum bytes that have long left the cache. The handle is
put at its offset while it is opened, which saves a hop.

[Note: What a sync sees]
The handle that wrote is closed by the time of the sync. Linux tells a failed write-back to the first handle that asks after it, also
one opened later, if it has not forgotten the file meanwhile; on Windows nothing is left to be written back by then
(`tierstore.nvme.windows`, [Note: Errors of late writes on Windows]).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Literal

from aiofiles.threadpool import wrap

from tierstore.nvme.files import FileStat, Outcome, Request, is_aligned, land
from tierstore.nvme.system import close_quietly
from tierstore.nvme.windows import patiently
from tierstore.threads import StalledError, under_way

if TYPE_CHECKING:
    from aiofiles.threadpool.binary import AsyncFileIO

    from tierstore.nvme.local import LocalFiles

MAX_CALL_BYTES = 1 << 30
"""Moved by one call: a C runtime that counts in 32 bits would cut more to an odd length, which direct I/O refuses."""


@contextlib.asynccontextmanager
async def opened(
    files: LocalFiles, path: str, mode: Literal["rb", "r+b", "xb", "wb"], kind: str, *, offset: int = 0, direct: bool = False
) -> AsyncIterator[AsyncFileIO]:
    """An unbuffered handle, its calls made on the threads of a kind; closed there, too, unless a call on it hangs."""
    given_up = False

    def opener(path: str, flags: int) -> int:
        descriptor = files.system.open(path, flags, direct=direct)
        try:
            if given_up:
                raise StalledError(0.0)  # nobody hears it
            if offset:
                os.lseek(descriptor, offset, os.SEEK_SET)
        except BaseException:
            close_quietly(descriptor)
            raise
        return descriptor

    loop, executor = asyncio.get_running_loop(), files.executor(kind)
    try:
        raw = await patiently(lambda: loop.run_in_executor(executor, open_raw, path, mode, opener))
    except StalledError:
        given_up = True
        raise
    handle: AsyncFileIO = wrap(raw, loop=loop, executor=executor)
    try:
        yield handle
    except StalledError as error:
        _close_later(raw, under_way(error))
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            await handle.close()
        raise
    await handle.close()


def open_raw(path: str, mode: str, opener: Callable[[str, int], int]) -> io.FileIO:
    """As `aiofiles.open` would open it; but what comes or returns too late has to be closed by whoever is left then."""
    return io.FileIO(path, mode, opener=opener)


def _close_later(raw: io.FileIO, calls: Sequence[Future[None]]) -> None:
    """Once these have returned: before that, somebody else's file could get the descriptor that they use."""
    if calls:
        calls[0].add_done_callback(lambda _: _close_later(raw, calls[1:]))
        return
    with contextlib.suppress(OSError):
        raw.close()


class StreamFile:
    """A file whose requests open it one by one."""

    keeps_handle = False

    def __init__(self, files: LocalFiles, path: str) -> None:
        self._files = files
        self._path = path

    async def create(self, nbytes: int) -> None:
        async def whole() -> None:
            async with opened(self._files, self._path, "xb", "other") as handle:
                await self._files.work(self._files.system.make_room, handle.fileno(), nbytes, nbytes=nbytes)

        await land(whole())

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        return await land(self._move("read", requests))

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        return await land(self._move("write", requests))

    async def _move(self, kind: Literal["read", "write"], requests: Sequence[Request]) -> list[Outcome]:
        """A few at once; see [Note: Hops]. After one was given up, those that have not begun are not made."""
        outcomes: list[Outcome] = [StalledError(0.0)] * len(requests)
        waiting = iter(enumerate(requests))
        stalled = False

        async def some() -> None:
            nonlocal stalled
            for index, request in waiting:
                try:
                    outcomes[index] = await self._one(kind, request)
                except asyncio.CancelledError:
                    raise
                except BaseException as error:
                    outcomes[index] = error
                    stalled = stalled or isinstance(error, StalledError)
                if stalled:
                    return

        await asyncio.gather(*(some() for _ in range(min(self._files.num_threads, len(requests)))))
        return outcomes

    async def _one(self, kind: Literal["read", "write"], request: Request) -> int:
        direct = self._files.direct and is_aligned(request.offset, request.buffer)
        async with opened(self._files, self._path, "rb" if kind == "read" else "r+b", kind, offset=request.offset, direct=direct) as handle:
            piece = request.buffer[:MAX_CALL_BYTES]
            count = await (handle.readinto(piece) if kind == "read" else handle.write(piece)) or 0
            if request.then is not None and count == len(request.buffer):
                await asyncio.get_running_loop().run_in_executor(self._files.executor(kind), request.then, request.buffer)
            return count

    async def stat(self) -> FileStat:
        return await self._files.stat(self._path)

    async def sync(self, nbytes: int = 0) -> None:
        """See [Note: What a sync sees]."""

        async def whole() -> None:
            async with opened(self._files, self._path, "r+b", "sync") as handle:
                await self._files.work(self._files.system.sync, handle.fileno(), nbytes=nbytes, kind="sync")

        await land(whole())

    async def close(self) -> None:
        pass

    def forget(self) -> None:
        pass
