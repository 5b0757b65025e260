"""The machine's own file system.

[Note: Two ways to move bytes]
Where the system has positional reads and writes, payloads go straight between the drive and the caller's memory, past the page
cache when the directory accepts that, from a small pool of threads per direction; the calls release the GIL. Elsewhere (and
when asked, so that Linux can test what Windows gets) each request opens a handle of its own through aiofiles: see
`tierstore.nvme.portable`. Small files go through aiofiles on every system.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat as stat_flags
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from functools import partial
from typing import Any, Literal, TypeVar

from tierstore.catalog import PAGE
from tierstore.errors import OptionError
from tierstore.nvme import windows
from tierstore.nvme.files import FULL, File, FileStat, Lock, Outcome, Request, aligned_buffer, is_aligned, land
from tierstore.nvme.locks import take_lock
from tierstore.nvme.names import PROBE_NAME
from tierstore.nvme.portable import StreamFile, opened
from tierstore.nvme.system import FILE_MODE, Posix, System, can_bypass_cache, close_quietly
from tierstore.threads import StalledError, Threads, Watch

log = logging.getLogger(__name__)

T = TypeVar("T")

DIRECTORY_MODE = 0o700
SYNC_THREADS = 16
_PREADV: Any = getattr(os, "preadv", None)
_PWRITEV: Any = getattr(os, "pwritev", None)
_FICLONE = 0x40049409
"""Linux's request for a reflink (`linux/fs.h`)."""
_SLOWEST_BYTES_PER_S = 8e6
"""A sync, or making a file, may take as long as a drive this slow needs for the file's bytes, beyond the stall limit."""


def native() -> tuple[System, bool]:
    """This machine's system, and whether it has only the portable path."""
    return windows.system() if sys.platform == "win32" else Posix(), _PREADV is None


def _file_stat(status: os.stat_result) -> FileStat:
    mode = status.st_mode
    return FileStat(status.st_size, status.st_nlink, stat_flags.S_ISREG(mode), stat_flags.S_ISDIR(mode), status.st_mtime_ns)


