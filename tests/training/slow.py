"""Stores whose drive and copies take time of a simulated clock, and nothing else does: what waits for what is then certain."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from tests.patience import PATIENCE_S
from tierstore import TierStore
from tierstore.catalog import PAGE
from tierstore.clock import SimulatedClock
from tierstore.mover.budget import slot_bytes
from tierstore.mover.streams import Report, ThreadCopies
from tierstore.nvme.files import File, FileStat, Outcome, Request
from tierstore.nvme.local import LocalFiles
from tierstore.requests import Order

MS = 1_000_000


class SharedClock(SimulatedClock):
    """One that several threads may advance."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def advance(self, duration_ns: int) -> None:
        with self._lock:
            super().advance(duration_ns)


class SlowFiles(LocalFiles):
    """The machine's files, on a drive of a given speed.

    Attributes:
        read_rate, write_rate: Bytes per second of the clock.
        gate: While it is cleared, writes do not begin.
    """

    def __init__(self, clock: SimulatedClock, read_rate: float, write_rate: float) -> None:
        super().__init__()
        self.clock = clock
        self.read_rate = read_rate
        self.write_rate = write_rate
        self.gate = threading.Event()
        self.gate.set()

    def file(self, path: str, *, write: bool = False) -> File:
        return _SlowFile(self, super().file(path, write=write))


class _SlowFile:
    def __init__(self, files: SlowFiles, file: File) -> None:
        self.keeps_handle = file.keeps_handle
        self._files = files
        self._file = file

    async def create(self, nbytes: int) -> None:
        await self._file.create(nbytes)

    async def read(self, requests: Sequence[Request]) -> list[Outcome]:
        self._take(requests, self._files.read_rate)
        return await self._file.read(requests)

    async def write(self, requests: Sequence[Request]) -> list[Outcome]:
        await asyncio.to_thread(self._files.gate.wait, PATIENCE_S)
        self._take(requests, self._files.write_rate)
        return await self._file.write(requests)

    def _take(self, requests: Sequence[Request], rate: float) -> None:
        self._files.clock.advance(round(sum(len(request.buffer) for request in requests) / rate * 1e9))

    async def stat(self) -> FileStat:
        return await self._file.stat()

    async def sync(self, nbytes: int = 0) -> None:
        await self._file.sync(nbytes)

    async def close(self) -> None:
        await self._file.close()

    def forget(self) -> None:
        self._file.forget()


class SlowCopies(ThreadCopies):
    """Copies that take their time. Made from those of an engine.

    Attributes:
        rate: Bytes per second of the clock; None: no time.
        run_ahead_ns: Spent at the cap on leases in flight, by each lease that ends, as on a GPU that is behind.
    """

    def __init__(self, clock: SimulatedClock, real: ThreadCopies) -> None:
        self.__dict__.update(real.__dict__)
        self.clock = clock
        self.rate: float | None = None
        self.run_ahead_ns = 0

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        if self.rate is not None and order.record is not None:
            self.clock.advance(round(order.nbytes / self.rate * 1e9))
        super().start(order, ordered, done)

    def release(self, offsets: object) -> int:
        self.clock.advance(self.run_ahead_ns)
        return self.run_ahead_ns


class SlowStore:
    """A store, the clock that it and the loop live by, and how fast its links are."""

    def __init__(self, store: TierStore, clock: SharedClock, files: SlowFiles, copies: SlowCopies) -> None:
        self.store = store
        self.clock = clock
        self.files = files
        self.copies = copies

    def put(self, num_blocks: int, nbytes: int, tier: str = "ram") -> list[str]:
        names = [f"b{number}" for number in range(num_blocks)]
        for name in names:
            self.store.put(name, torch.zeros(nbytes // 4), tier=tier)
        return names

    def use(self, name: str, *, write: bool = False) -> None:
        with self.store.use(name, write=write, timeout=PATIENCE_S):
            pass


@contextmanager
def opened(
    path: Path,
    *,
    gpu_bytes: int,
    ram_bytes: int,
    nvme: bool = True,
    read_rate: float = 7e9,
    write_rate: float = 7e9,
    direct: bool | None = True,
) -> Iterator[SlowStore]:
    """Open one. `lru` fetches nothing ahead, so that whoever misses a block waits for it.

    Args:
        gpu_bytes, ram_bytes: Room for blocks.
        direct: What `stats().direct_io` says, whatever this machine's file system takes; None: the truth.
    """
    clock = SharedClock()
    files = SlowFiles(clock, read_rate, write_rate)
    with (
        mock.patch("tierstore.mover.runtime.RealClock", return_value=clock),
        mock.patch("tierstore.nvme.directory.LocalFiles", return_value=files),
    ):
        store = TierStore(
            gpu=gpu_bytes,
            ram=ram_bytes + 4 * slot_bytes(ram_bytes) + 8 * PAGE,
            nvme=path / "swap" if nvme else None,
            device="cpu",
            policy="lru",
            direct_io="auto" if direct else False,
        )
    engine = store.engine
    assert isinstance(engine.copies, ThreadCopies)
    engine.copies = copies = SlowCopies(clock, engine.copies)
    says = mock.patch.object(type(engine.directory), "direct", direct) if nvme and direct else mock.patch.object(files, "gate", files.gate)
    try:
        with says:
            yield SlowStore(store, clock, files, copies)
    finally:
        files.gate.set()
        store.close()
