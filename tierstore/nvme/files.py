"""The only door to the file system.

Everything the NVMe tier does to a disk goes through `Files`, so that a test can put a disk of its own behind it: one that
tears writes, runs full or forgets what was not synced. `LocalFiles` is the real one.

[Note: Two ways to move bytes]
Where the system has positional reads and writes, payloads go straight between the drive and the caller's memory, with
O_DIRECT when the directory accepts it, from a small pool of threads per direction; the calls release the GIL. Elsewhere (and
when asked, so that Linux can test what Windows gets) each request opens a handle of its own through aiofiles. Small files go
through aiofiles on every system.

[Note: Bytes in flight]
A thread that reads into a buffer cannot be called back. Cancelling a task here therefore takes effect only when the thread
is done: `land` waits first and raises `CancelledError` then, so that no caller can reuse memory that is still being filled.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import mmap
import os
import shutil
import stat as stat_flags
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import aiofiles
import filelock

from tierstore.catalog import PAGE
from tierstore.errors import OptionError

log = logging.getLogger(__name__)

T = TypeVar("T")
Then = Callable[[memoryview], object]
"""Work to do on a buffer in the I/O thread, while its bytes are still in that core's cache."""

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_PREADV: Any = getattr(os, "preadv", None)
_PWRITEV: Any = getattr(os, "pwritev", None)
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system answers to a request it does not know."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """What the file system says of one name; symbolic links are not followed.

    Attributes:
        nbytes: The file's length.
        links: Names the file has; more than one means that somebody else may rely on its bytes.
        regular: A plain file: no link, directory or device.
        directory: A directory.
    """

    nbytes: int
    links: int
    regular: bool
    directory: bool


class Lock(Protocol):
    """A held lock. `release` lets others in; `forget` drops a forked child's copy and leaves the parent's alone."""

    def release(self) -> None: ...
    def forget(self) -> None: ...


class File(Protocol):
    """One file's payload. Nothing is opened before the first operation. All offsets and lengths are bytes.

    Operations raise `OSError` and may move fewer bytes than asked; `move_all` repeats them.

    Attributes:
        keeps_handle: A handle stays open from the first operation until `close`.
    """

    keeps_handle: bool

    async def create(self, nbytes: int) -> None:
        """Make the file, which must not exist, with room for `nbytes`; ENOSPC here rather than later where that is possible."""
        ...

    async def read(self, offset: int, into: memoryview, then: Then | None = None) -> int:
        """Read up to `len(into)` bytes; `then(into)` runs in the I/O thread if all of them came. 0 means end of file."""
        ...

    async def write(self, offset: int, source: memoryview, then: Then | None = None) -> int:
        """Write up to `len(source)` bytes; `then(source)` runs in the I/O thread if all of them went."""
        ...

    async def stat(self) -> FileStat: ...
    async def sync(self) -> None: ...
    async def close(self) -> None: ...

    def forget(self) -> None:
        """Close what a forked child inherited. Never fails."""
        ...


class Files(Protocol):
    """Operations on names. All raise `OSError`; all paths are absolute.

    Attributes:
        direct: Payloads bypass the page cache.
        syncs_directories: `sync_directory` makes renames durable here.
    """

    direct: bool
    syncs_directories: bool

    async def probe(self, directory: str, direct_io: bool | Literal["auto"]) -> None:
        """Find out whether the directory takes direct I/O, and set `direct`. Raises OptionError if True was asked and refused."""
        ...

    def file(self, path: str, *, write: bool = False) -> File: ...

    async def load(self, path: str, nbytes: int) -> bytes:
        """The first `nbytes` of a small file, or all of it if it is shorter."""
        ...

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        """Replace a small file's contents in place, and sync them."""
        ...

    async def replace(self, source: str, target: str) -> None: ...
    async def unlink(self, path: str) -> None: ...
    async def stat(self, path: str) -> FileStat: ...
    async def listdir(self, path: str) -> list[str]: ...
    async def make_directory(self, path: str) -> None: ...
    async def sync_directory(self, path: str) -> None: ...
    async def disk_free(self, path: str) -> int: ...

    def lock(self, path: str) -> Lock | None:
        """Take the lock file, at once; None when another store holds it."""
        ...

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        """Run pure work on an I/O thread."""
        ...

    def close(self) -> None:
        """End the threads. Waits for what is under way."""
        ...


