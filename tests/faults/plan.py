"""Faults to order: the n-th operation of a kind fails in a chosen way, once or until it is healed.

Files fail behind the `Files` protocol, copies between the memory tiers behind `Copies`, and the threads that serve callers'
copies behind their pool. What happens beneath, threads included, is the real thing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tierstore.mover.engine import Engine
from tierstore.mover.streams import Report, ThreadCopies
from tierstore.nvme.files import File, FileStat, Operation, Outcome, Request
from tierstore.nvme.local import LocalFiles
from tierstore.requests import Action, Order
from tierstore.threads import NoThreadError, Threads

CODES = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}

FAULTS = {
    "read": ("EIO", "EINTR", "short", "end", "no thread"),
    "write": ("EIO", "ENOSPC", "EINTR", "short", "no thread"),
    "create": ("EIO", "ENOSPC"),
    "stat": ("EIO",),
    "sync": ("EIO", "ENOSPC"),
    "save": ("EIO", "ENOSPC"),
    "replace": ("EIO",),
    "unlink": ("EIO",),
    "sync_directory": ("EIO",),
    "h2d": ("torn", "no thread", "killed"),
    "d2h": ("torn", "no thread", "killed"),
    "compact": ("no thread", "killed"),
    "host": ("no thread", "killed"),
}
"""What can happen to an operation of each kind."""

INVISIBLE = {("read", "EINTR"), ("read", "short"), ("write", "EINTR"), ("write", "short"), ("stat", "EIO"), ("unlink", "EIO")} | {
    ("compact", fault) for fault in FAULTS["compact"]
}
"""What no caller may ever hear of."""


@dataclass(frozen=True)
class Strike:
    """The fault that befalls the operation of this kind with this number, and, if `lasting`, all that follow until healed."""

    kind: str
    number: int
    fault: str
    lasting: bool = False


@dataclass
class Plan:
    """Counts operations, and says which fails.

    Attributes:
        counts: Operations so far, by kind.
        done: Those of the workload itself.
        healed: The fault that was there before.
        struck: What was struck, each as the block's name where there is one, else the file's.
    """

    strike: Strike | None = None
    healed: Strike | None = None
    counts: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    struck: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, kind: str, of: str) -> str | None:
        """Called by each operation before it begins."""
        with self._lock:
            number = self.counts[kind]
            self.counts[kind] += 1
            strike = self.strike
            if strike is None or strike.kind != kind or number < strike.number:
                return None
            if number > strike.number and (not strike.lasting or strike.fault == "EINTR"):  # interrupted for ever is hung
                return None
            self.struck.append(of)
            return strike.fault

    def check(self, kind: str, path: str) -> None:
        """Of an operation on files that knows no half measures."""
        fault = self.fault(kind, os.path.basename(path))
        if fault is not None:
            raise OSError(CODES[fault], os.strerror(CODES[fault]))

    def heal(self) -> None:
        with self._lock:
            self.healed = self.strike or self.healed
            self.strike = None


class FaultyFiles(LocalFiles):
    """The machine's files, under a plan."""

    def __init__(self, plan: Plan, *, portable: bool | None = None) -> None:
        super().__init__(portable=portable)
        self.plan = plan

    def file(self, path: str, *, write: bool = False) -> File:
        return _FaultyFile(self.plan, super().file(path, write=write), path)

    async def save(self, path: str, data: bytes, *, sync: bool) -> None:
        self.plan.check("save", path)
        await super().save(path, data, sync=sync)

    async def replace(self, source: str, target: str) -> None:
        self.plan.check("replace", target)
        await super().replace(source, target)

    async def unlink(self, path: str) -> None:
        self.plan.check("unlink", path)
        await super().unlink(path)

    async def sync_directory(self, path: str) -> None:
        self.plan.check("sync_directory", os.path.join(path, "CURRENT"))
        await super().sync_directory(path)


