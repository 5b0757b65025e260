"""The machine's own file system.

[Note: Two ways to move bytes]
Where the system has positional reads and writes, payloads go straight between the drive and the caller's memory, with
O_DIRECT when the directory accepts it, from a small pool of threads per direction; the calls release the GIL. Elsewhere (and
when asked, so that Linux can test what Windows gets) each request opens a handle of its own through aiofiles. Small files go
through aiofiles on every system.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import stat as stat_flags
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import aiofiles
import filelock

from tierstore.catalog import PAGE
from tierstore.errors import OptionError
from tierstore.nvme.files import File, FileStat, Lock, Outcome, Request, aligned_buffer, is_aligned, land
from tierstore.nvme.names import PROBE_NAME
from tierstore.threads import StalledError, Threads, Watch

if TYPE_CHECKING:
    from aiofiles.base import AiofilesContextManager
    from aiofiles.threadpool.binary import AsyncFileIO

log = logging.getLogger(__name__)

T = TypeVar("T")

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700
SYNC_THREADS = 16
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_PREADV: Any = getattr(os, "preadv", None)
_PWRITEV: Any = getattr(os, "pwritev", None)
_SLOWEST_BYTES_PER_S = 8e6
"""A sync, or making a file, may take as long as a drive this slow needs for the file's bytes, beyond the stall limit."""
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What a file system answers to a request it does not know."""


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
        threads: I/O threads of each kind: "read", "write" and "other" never queue behind one another. For "sync" there are
            `SYNC_THREADS`, as a journal takes the syncs that are under way together at once.
        portable: Take the portable path. None: only where positional I/O is missing.
    """

    def __init__(self, *, threads: int = 4, portable: bool | None = None) -> None:
        self.portable = _PREADV is None if portable is None else portable
        self.direct = False
        self.syncs_directories = os.name == "posix" and not self.portable
        self._threads = threads
        self._watch = Watch()
        self._executors: dict[str, Threads] = {}

    def executor(self, kind: str) -> Executor:
        """The threads of a kind, started when first needed."""
        return self._pool(kind)

    def _pool(self, kind: str) -> Threads:
        if kind not in self._executors:
            count = SYNC_THREADS if kind == "sync" else self._threads
            self._executors[kind] = Threads(f"tierstore-{kind}", count, self._watch)
        return self._executors[kind]

    async def on_threads(self, kind: str, calls: Sequence[Callable[[], int]]) -> list[Outcome]:
        """Make all calls, each on a thread, and wake this loop once, when the last has ended or was given up.

        After one was given up, those that have not begun are not made.
        """
        if not calls:
            return []
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Outcome]] = loop.create_future()
        outcomes: list[Outcome] = [StalledError(0.0)] * len(calls)
        futures: list[Future[int]] = []
        left = len(calls)
        counting = threading.Lock()

        def note(index: int, outcome: Outcome) -> None:
            nonlocal left
            outcomes[index] = outcome
            with counting:
                left -= 1
                last = left == 0
            if last:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(done.set_result, outcomes)

        def ended(index: int, future: Future[int]) -> None:
            try:
                note(index, future.result())
            except CancelledError:
                note(index, StalledError(0.0))
            except BaseException as error:
                note(index, error)
                if isinstance(error, StalledError):
                    for other in futures:
                        other.cancel()

        pool = self._pool(kind)
        for index, call in enumerate(calls):
            try:
                future = pool.start(call)
            except Exception as error:  # no thread to be had; what has begun is waited for
                note(index, error)
            else:
                futures.append(future)
                future.add_done_callback(partial(ended, index))
        return await land(done)

    async def work(self, call: Callable[..., T], *args: Any, nbytes: int = 0, kind: str = "other") -> T:
        """Make a call on a thread.

        Args:
            call, args: What blocks.
            nbytes: Bytes that the system may have to write for it.
            kind: Of the thread.
        """
        future = self._pool(kind).start(partial(call, *args), nbytes / _SLOWEST_BYTES_PER_S)
        return await land(asyncio.wrap_future(future))

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
            async with aiofiles.open(path, "wb", opener=_open_no_follow, executor=self.executor("other")) as handle:
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

    async def scan(self, path: str) -> dict[str, FileStat]:
        return await self.work(lambda: {name: _file_stat(os.lstat(os.path.join(path, name))) for name in os.listdir(path)})

    async def make_directory(self, path: str) -> None:
        for changed in await self.work(_make_directories, path):
            await self.sync_directory(changed)

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
        self._write = write
        self._flags = (os.O_RDWR if write else os.O_RDONLY) | _NO_FOLLOW
        self._descriptors: dict[bool, int] = {}  # by whether direct
        self._opening = threading.Lock()  # may be held by a call that hangs
        self._counting = threading.Lock()
        self._in_use = 0  # calls that have a descriptor, which nobody else's file may get meanwhile
        self._closing = False

    async def create(self, nbytes: int) -> None:
        await self._files.work(self._create, nbytes, nbytes=nbytes)

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._files.on_threads("read", [partial(self._move, _PREADV, request) for request in requests])

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._files.on_threads("write", [partial(self._move, _PWRITEV, request) for request in requests])

    async def stat(self) -> FileStat:
        return _file_stat(await self._files.work(lambda: self._with_descriptor(os.fstat)))

    async def sync(self) -> None:
        nbytes = (await self.stat()).nbytes
        await self._files.work(lambda: self._with_descriptor(os.fsync), nbytes=nbytes, kind="sync")

    async def close(self) -> None:
        if self._write:
            await self._files.work(self._close)
        else:
            self._close()  # nothing to write back, so it does not block

    def forget(self) -> None:
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = {}

    def _move(self, call: Callable[[int, list[memoryview], int], int], request: Request) -> int:
        direct = self._files.direct and is_aligned(request.offset, request.buffer)
        count = self._with_descriptor(lambda descriptor: call(descriptor, [request.buffer], request.offset), direct)
        if request.then is not None and count == len(request.buffer):
            request.then(request.buffer)
        return count

    def _create(self, nbytes: int) -> None:
        with self._using():
            with self._opening:
                descriptor = os.open(self._path, self._flags | os.O_CREAT | os.O_EXCL, FILE_MODE)
                self._descriptors[False] = descriptor
            _make_room(descriptor, nbytes)

    def _with_descriptor(self, call: Callable[[int], T], direct: bool | None = None) -> T:
        """Make a call that blocks.

        Args:
            call: Takes the descriptor, which stays open until it returns, also if it hangs and the file is closed.
            direct: Whether for direct I/O; None: any.
        """
        with self._using():
            with self._opening:
                if direct is None:
                    direct = True in self._descriptors and False not in self._descriptors
                if direct not in self._descriptors:
                    self._descriptors[direct] = os.open(self._path, self._flags | ((_DIRECT or 0) if direct else 0))
                descriptor = self._descriptors[direct]
            return call(descriptor)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """No descriptor is closed meanwhile; the last to leave after `_close` closes them."""
        with self._counting:
            self._in_use += 1
        try:
            yield
        finally:
            with self._counting:
                self._in_use -= 1
                if self._closing and not self._in_use:
                    self._close_descriptors()

    def _close(self) -> None:
        with self._counting:
            self._closing = True
            if not self._in_use:
                self._close_descriptors()

    def _close_descriptors(self) -> None:
        """With nobody using them."""
        self._closing = False
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)