class LocalFiles:
    """The machine's own file system. Methods may be called from any loop; blocking work runs on threads owned here.

    Args:
        threads: I/O threads of each kind: "read", "write" and "other" never queue behind one another. For "sync" there are
            `SYNC_THREADS`, as a journal takes the syncs that are under way together at once.
        portable: Take the portable path. None: only where positional I/O is missing.
        system: Whose calls to make. None: this machine's.
    """

    def __init__(self, *, threads: int = 4, portable: bool | None = None, system: System | None = None) -> None:
        here, only_portable = native()
        self.portable = only_portable if portable is None else portable
        self.system = system or (here if self.portable else Posix())
        self.direct = False
        self.syncs_directories = self.system.syncs_directories and not self.portable
        self.num_threads = threads
        self._watch = Watch()
        self._executors: dict[str, Threads] = {}

    def executor(self, kind: str) -> Executor:
        """The threads of a kind, started when first needed."""
        return self._pool(kind)

    def _pool(self, kind: str) -> Threads:
        if kind not in self._executors:
            count = SYNC_THREADS if kind == "sync" else self.num_threads
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
        self.direct = False
        if direct_io is False:
            return
        refusal = await self._direct_refusal(directory)
        self.direct = refusal is None
        if refusal is not None and direct_io is True:
            raise OptionError(
                "direct_io=True, but the directory refuses direct I/O",
                need="a file system that can be read and written past its cache",
                have=refusal,
                remedy="use direct_io='auto', or a directory on a local drive",
                path=directory,
            )
        if refusal is not None:
            log.warning("direct I/O is not available in %s (%s): using ordinary I/O", directory, refusal)

    async def _direct_refusal(self, directory: str) -> str | None:
        """Why direct I/O does not work here, or None: a page is written and read back, since an open that succeeds proves little."""
        if self.portable and not self.system.streams_directly:
            return "the portable path has no direct I/O"
        if not self.portable and not can_bypass_cache():
            return "this system has no O_DIRECT"
        path = os.path.join(directory, PROBE_NAME)
        page, back = aligned_buffer(PAGE), aligned_buffer(PAGE)
        page[:] = bytes(range(256)) * (PAGE // 256)
        file = self._payload_file(path, write=True)
        self.direct = True
        try:
            try:
                await file.create(PAGE)
                await _moved(file.write([Request(0, page)]))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                await _moved(file.read([Request(0, back)]))  # no room to try it out in: that such a handle is given has to do
                return None
            await _moved(file.read([Request(0, back)]))
            return None if back == page else "a page read back differed from the page written"
        except OSError as error:
            return f"a trial transfer: {error.strerror or error}"
        finally:
            self.direct = False
            with contextlib.suppress(OSError):  # else the next opening removes it
                await file.close()
                await self._do(self.system.unlink, path)

    async def direct_read_refusal(self, path: str) -> str | None:
        """Why a file that is there cannot be read past the page cache, or None. Of these files `direct` is set."""
        if self.portable and not self.system.streams_directly:
            return "the portable path has no direct I/O"
        if not self.portable and not can_bypass_cache():
            return "this system has no O_DIRECT"
        file = self._payload_file(path, write=False)
        try:
            await _moved(file.read([Request(0, aligned_buffer(PAGE))]))
        except OSError as error:
            return f"a trial read: {error.strerror or error}"
        finally:
            await file.close()
        return None

    def file(self, path: str, *, write: bool = False) -> File:
        return self._payload_file(path, write=write)

    def _payload_file(self, path: str, *, write: bool) -> File:
        return StreamFile(self, path) if self.portable else _PositionalFile(self, path, write)

    async def load(self, path: str, nbytes: int) -> bytes:
        async def whole() -> bytes:
            data = bytearray()
            async with opened(self, path, "rb", "read") as handle:
                while len(data) < nbytes and (piece := await handle.read(nbytes - len(data))):
                    data += piece
            return bytes(data)

        return await land(whole())

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        async def whole() -> None:
            left = memoryview(data)
            async with opened(self, path, "wb", "other") as handle:
                while left:
                    left = left[await handle.write(left) :]
                if sync:
                    await self.work(self.system.sync, handle.fileno())

        await land(whole())

    async def _do(self, call: Callable[..., T], *args: Any) -> T:
        """Make a call that fails on Windows while somebody else has the file open, and be patient then. Cancelled, it is not made."""
        return await windows.patiently(lambda: self.work(call, *args))

    async def replace(self, source: str, target: str) -> None:
        await self._do(self.system.replace, source, target)

    async def link(self, source: str, target: str) -> None:
        link = partial(os.link, follow_symlinks=False) if os.link in os.supports_follow_symlinks else os.link
        await self.work(link, self.system.given(source), self.system.given(target))

    async def clone(self, source: str, target: str) -> None:
        await self.work(_clone, self.system.given(source), self.system.given(target))

    async def unlink(self, path: str) -> None:
        await self._do(self.system.unlink, path)

    async def stat(self, path: str) -> FileStat:
        return _file_stat(await self.work(os.lstat, self.system.given(path)))

    async def listdir(self, path: str) -> list[str]:
        return await self.work(os.listdir, self.system.given(path))

    async def scan(self, path: str) -> dict[str, FileStat]:
        return await self.work(_scan, self.system.given(path))

    async def make_directory(self, path: str) -> None:
        for changed in await self.work(_make_directories, self.system.given(path)):
            await self.sync_directory(changed)

    async def remove_directory(self, path: str) -> None:
        await self.work(os.rmdir, self.system.given(path))

    async def sync_directory(self, path: str) -> None:
        if self.syncs_directories:
            await self.work(self.system.sync_directory, path)

    async def disk_free(self, path: str) -> int:
        return (await self.work(shutil.disk_usage, self.system.given(path))).free

    def lock(self, path: str) -> Lock | None:
        return take_lock(self.system.given(path))

    def draw_identity(self) -> str:
        return secrets.token_hex(8)


class _PositionalFile:
    """One handle for any number of requests at once, opened when first needed."""

    keeps_handle = True

    def __init__(self, files: LocalFiles, path: str, write: bool) -> None:
        self._files = files
        self._path = path
        self._clean = not write
        self._flags = os.O_RDWR if write else os.O_RDONLY
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
        self._clean = False
        return await self._files.on_threads("write", [partial(self._move, _PWRITEV, request) for request in requests])

    async def stat(self) -> FileStat:
        return _file_stat(await self._files.work(lambda: self._with_descriptor(os.fstat)))

    async def sync(self, nbytes: int = 0) -> None:
        await self._files.work(lambda: self._with_descriptor(self._files.system.sync), nbytes=nbytes, kind="sync")
        self._clean = True

    async def close(self) -> None:
        if self._clean:
            self._close()  # nothing to write back, so it does not block
        else:
            await self._files.work(self._close)

    def forget(self) -> None:
        for descriptor in self._descriptors.values():
            close_quietly(descriptor)
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
                descriptor = self._files.system.open(self._path, self._flags | os.O_CREAT | os.O_EXCL)
                self._descriptors[False] = descriptor
            self._files.system.make_room(descriptor, nbytes)

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
                    self._descriptors[direct] = self._files.system.open(self._path, self._flags, direct=direct)
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


async def _moved(moving: Awaitable[list[Outcome]]) -> None:
    """Raise what became of the one request, if that is an error."""
    (outcome,) = await moving
    if isinstance(outcome, BaseException):
        raise outcome


def _scan(path: str) -> dict[str, FileStat]:
    found = {}
    for name in os.listdir(path):
        with contextlib.suppress(FileNotFoundError):  # a store is at work here, and somebody else looks
            found[name] = _file_stat(os.lstat(os.path.join(path, name)))
    return found


if sys.platform == "linux":
    import fcntl

    def _clone(source: str, target: str) -> None:
        source_descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            target_descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, FILE_MODE)
            try:
                fcntl.ioctl(target_descriptor, _FICLONE, source_descriptor)
            except OSError:
                os.unlink(target)
                raise
            finally:
                os.close(target_descriptor)
        finally:
            os.close(source_descriptor)

else:

    def _clone(source: str, target: str) -> None:
        raise OSError(errno.ENOTSUP, "this system has no reflinks that Python could ask for")


def _make_directories(path: str) -> list[str]:
    """Make a directory and those that lead to it. Returns where names were added, innermost first."""
    changed: list[str] = []
    missing = path
    while not os.path.lexists(missing) and missing != os.path.dirname(missing):  # a drive of Windows may be missing altogether
        missing = os.path.dirname(missing)
        changed.append(missing)
    os.makedirs(path, DIRECTORY_MODE)
    return changed