class _FaultyFile:
    def __init__(self, plan: Plan, file: File, path: str) -> None:
        self.keeps_handle = file.keeps_handle
        self._plan = plan
        self._file = file
        self._path = path

    async def create(self, nbytes: int) -> None:
        self._plan.check("create", self._path)
        await self._file.create(nbytes)

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._move("read", self._file.read, requests)

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        return await self._move("write", self._file.write, requests)

    async def _move(self, kind: str, move: Operation, requests: Sequence[Request]) -> list[Outcome]:
        fault = self._plan.fault(kind, os.path.basename(self._path))
        if fault is None:
            return await move(requests)
        half = [Request(r.offset, r.buffer[: max(1, len(r.buffer) // 2)]) for r in requests]
        if fault == "short":
            return await move(half)
        if fault == "EINTR":
            return [InterruptedError(errno.EINTR, "interrupted") for _ in requests]
        if fault == "no thread":
            return [NoThreadError(errno.EAGAIN, "can't start new thread") for _ in requests]
        await move(half)  # what fails may have moved some
        if fault == "end":
            return [0 for _ in requests]
        return [OSError(CODES[fault], os.strerror(CODES[fault])) for _ in requests]

    async def stat(self) -> FileStat:
        self._plan.check("stat", self._path)
        return await self._file.stat()

    async def sync(self, nbytes: int = 0) -> None:
        self._plan.check("sync", self._path)
        await self._file.sync(nbytes)

    async def close(self) -> None:
        await self._file.close()

    def forget(self) -> None:
        self._file.forget()


class FaultyThreads(Threads):
    """A pool whose n-th call finds no thread, or one that dies before it makes the call."""

    def __init__(self, plan: Plan, kind: str, pool: Threads) -> None:
        super().__init__(f"faulty-{kind}", 2)
        self._plan = plan
        self._kind = kind
        self._pool = pool

    def start(self, call: Callable[[], Any], patience_s: float = 0.0) -> Future[Any]:
        return befall(self._plan.fault(self._kind, ""), self._pool, call)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._pool.shutdown(wait, cancel_futures=cancel_futures)
        super().shutdown(wait, cancel_futures=cancel_futures)


def befall(fault: str | None, pool: Threads, call: Callable[[], Any]) -> Future[Any]:
    if fault == "no thread":
        raise NoThreadError(errno.EAGAIN, "can't start new thread")
    if fault == "killed":

        def die() -> None:
            raise OSError(errno.EIO, "the thread was killed")

        return pool.start(die)
    return pool.start(call)


class FaultyCopies(ThreadCopies):
    """Copies between the memory tiers, under a plan. Made from those of an engine."""

    def __init__(self, plan: Plan, real: ThreadCopies) -> None:
        self.__dict__.update(real.__dict__)
        self._plan = plan

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        kind = order.action.value
        fault = self._plan.fault(kind, order.record.block.name if order.record is not None else "")
        if fault is None:
            super().start(order, ordered, done)
            return
        pools = self._pools
        if fault == "torn":
            pools[order.action].submit(self._tear, order, done)
            return
        action = Action.D2H if order.action is Action.D2H else Action.H2D
        once = _Once(fault, pools[action])
        self._pools = {**pools, action: once}
        try:
            super().start(order, ordered, done)
        finally:
            self._pools = pools

    def _tear(self, order: Order, done: Report) -> None:
        """Half of the bytes arrive, the other half is rubbish."""
        half = order.nbytes // 2
        gpu = self._device.tensor[order.offset_gpu : order.offset_gpu + order.nbytes]
        ram = self._host.tensor[order.offset_ram : order.offset_ram + order.nbytes]
        target, source = (gpu, ram) if order.action is Action.H2D else (ram, gpu)
        target[:half].copy_(source[:half])
        target[half:].fill_(0xA5)
        done(order, OSError(errno.EIO, "half of it was copied"))


class _Once(Threads):
    """A pool that fails each call in one way."""

    def __init__(self, fault: str, pool: Threads) -> None:
        super().__init__("faulty", 1)
        self._fault = fault
        self._pool = pool

    def start(self, call: Callable[[], Any], patience_s: float = 0.0) -> Future[Any]:
        return befall(self._fault, self._pool, call)


def put_under(plan: Plan, engine: Engine) -> None:
    """Have what moves in memory follow the plan too."""
    assert isinstance(engine.copies, ThreadCopies)
    with engine.lock:
        engine.copies = FaultyCopies(plan, engine.copies)
        engine._hosts = FaultyThreads(plan, "host", engine._hosts)


def block_of(struck: str) -> str | None:
    """The block concerned, by what a shard's name says; None where it is another file."""
    if not struck.endswith((".safetensors", ".json", ".tmp")) and struck != "CURRENT":
        return struck or None
    return struck.removeprefix("block-").rsplit("-", 1)[0] if struck.startswith("block-") else None