async def land(awaitable: Awaitable[T]) -> T:
    """Await to the end even if this task is cancelled meanwhile, then pass the cancellation on. See [Note: Bytes in flight]."""
    future = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return future.result()
    if not future.cancelled():
        future.exception()  # retrieved, so that the loop does not report it as lost
    raise cancelled


async def land_all(awaitables: Sequence[Awaitable[object]]) -> None:
    """Await all to their end, then raise the first failure or the cancellation. Nothing is under way afterwards."""
    if len(awaitables) == 1:
        await awaitables[0]
        return
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    cancelled: asyncio.CancelledError | None = None
    pending = set(futures)
    while pending:
        try:
            _, pending = await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    failures = [failure for future in futures if not future.cancelled() and (failure := future.exception()) is not None]
    if cancelled is not None:
        raise cancelled
    if failures:
        raise failures[0]
    if any(future.cancelled() for future in futures):
        raise asyncio.CancelledError


Operation = Callable[[int, memoryview, Then | None], Awaitable[int]]
"""`File.read` or `File.write`."""


async def move_all(files: Files, operation: Operation, offset: int, buffer: memoryview, then: Then | None = None) -> None:
    """Repeat a read or write until every byte of `buffer` has moved and `then` has seen it.

    Raises:
        OSError: The system's own, or EIO where the file ended early.
    """
    done = 0
    while done < len(buffer):
        try:
            count = await operation(offset + done, buffer[done:], then if done == 0 else None)
        except InterruptedError:
            continue
        if count <= 0:
            raise OSError(errno.EIO, f"the file ended after {done} of {len(buffer)} bytes at offset {offset}")
        if count == len(buffer):
            return  # at the first attempt, so `then` has run
        done += count
    if then is not None:
        await files.work(then, buffer)


