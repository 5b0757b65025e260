"""A simulated drive: files in memory, requests that take simulated time and end in an order of the world's choice.

`Disk` is what the drive holds; `SimulatedFiles` the door to it. Bytes that are read land when the request completes, and the buffer
is poison until then; bytes that are written are taken when it completes, and must not have changed since it began.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.simulation.links import POISON, Pace
from tests.simulation.world import BrokenPromiseError, World
from tierstore.nvme.files import File, FileStat, Lock, Outcome, Request, land
from tierstore.threads import StalledError

T = TypeVar("T")

LATE_NS = 300_000
"""How long a request hangs after it was given up, at least, and half of the most."""


class Disk:
    """What a drive holds, by path. Survives the worlds that use it.

    Every change goes through one of these methods, so that a disk that forgets what was not synced overrides them: see
    `tests.crash.disk.CrashDisk`.

    Attributes:
        journaled: Directories cannot be synced.
        on_replace: Called with the disk and the new name after every `replace`.
    """

    def __init__(self, *, journaled: bool = False) -> None:
        self.journaled = journaled
        self.files: dict[str, bytearray] = {}
        self.directories: set[str] = set()
        self.locked: set[str] = set()
        self.num_identities = 0  # stores that were made on it
        self.on_replace: Callable[[Disk, str], None] = lambda disk, name: None

    def get(self, path: str) -> bytearray:
        try:
            return self.files[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None

    def create(self, path: str, nbytes: int) -> None:
        if path in self.files:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.files[path] = bytearray(nbytes)

    def write(self, path: str, offset: int, data: bytes) -> None:
        content = self.get(path)
        if offset + len(data) > len(content):
            content.extend(bytes(offset + len(data) - len(content)))
        content[offset : offset + len(data)] = data

    def save(self, path: str, data: bytes) -> None:
        self.files[path] = bytearray(data)

    def replace(self, source: str, target: str) -> None:
        self.files[target] = self.get(source)
        del self.files[source]
        self.on_replace(self, target)

    def unlink(self, path: str) -> None:
        self.get(path)
        del self.files[path]

    def sync(self, path: str) -> None:
        self.get(path)

    def sync_directory(self, path: str) -> None:
        pass

    def touch(self, path: str) -> None:
        """Make an empty file if there is none."""
        self.files.setdefault(path, bytearray())

    def links(self, path: str) -> int:
        """Names that the file has."""
        return 1

    def fail(self, change: Change) -> None:
        """A change is about to fail: what the drive does all the same, or drops."""


@dataclass(frozen=True)
class Change:
    """What an operation does to the disk: a method of `Disk` and its arguments, the path first."""

    doing: str
    args: tuple[Any, ...]

    @property
    def path(self) -> str:
        return str(self.args[0])

    @property
    def name(self) -> str:
        return name_of(self.path)

    def __str__(self) -> str:
        return f"{self.doing} {self.name}"

    def carry_out(self, disk: Disk) -> None:
        getattr(disk, self.doing)(*self.args)


class SimulatedFiles:
    """See `tierstore.nvme.files.Files`.

    Attributes:
        world: None: everything ends at once, as while a store is opened.
        under_way: Requests that have not completed.
        changes: What those of them do to the disk that change it, in the order in which they began; requests that hang as well.
        num_hanging: Requests that were given up, and are still to touch their memory. has_hung: One ever was.
        num_faults: Operations that were made to fail.
        syncs_fail: Those of shards may. Without checksums nothing of such a shard can be believed any more, and its block may be lost.
    """

    direct = False

    def __init__(self, disk: Disk, pace: Pace) -> None:
        self.disk = disk
        self.syncs_directories = not disk.journaled
        self.world: World | None = None
        self.under_way = 0
        self.changes: dict[int, tuple[Change, ...]] = {}
        self.num_hanging = 0
        self.has_hung = False
        self.num_faults = 0
        self.syncs_fail = True
        self._pace = pace
        self._free_ns = {"read": 0, "write": 0}
        self._numbers = itertools.count()

    # -- time and faults ---------------------------------------------------------------------------------------------------------

    async def elapse(
        self,
        what: str,
        complete: Callable[[], T],
        *,
        nbytes: int = 0,
        link: str = "",
        fault: int = 0,
        changes: tuple[Change, ...] = (),
    ) -> T:
        """Let an operation take its time; `complete` is carried out when it is over. Cancelling waits for that.

        Args:
            what: For the history.
            complete: What is done, `changes` among it.
            nbytes, link: How much it moves, and on which link.
            fault: The error to fail with, now and then, instead; 0 for never.
            changes: What it does to the disk.
        """
        world = self.world
        if world is None:
            return complete()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        loop = future.get_loop()
        failing = bool(fault) and self.strikes()
        begin = max(world.clock.now_ns(), self._free_ns.get(link, 0))
        end = begin + self._pace.duration_ns(world, nbytes)
        if link:
            self._free_ns[link] = begin + int(nbytes / self._pace.bytes_per_s * 1e9)
        self.under_way += 1
        number = self.begin(changes)

        def happen() -> None:
            self.under_way -= 1
            self.changes.pop(number, None)
            try:
                if failing:
                    for change in changes:
                        self.disk.fail(change)
                    raise OSError(fault, os.strerror(fault))
                result = complete()
            except BrokenPromiseError:
                raise
            except Exception as error:
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, result)

        world.at(end, f"{what}: {os.strerror(fault)}" if failing else what, happen)
        return await land(future)

    async def change(self, what: str, *changes: Change, fault: int) -> None:
        """An operation that does nothing but change the disk."""

        def complete() -> None:
            for change in changes:
                change.carry_out(self.disk)

        await self.elapse(what, complete, fault=fault, changes=changes)

    def begin(self, changes: tuple[Change, ...]) -> int:
        """These are under way, until they are taken out of `changes` under the number that is returned."""
        number = next(self._numbers)
        if changes:
            self.changes[number] = changes
        return number

    def strikes(self, doing: str = "", path: str = "") -> bool:
        """Whether a fault comes now."""
        name = name_of(path).removeprefix("block-").split("-")[0]
        if self.world is None or not self._pace.fails(self.world, doing, name):
            return False
        self.num_faults += 1
        return True

    def is_stuck(self, doing: str, path: str) -> bool:
        return self._pace.stuck is not None and self._pace.stuck == (doing, name_of(path).removeprefix("block-").split("-")[0])

    def stall(self, what: str, late: Callable[[], None], change: Change | None = None) -> StalledError:
        """A request is given up; `late` happens some time later, when the system comes back to it after all, and does `change`."""
        world = self.world
        assert world is not None
        landed: Future[None] = Future()
        self.num_hanging += 1
        self.has_hung = True
        number = self.begin((change,) if change is not None else ())

        def happen() -> None:
            self.num_hanging -= 1
            self.changes.pop(number, None)
            late()
            landed.set_result(None)

        world.after(LATE_NS + world.jitter(LATE_NS), what, happen)
        return StalledError(60.0, (landed,))

    # -- the protocol ------------------------------------------------------------------------------------------------------------

    async def probe(self, directory: str, direct_io: bool | Literal["auto"]) -> None:
        pass

    def file(self, path: str, *, write: bool = False) -> File:
        return SimulatedFile(self, path)

    async def load(self, path: str, nbytes: int) -> bytes:
        return await self.elapse(f"load {name_of(path)}", lambda: bytes(self.disk.get(path)[:nbytes]), fault=errno.EIO)

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        syncing = (Change("sync", (path,)),) if sync else ()
        await self.change(f"save {name_of(path)}", Change("save", (path, data)), *syncing, fault=errno.ENOSPC)

    async def replace(self, source: str, target: str) -> None:
        await self.change(f"replace {name_of(target)}", Change("replace", (source, target)), fault=errno.EIO)

    async def unlink(self, path: str) -> None:
        await self.change(f"unlink {name_of(path)}", Change("unlink", (path,)), fault=errno.EIO)

    async def stat(self, path: str) -> FileStat:
        def complete() -> FileStat:
            if path in self.disk.directories:
                return FileStat(4096, 1, regular=False, directory=True)
            return FileStat(len(self.disk.get(path)), self.disk.links(path), regular=True, directory=False)

        return await self.elapse(f"stat {name_of(path)}", complete)

    async def listdir(self, path: str) -> list[str]:
        return [name_of(file) for file in self.disk.files if os.path.dirname(file) == path]

    async def scan(self, path: str) -> dict[str, FileStat]:
        return {name: await self.stat(os.path.join(path, name)) for name in await self.listdir(path)}

    async def make_directory(self, path: str) -> None:
        self.disk.directories.add(path)

    async def sync_directory(self, path: str) -> None:
        if self.syncs_directories:
            await self.change("sync the directory", Change("sync_directory", (path,)), fault=errno.EIO)

    async def disk_free(self, path: str) -> int:
        return 1 << 40

    def lock(self, path: str) -> Lock | None:
        if path in self.disk.locked:
            return None
        self.disk.locked.add(path)
        self.disk.touch(path)
        return _Lock(self.disk, path)

    def draw_identity(self) -> str:
        """A different one each time, and in each run the same."""
        self.disk.num_identities += 1
        return f"{self.disk.num_identities:016x}"

    async def work(self, call: Callable[..., T], *args: Any) -> T:
        return await self.elapse(f"work {getattr(call, '__name__', 'on a buffer')}", lambda: call(*args))

    def close(self) -> None:
        if self.under_way:
            raise BrokenPromiseError(f"the files are closed with {self.under_way} requests under way")


class _Lock:
    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path

    def release(self) -> None:
        self._disk.locked.discard(self._path)

    def forget(self) -> None:
        pass


@dataclass(frozen=True)
class _Fate:
    """What becomes of a request: bytes that move, the error it fails with, whether it hangs."""

    most: int
    error: int = 0
    stalls: bool = False

    def strike(self) -> None:
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


class SimulatedFile:
    """See `tierstore.nvme.files.File`."""

    keeps_handle = True

    def __init__(self, files: SimulatedFiles, path: str) -> None:
        self._files = files
        self._path = path

    async def create(self, nbytes: int) -> None:
        await self._files.change(f"create {name_of(self._path)}", Change("create", (self._path, nbytes)), fault=errno.ENOSPC)

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        return await land(asyncio.gather(*map(self._read, requests), return_exceptions=True))

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        return await land(asyncio.gather(*map(self._write, requests), return_exceptions=True))

    async def _read(self, request: Request) -> int:
        files, target = self._files, request.buffer
        target[:] = bytes([POISON]) * len(target)
        fate = self._fate("read", len(target), errno.EIO)

        def complete() -> int:
            if bytes(target).count(POISON) != len(target):
                raise BrokenPromiseError(f"the buffer of a read from {name_of(self._path)} was written before the bytes had landed")
            if fate.stalls:
                raise self._read_late(request)
            fate.strike()
            data = files.disk.get(self._path)[request.offset : request.offset + fate.most]
            target[: len(data)] = data
            if request.then is not None and len(data) == len(target):
                request.then(target)
            return len(data)

        return await files.elapse(self._what("read", request, fate), complete, nbytes=len(target), link="read")

    def _read_late(self, request: Request) -> StalledError:
        """The read is given up, and lands after all, some time later. Nobody may have used the buffer for anything else until then."""
        files, nbytes = self._files, len(request.buffer)
        memory = request.buffer.obj  # keeps it mapped, though the view may be gone by then
        address = ctypes.addressof(ctypes.c_char.from_buffer(request.buffer))

        def land_late() -> None:
            assert memory is not None
            if ctypes.string_at(address, nbytes).count(POISON) != nbytes:
                raise BrokenPromiseError(f"the buffer of a read from {name_of(self._path)} that hung was used for something else")
            ctypes.memset(address, POISON ^ 0xFF, nbytes)

        return files.stall(f"read {name_of(self._path)} after all", land_late)

    async def _write(self, request: Request) -> int:
        files, source = self._files, request.buffer
        before = bytes(source)
        fate = self._fate("write", len(source), errno.ENOSPC)
        change = Change("write", (self._path, request.offset, before[: fate.most]))
        late = Change("write", (self._path, request.offset, bytes([POISON]) * len(before)))

        def complete() -> int:
            if bytes(source) != before:
                raise BrokenPromiseError(f"what is written to {name_of(self._path)} changed before the write had completed")
            if fate.stalls:
                raise files.stall(f"write {name_of(self._path)} after all", write_late, late)
            fate.strike()
            change.carry_out(files.disk)
            if request.then is not None and fate.most == len(source):
                request.then(source)
            return fate.most

        def write_late() -> None:
            """Whatever the memory holds by then: the file must not be trusted any more."""
            if self._path in files.disk.files:
                late.carry_out(files.disk)

        what = self._what("write", request, fate)
        return await files.elapse(what, complete, nbytes=len(before), link="write", changes=(change,))

    def _fate(self, doing: str, nbytes: int, code: int) -> _Fate:
        """All bytes move as a rule; else an error, an interruption, a short count or a call that hangs."""
        if not self._files.strikes(doing, self._path):
            return _Fate(nbytes)
        if self._files.is_stuck(doing, self._path):
            return _Fate(nbytes, code)
        assert self._files.world is not None
        kind = self._files.world.decisions.draw(5)
        if kind == 4:
            return _Fate(nbytes, stalls=True)
        return _Fate(max(1, nbytes // 2)) if kind == 3 else _Fate(nbytes, (code, errno.EIO, errno.EINTR)[kind])

    def _what(self, doing: str, request: Request, fate: _Fate) -> str:
        nbytes = len(request.buffer)
        became = ": hangs" if fate.stalls else f": {os.strerror(fate.error)}" if fate.error else ""
        became = became or (f": only {fate.most}" if fate.most != nbytes else "")
        return f"{doing} {name_of(self._path)} [{request.offset}+{nbytes}]{became}"

    async def stat(self) -> FileStat:
        return await self._files.stat(self._path)

    async def sync(self, nbytes: int = 0) -> None:
        fault = errno.EIO if self._files.syncs_fail else 0
        await self._files.change(f"sync {name_of(self._path)}", Change("sync", (self._path,)), fault=fault)

    async def close(self) -> None:
        pass

    def forget(self) -> None:
        pass


def name_of(path: str) -> str:
    return os.path.basename(path)