def _make_room(descriptor: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            return
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
    os.ftruncate(descriptor, nbytes)


class _StreamFile:
    """A handle of its own for each request, through aiofiles, which has no positional reads."""

    keeps_handle = False

    def __init__(self, files: LocalFiles, path: str) -> None:
        self._files = files
        self._path = path

    async def create(self, nbytes: int) -> None:
        async def whole() -> None:
            async with self._open("xb", "other") as handle:
                await handle.truncate(nbytes)

        await land(whole())

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        async def one(request: Request) -> int:
            async with self._open("rb", "read") as handle:
                await handle.seek(request.offset)
                return await self._end("read", request, await handle.readinto(request.buffer) or 0)

        return await land(asyncio.gather(*map(one, requests), return_exceptions=True))

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        async def one(request: Request) -> int:
            async with self._open("r+b", "write") as handle:
                await handle.seek(request.offset)
                return await self._end("write", request, await handle.write(request.buffer))

        return await land(asyncio.gather(*map(one, requests), return_exceptions=True))

    async def _end(self, kind: str, request: Request, count: int) -> int:
        if request.then is not None and count == len(request.buffer):
            await asyncio.get_running_loop().run_in_executor(self._files.executor(kind), request.then, request.buffer)
        return count

    def _open(self, mode: Literal["rb", "r+b", "xb"], kind: str) -> AiofilesContextManager[AsyncFileIO]:
        return aiofiles.open(self._path, mode, 0, opener=_open_no_follow, executor=self._files.executor(kind))

    async def stat(self) -> FileStat:
        return await self._files.stat(self._path)

    async def sync(self) -> None:
        async def whole() -> None:
            async with self._open("r+b", "other") as handle:
                await self._files.work(os.fsync, handle.fileno(), nbytes=(await self.stat()).nbytes)

        await land(whole())

    async def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


def _make_directories(path: str) -> list[str]:
    """Make a directory and those that lead to it. Returns where names were added, innermost first."""
    changed: list[str] = []
    missing = path
    while not os.path.lexists(missing):
        missing = os.path.dirname(missing)
        changed.append(missing)
    os.makedirs(path, DIRECTORY_MODE)
    return changed


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