def aligned_buffer(nbytes: int) -> memoryview:
    """Zeroed memory that direct I/O accepts, of at least one page."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def is_aligned(offset: int, buffer: memoryview) -> bool:
    """Whether direct I/O can take this request: offset, length and address multiples of 4096."""
    if offset % PAGE or len(buffer) % PAGE or buffer.readonly:
        return False  # the address of read-only memory cannot be had without copying
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0


def _open_no_follow(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_FOLLOW, FILE_MODE)


def _file_stat(status: os.stat_result) -> FileStat:
    return FileStat(status.st_size, status.st_nlink, stat_flags.S_ISREG(status.st_mode), stat_flags.S_ISDIR(status.st_mode))


class _FileLock:
    """A held `filelock` lock. filelock itself closes a forked child's copy without unlocking the parent's."""

    def __init__(self, held: filelock.BaseFileLock) -> None:
        self._held: filelock.BaseFileLock | None = held

    def release(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None

    def forget(self) -> None:
        self._held = None


class LocalFiles:
    """The machine's own file system. Methods may be called from any loop; blocking work runs on threads owned here.

    Args:
        threads: I/O threads per direction; reads never queue behind writes.
        portable: Take the portable path. None: only where positional I/O is missing.
    """

    def __init__(self, *, threads: int = 4, portable: bool | None = None) -> None:
        self.portable = _PREADV is None if portable is None else portable
        self.direct = False
        self.syncs_directories = os.name == "posix" and not self.portable
        self._threads = threads
        self._executors: dict[str, ThreadPoolExecutor] = {}

    def executor(self, kind: str) -> Executor:
        """The threads for "read" or "write", started when first needed."""
        if kind not in self._executors:
            self._executors[kind] = ThreadPoolExecutor(self._threads, thread_name_prefix=f"tierstore-{kind}")
        return self._executors[kind]

    async def on_thread(self, kind: str, call: Callable[..., T], *args: Any) -> T:
        return await land(asyncio.get_running_loop().run_in_executor(self.executor(kind), call, *args))

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        return await self.on_thread("write", call, *args)

    def close(self) -> None:
        for executor in self._executors.values():
            executor.shutdown()
        self._executors.clear()

    async def probe(self, directory: str, direct_io: bool | Literal["auto"]) -> None:
        if direct_io not in (True, False, "auto"):
            raise OptionError("direct_io is not an option the store knows", need="True, False or 'auto'", have=repr(direct_io))
        if direct_io is False:
            self.direct = False
            return
        refusal = "the portable path has no direct I/O" if self.portable else await self.work(_direct_refusal, directory)
        self.direct = refusal is None
        if refusal is not None and direct_io is True:
            raise OptionError(
                "direct_io=True, but the directory refuses direct I/O",
                need="a file system that takes O_DIRECT",
                have=refusal,
                remedy="use direct_io='auto', or a directory on a local drive",
                path=directory,
            )
        if refusal is not None:
            log.warning("direct I/O is not available in %s (%s): using ordinary I/O", directory, refusal)

    def file(self, path: str, *, write: bool = False) -> File:
        return _StreamFile(self, path) if self.portable else _PositionalFile(self, path, write)

    async def load(self, path: str, nbytes: int) -> bytes:
        async def whole() -> bytes:
            async with aiofiles.open(path, "rb", opener=_open_no_follow, executor=self.executor("read")) as handle:
                return await handle.read(nbytes)

        return await land(whole())

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        async def whole() -> None:
            async with aiofiles.open(path, "wb", opener=_open_no_follow, executor=self.executor("write")) as handle:
                await handle.write(data)
                await handle.flush()
                if sync:
                    await self.work(os.fsync, handle.fileno())

        await land(whole())

    async def replace(self, source: str, target: str) -> None:
        await self.work(os.replace, source, target)

    async def unlink(self, path: str) -> None:
        await self.work(os.unlink, path)

    async def stat(self, path: str) -> FileStat:
        return _file_stat(await self.work(os.lstat, path))

    async def listdir(self, path: str) -> list[str]:
        return await self.work(os.listdir, path)

    async def make_directory(self, path: str) -> None:
        await self.work(os.makedirs, path, DIRECTORY_MODE)
        if self.syncs_directories:
            await self.sync_directory(os.path.dirname(path))

    async def sync_directory(self, path: str) -> None:
        if self.syncs_directories:
            await self.work(_sync_directory, path)

    async def disk_free(self, path: str) -> int:
        return (await self.work(shutil.disk_usage, path)).free

    def lock(self, path: str) -> Lock | None:
        held = filelock.FileLock(path, timeout=0, mode=FILE_MODE, thread_local=False)
        try:
            held.acquire()
        except filelock.Timeout:
            return None
        return _FileLock(held)


class _PositionalFile:
    """One handle for any number of requests at once, opened when first needed."""

    keeps_handle = True

    def __init__(self, files: LocalFiles, path: str, write: bool) -> None:
        self._files = files
        self._path = path
        self._flags = (os.O_RDWR if write else os.O_RDONLY) | _NO_FOLLOW
        self._descriptors: dict[bool, int] = {}  # by whether direct
        self._opening = threading.Lock()

    async def create(self, nbytes: int) -> None:
        await self._files.on_thread("write", self._create, nbytes)

    async def read(self, offset: int, into: memoryview, then: Then | None = None) -> int:
        return await self._files.on_thread("read", self._move, _PREADV, offset, into, then)

    async def write(self, offset: int, source: memoryview, then: Then | None = None) -> int:
        return await self._files.on_thread("write", self._move, _PWRITEV, offset, source, then)

    async def stat(self) -> FileStat:
        return _file_stat(await self._files.work(lambda: os.fstat(self._any_descriptor())))

    async def sync(self) -> None:
        await self._files.work(lambda: os.fsync(self._any_descriptor()))

    async def close(self) -> None:
        await self._files.work(self._close)

    def forget(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = {}

    def _move(self, call: Callable[[int, list[memoryview], int], int], offset: int, buffer: memoryview, then: Then | None) -> int:
        direct = self._files.direct and is_aligned(offset, buffer)
        count = call(self._descriptor(direct), [buffer], offset)
        if then is not None and count == len(buffer):
            then(buffer)
        return count

    def _create(self, nbytes: int) -> None:
        with self._opening:
            descriptor = os.open(self._path, self._flags | os.O_CREAT | os.O_EXCL, FILE_MODE)
            self._descriptors[False] = descriptor
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        os.ftruncate(descriptor, nbytes)

    def _descriptor(self, direct: bool) -> int:
        with self._opening:
            if direct not in self._descriptors:
                self._descriptors[direct] = os.open(self._path, self._flags | ((_DIRECT or 0) if direct else 0))
            return self._descriptors[direct]

    def _any_descriptor(self) -> int:
        return self._descriptor(True in self._descriptors and False not in self._descriptors)

    def _close(self) -> None:
        with self._opening:
            descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)


class _StreamFile:
    """A handle of its own for each request, through aiofiles, which has no positional reads."""

    keeps_handle = False

    def __init__(self, files: LocalFiles, path: str) -> None:
        self._files = files
        self._path = path

    async def create(self, nbytes: int) -> None:
        async def whole() -> None:
            async with aiofiles.open(self._path, "xb", 0, opener=_open_no_follow, executor=self._files.executor("write")) as handle:
                await handle.truncate(nbytes)

        await land(whole())

    async def read(self, offset: int, into: memoryview, then: Then | None = None) -> int:
        async def whole() -> int:
            async with aiofiles.open(self._path, "rb", 0, opener=_open_no_follow, executor=self._files.executor("read")) as handle:
                await handle.seek(offset)
                count = await handle.readinto(into) or 0
            if then is not None and count == len(into):
                await self._files.on_thread("read", then, into)
            return count

        return await land(whole())

    async def write(self, offset: int, source: memoryview, then: Then | None = None) -> int:
        async def whole() -> int:
            async with aiofiles.open(self._path, "r+b", 0, opener=_open_no_follow, executor=self._files.executor("write")) as handle:
                await handle.seek(offset)
                count = await handle.write(source)
            if then is not None and count == len(source):
                await self._files.on_thread("write", then, source)
            return count

        return await land(whole())

    async def stat(self) -> FileStat:
        return await self._files.stat(self._path)

    async def sync(self) -> None:
        async def whole() -> None:
            async with aiofiles.open(self._path, "r+b", 0, opener=_open_no_follow, executor=self._files.executor("write")) as handle:
                await self._files.work(os.fsync, handle.fileno())

        await land(whole())

    async def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


PROBE_NAME = "tierstore.probe"


def _direct_refusal(directory: str) -> str | None:
    """Why direct I/O does not work here, or None: a page is written and read back, since an open that succeeds proves little."""
    if _DIRECT is None:
        return "this system has no O_DIRECT"
    path = os.path.join(directory, PROBE_NAME)
    page = aligned_buffer(PAGE)
    page[:] = bytes(range(256)) * (PAGE // 256)
    back = aligned_buffer(PAGE)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW | _DIRECT, FILE_MODE)
    except OSError as error:
        _unlink_if_there(path)
        return f"opening: {error.strerror}"
    try:
        if _PWRITEV(descriptor, [page], 0) != PAGE or _PREADV(descriptor, [back], 0) != PAGE or back != page:
            return "a page read back differed from the page written"
    except OSError as error:
        return f"a trial transfer: {error.strerror}"
    finally:
        os.close(descriptor)
        _unlink_if_there(path)
    return None


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
