"""The only door to the file system.

Everything the NVMe tier does to a disk goes through `Files`, so that a test can put a disk of its own behind it: one that
tears writes, runs full or forgets what was not synced. The real one is `tierstore.nvme.local.LocalFiles`.

[Note: Bytes in flight]
A thread that reads into a buffer cannot be called back. Cancelling a task here therefore takes effect only when the thread
is done: `land` waits first and raises `CancelledError` then, so that no caller can reuse memory that is still being filled.
The one exception is a thread that hangs: it is given up with `StalledError`, and who gets that must keep the memory out of use.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from tierstore.catalog import PAGE
from tierstore.threads import StalledError

T = TypeVar("T")

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a drive without room answers."""

Then = Callable[[memoryview], object]
"""Work to do on a buffer in the I/O thread, while its bytes are still in that core's cache."""


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of a payload to move.

    Attributes:
        offset: Bytes from the file's start.
        buffer: What to fill, or what to write.
        then: Runs on `buffer` in the I/O thread if every byte moved at the first attempt.
    """

    offset: int
    buffer: memoryview
    then: Then | None = None


Outcome = int | BaseException
"""Bytes moved, which may be fewer than asked (0: end of file), or the failure of the request or its `then`."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """What the file system says of one name; symbolic links are not followed.

    Attributes:
        nbytes: The file's length.
        links: Names the file has; more than one means that somebody else may rely on its bytes.
        regular: A plain file: no link, directory or device.
        directory: A directory.
        modified_ns: When it was last written, in ns since 1970; 0 if that is not known.
    """

    nbytes: int
    links: int
    regular: bool
    directory: bool
    modified_ns: int = 0


class Lock(Protocol):
    """A held lock. `release` lets others in; `forget` drops a forked child's copy and leaves the parent's alone."""

    def release(self) -> None: ...
    def forget(self) -> None: ...


class File(Protocol):
    """One file's payload. Nothing is opened before the first operation. All offsets and lengths are bytes.

    Operations raise `OSError`. Reads and writes may move fewer bytes than asked; `move_all` repeats them.

    Attributes:
        keeps_handle: A handle stays open from the first operation until `close`.
    """

    keeps_handle: bool

    async def create(self, nbytes: int) -> None:
        """Make the file, which must not exist, with room for `nbytes`; ENOSPC here rather than later where that is possible."""
        ...

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        """Start all requests, and return when all have ended: what became of each."""
        ...

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        """Likewise."""
        ...

    async def stat(self) -> FileStat: ...

    async def sync(self, nbytes: int = 0) -> None:
        """Make what was written durable.

        Args:
            nbytes: The most that may have to be written for it: it may take as long as a slow drive needs for that.
        """
        ...

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

    async def link(self, source: str, target: str) -> None:
        """Give a file a second name, which must not be there yet."""
        ...

    async def clone(self, source: str, target: str) -> None:
        """Make a file, which must not be there yet, of the same bytes that takes no space until either is changed (a reflink).

        Raises ENOTSUP, or whatever else the system says, where there is no such thing. Nothing is left then.
        """
        ...

    async def unlink(self, path: str) -> None: ...
    async def stat(self, path: str) -> FileStat: ...
    async def listdir(self, path: str) -> list[str]: ...

    async def scan(self, path: str) -> dict[str, FileStat]:
        """Every name in a directory, and what it is: one call, however many they are. Names that vanish meanwhile are left out."""
        ...

    async def make_directory(self, path: str) -> None: ...
    async def remove_directory(self, path: str) -> None: ...
    async def sync_directory(self, path: str) -> None: ...
    async def disk_free(self, path: str) -> int: ...

    def lock(self, path: str) -> Lock | None:
        """Take the lock file, at once; None when another store holds it."""
        ...

    def draw_identity(self) -> str:
        """64 random bits as sixteen hexadecimal digits, which tell a new store from every other."""
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
    raise cancelled from (None if future.cancelled() else _stall_of(future))


def _stall_of(future: asyncio.Future[Any]) -> BaseException | None:
    """What was given up, if that is how it ended: who is cancelled meanwhile must know of it too, see `under_way`."""
    error = future.exception()  # retrieved, so that the loop does not report it as lost
    if error is None and isinstance(future.result(), list):
        return all_stalled(future.result())
    return error


def all_stalled(outcomes: Iterable[object]) -> StalledError | None:
    """One error for all calls among these that were given up; None if there are none."""
    stalled = [outcome for outcome in outcomes if isinstance(outcome, StalledError)]
    if not stalled:
        return None
    return StalledError(max(one.seconds for one in stalled), tuple(call for one in stalled for call in one.landed))


def when_landed(calls: Sequence[Future[None]], then: Callable[[], object]) -> None:
    """Have the running loop call `then` once every call has returned that was given up, if ever. At once if there are none."""
    if not calls:
        then()
        return
    loop = asyncio.get_running_loop()
    left = len(calls)

    def one_more() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then()

    def soon(_: Future[None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody cares any more
            loop.call_soon_threadsafe(one_more)

    for call in calls:
        call.add_done_callback(soon)


Operation = Callable[[Sequence[Request]], Awaitable[list[Outcome]]]
"""`File.read` or `File.write`."""


async def move_all(files: Files, operation: Operation, requests: Sequence[Request]) -> None:
    """Repeat reads or writes until every byte has moved and every `then` has seen its buffer. Nothing is under way afterwards.

    Raises:
        OSError: The system's own, or EIO where the file ended early.
        StalledError: The system did not answer, and may still use the buffers; see there.
        Exception: Whatever a `then` raised.
    """
    left = list(requests)
    whole = {request.offset + len(request.buffer): request for request in requests}  # by where it ends
    while left:
        again: list[Request] = []
        failures: list[BaseException] = []
        for request, outcome in zip(left, await operation(left), strict=True):
            if isinstance(outcome, InterruptedError):
                again.append(request)
            elif isinstance(outcome, BaseException):
                failures.append(outcome)
            elif outcome <= 0:
                problem = f"the file ended at {request.offset}, {len(request.buffer)} bytes early"
                failures.append(OSError(errno.EIO, problem))
            elif outcome < len(request.buffer):
                again.append(Request(request.offset + outcome, request.buffer[outcome:]))
            elif request.then is None and (then := whole[request.offset + outcome].then) is not None:
                await files.work(then, whole[request.offset + outcome].buffer)  # it came in pieces
        if failures:
            raise all_stalled(failures) or failures[0]
        left = again


def aligned_buffer(nbytes: int) -> memoryview:
    """Zeroed memory that direct I/O accepts, of at least one page."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1)))[:nbytes]


def is_aligned(offset: int, buffer: memoryview) -> bool:
    """Whether direct I/O can take this request: offset, length and address multiples of 4096."""
    if offset % PAGE or len(buffer) % PAGE or buffer.readonly:
        return False  # the address of read-only memory cannot be had without copying
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0
