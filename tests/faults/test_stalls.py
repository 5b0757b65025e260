"""Drives that do not answer: callers hear of it in time, memory is not reused, the rest goes on, and close() returns."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.driver import pages
from tests.helpers import check_invariants
from tests.patience import in_thread, wait_until
from tests.quiet import assert_quiet, tensor_of
from tierstore import AsyncTierStore, TierStore, threads
from tierstore.catalog import PAGE
from tierstore.errors import CapacityError, TierstoreError, TransferError
from tierstore.nvme import local, portable
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import Request, aligned_buffer
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.shards import ShardWriter
from tierstore.nvme.system import Posix

STALL_S = 0.3
SOON_S = 10 * STALL_S
"""What takes longer was not given up when it should have been."""


class Gate:
    """The drive: while closed, chosen system calls on chosen files hang, before or after they have done their work.

    Attributes:
        hanging: Calls that hang now.
        moved: Files that calls came back to find another file, or none, behind their descriptor.
    """

    def __init__(self) -> None:
        self.calls: set[str] = set()
        self.file = ""
        self.late = False
        self.hanging = 0
        self.moved: list[str] = []
        self._open = threading.Event()
        self._lock = threading.Lock()

    def shut(self, *calls: str, file: str = "", late: bool = False) -> None:
        """From now on these calls hang.

        Args:
            calls: Of `os`, by name.
            file: Only on files with this in their names.
            late: They have done their work by then.
        """
        self._open.clear()
        self.calls, self.file, self.late = set(calls), file, late

    def open(self) -> None:
        """The drive answers again."""
        self.calls = set()
        self._open.set()

    def through(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def gated(*arguments: Any, **options: Any) -> Any:
            ours = threading.current_thread().name.startswith("tierstore-")  # and not the test's own
            if not ours or name not in self.calls or self.file not in self._file_of(arguments[0]):
                return call(*arguments, **options)
            result = call(*arguments, **options) if self.late else None
            before = self._file_of(arguments[0])
            with self._lock:
                self.hanging += 1
            self._open.wait(60)
            try:
                now = self._file_of(arguments[0])
            except OSError:
                now = "nothing"
            with self._lock:
                self.hanging -= 1
                if now.removesuffix(" (deleted)") != before:
                    self.moved.append(f"{before} became {now}")
            return result if self.late else call(*arguments, **options)

        return gated

    def opens(self, file: str, mode: str, opener: Callable[[str, int], int]) -> io.FileIO:
        """As `open_raw`, for the portable path: the calls of the handle pass the gate under the names of the positional ones."""
        gate = self

        class Gated(io.FileIO):
            def readinto(self, buffer: Any) -> Any:
                return gate.through("preadv", lambda _: io.FileIO.readinto(self, buffer))(self.fileno())

            def write(self, data: Any) -> Any:
                return gate.through("pwritev", lambda _: io.FileIO.write(self, data))(self.fileno())

        return Gated(file, mode, opener=opener)

    @staticmethod
    def _file_of(argument: Any) -> str:
        return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("which file a descriptor is of cannot be told here")
    gate = Gate()
    monkeypatch.setattr(threads, "STALL_S", STALL_S)
    monkeypatch.setattr(local, "_PREADV", gate.through("preadv", os.preadv))
    monkeypatch.setattr(local, "_PWRITEV", gate.through("pwritev", os.pwritev))
    monkeypatch.setattr(portable, "open_raw", gate.opens)
    for name in ("fsync", "replace", "unlink", "posix_fallocate", "lstat"):
        monkeypatch.setattr(os, name, gate.through(name, getattr(os, name)))
    yield gate
    gate.open()
    wait_until(lambda: not gate.hanging)
    assert not gate.moved, "a late call would have gone to somebody else's file"


@contextmanager
def opened(path: Path, *, gpu: int = 6, ram: int = 9) -> Iterator[TierStore]:
    with TierStore(gpu=gpu * PAGE, ram=(ram + 4) * PAGE, nvme=path / "swap", device="cpu") as store:
        yield store


def given_up(call: Callable[[], object], block: str | None, *, tier: str = "nvme", file: str = "block-") -> TransferError:
    """The call fails in time, and its error names all there is to name."""
    start = time.monotonic()
    with pytest.raises(TransferError) as caught:
        call()
    assert time.monotonic() - start < SOON_S
    error = caught.value
    assert (error.block, error.tier) == (block, tier), error.details
    assert file in error.path
    assert STALL_S < error.seconds < SOON_S
    assert "no answer" in str(error)
    assert error.path in str(error)
    return error


def use(store: TierStore, name: str) -> torch.Tensor:
    with store.use(name, timeout=60) as tensor:
        return tensor.clone()


READS: dict[str, Callable[[TierStore], object]] = {
    "use": lambda store: use(store, "a"),
    "read": lambda store: store.read("a"),
    "write": lambda store: store.write("part", {"x": pages(7, 2)}),
    "hold gpu": lambda store: store.hold("a", "gpu"),
    "hold ram": lambda store: store.hold("a", "ram"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", READS)
def test_a_read_that_never_returns(tmp_path: Path, gate: Gate, call: str, late: bool) -> None:
    with opened(tmp_path) as store:
        store.put("a", pages(1, 2), tier="nvme")
        store.put("b", pages(2, 2), tier="nvme")
        store.put("part", {"x": pages(3, 2), "y": pages(4, 2)}, tier="nvme")
        block = "part" if call == "write" else "a"
        gate.shut("preadv", file=f"block-{block}-", late=late)
        given_up(lambda: READS[call](store), block)
        kept = store.stats().tiers["ram"].quarantined_bytes
        assert kept > 0
        assert torch.equal(use(store, "b"), pages(2, 2))
        check_invariants(store.engine)
        gate.file = "nothing"  # the drive answers again, but for what hangs
        READS[call](store)
        assert torch.equal(tensor_of(store, "a"), pages(1, 2))
        assert torch.equal(use(store, "a"), pages(1, 2)), "bytes that came late are served"
        for _ in range(3):
            store.evict("b")
            assert torch.equal(use(store, "b"), pages(2, 2))
        assert store.stats().tiers["ram"].quarantined_bytes == kept
        gate.open()
        wait_until(lambda: store.stats().tiers["ram"].quarantined_bytes == 0)
        for name, value in {"a": 1, "b": 2}.items():
            assert torch.equal(tensor_of(store, name), pages(value, 2))
        assert_quiet(store)
        check_invariants(store.engine)


def test_bytes_that_come_late_are_seen_by_nobody(tmp_path: Path, gate: Gate) -> None:
    """Every page of RAM but those in quarantine is reused; then what hung writes into its own."""
    with opened(tmp_path) as store:
        for number in range(6):
            store.put(f"b{number}", pages(number, 2), tier="nvme")
        gate.shut("preadv", file="block-b0-")
        given_up(lambda: use(store, "b0"), "b0")
        gate.file = "nothing"
        expected = {f"b{number}": pages(number, 2) for number in range(6)}
        for turn in range(3):
            for number in range(1, 6):
                with store.use(f"b{number}", write=True, timeout=60) as tensor:
                    tensor.copy_(pages(10 * turn + number, 2))
                expected[f"b{number}"] = pages(10 * turn + number, 2)
        gate.open()
        wait_until(lambda: store.stats().tiers["ram"].quarantined_bytes == 0)
        for name, value in expected.items():
            assert torch.equal(use(store, name), value), name


@pytest.mark.parametrize("call", ["evict", "flush", "commit", "use", "put"])
def test_a_write_that_never_returns(tmp_path: Path, gate: Gate, call: str) -> None:
    calls: dict[str, Callable[[TierStore], object]] = {
        "evict": lambda store: store.evict("a"),
        "flush": lambda store: store.flush(),
        "commit": lambda store: store.commit(),
        "use": lambda store: use(store, "large"),
        "put": lambda store: store.put("c", pages(5, 2), tier="nvme"),
    }
    with opened(tmp_path) as store:
        store.put("large", pages(9, 6), tier="nvme")
        block = "c" if call == "put" else "a"
        if call != "put":
            store.put("a", pages(1, 2))
            store.put("held", pages(2, 2))
            store.flush()
            store.hold("held", "ram")
            store.write("a", pages(3, 2))
        gate.shut("pwritev", file=f"block-{block}-")
        given_up(lambda: calls[call](store), block)
        check_invariants(store.engine)
        hung = set(os.listdir(tmp_path / "swap"))
        gate.file = "nothing"
        calls[call](store)
        if call != "put":
            assert torch.equal(tensor_of(store, "a"), pages(3, 2))
        store.commit()
        gate.open()
        wait_until(lambda: not gate.hanging)
        assert {name for name in os.listdir(tmp_path / "swap") if name.startswith(f"block-{block}-")} - hung, "the same file was used again"
    with opened(tmp_path) as store:
        assert torch.equal(tensor_of(store, "large"), pages(9, 6))
        assert torch.equal(tensor_of(store, block), pages(5 if call == "put" else 3, 2)), "what hung was written over what was committed"


@pytest.mark.parametrize("name", ["fsync", "replace", "posix_fallocate"])
def test_a_commit_whose_calls_never_return(tmp_path: Path, gate: Gate, name: str) -> None:
    with opened(tmp_path) as store:
        store.put("a", pages(1, 2))
        store.commit("first")
        store.write("a", pages(2, 2))
        gate.shut(name)
        start = time.monotonic()
        with pytest.raises(TransferError, match="no answer") as caught:
            store.commit("second")
        assert time.monotonic() - start < 2 * SOON_S
        assert caught.value.tier == "nvme"
        assert torch.equal(tensor_of(store, "a"), pages(2, 2))
        gate.calls = set()  # new calls are answered; what hangs, hangs
        store.commit("third")
        store.write("a", pages(4, 2))
        store.commit("fourth")
        gate.open()
        wait_until(lambda: not gate.hanging)
        store.commit("fifth")
        assert_quiet(store)
    with opened(tmp_path) as store:
        assert store.committed is not None
        assert store.committed.metadata == "fifth"
        assert torch.equal(tensor_of(store, "a"), pages(4, 2))


def test_a_drive_that_never_comes_back_and_close(tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """Everything hangs: each caller hears of it within about one stall limit, threads stay bounded, and close() returns."""
    with opened(tmp_path) as store:
        for number in range(6):
            store.put(f"b{number}", pages(number, 2), tier="nvme")
        store.commit()
        before = threading.active_count()
        gate.shut("preadv", "pwritev", "fsync", "replace", "unlink", "posix_fallocate", "lstat")
        start = time.monotonic()
        waiting = [in_thread(lambda name=f"b{number}": use(store, name)) for number in range(6)]  # type: ignore[misc]
        waiting += [in_thread(lambda name=f"b{number}": store.read(name)) for number in range(6)]  # type: ignore[misc]
        errors = [future.exception(60) for future in waiting]
        assert time.monotonic() - start < SOON_S
        assert all(isinstance(error, TransferError | CapacityError) for error in errors), errors
        assert sum(isinstance(error, TransferError) for error in errors) >= 8, "those who waited for what hung reads keep"
        with caplog.at_level(logging.WARNING, logger="tierstore"):
            start = time.monotonic()
            store.close()
            assert time.monotonic() - start < 3 * SOON_S
        assert len([record for record in caplog.records if "stay mapped" in record.message]) == 1
        assert threading.active_count() <= before + 3 * threads.MAX_LOST
    assert gate.hanging
    gate.open()
    with opened(tmp_path) as store:
        assert [torch.equal(tensor_of(store, f"b{number}"), pages(number, 2)) for number in range(6)] == [True] * 6


def test_close_while_a_read_hangs(tmp_path: Path, gate: Gate) -> None:
    store = TierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=tmp_path / "swap", device="cpu")
    store.put("a", pages(1, 2), tier="nvme")
    store.commit()
    gate.shut("preadv")
    waiting = in_thread(lambda: use(store, "a"))
    wait_until(lambda: gate.hanging)
    start = time.monotonic()
    store.close()
    assert time.monotonic() - start < SOON_S
    assert isinstance(waiting.exception(10), TierstoreError)
    gate.open()  # it writes into memory that must still be there
    wait_until(lambda: not gate.hanging)
    with opened(tmp_path) as store:
        assert torch.equal(tensor_of(store, "a"), pages(1, 2))


def test_transfer_space_that_hangs_is_told_and_comes_back(tmp_path: Path, gate: Gate) -> None:
    with opened(tmp_path) as store:
        store.put("a", pages(1, 2), tier="nvme")
        store.put("b", pages(2, 2), tier="nvme")
        gate.shut("preadv", file="block-a-")
        readers = [in_thread(lambda: store.read("a")) for _ in range(4)]
        assert all(isinstance(reader.exception(60), TransferError) for reader in readers)
        start = time.monotonic()
        waiting = [in_thread(lambda: store.read("b")) for _ in range(3)]
        for future in waiting:
            error = future.exception(60)
            assert isinstance(error, TransferError), "no slot will come back, and it waits for one"
            assert (error.block, error.tier) == ("b", "ram")
            assert "transfer space" in str(error)
        assert time.monotonic() - start < STALL_S
        assert torch.equal(use(store, "b"), pages(2, 2)), "the arena has room of its own"
        gate.open()
        wait_until(lambda: store.engine.slots.num_quarantined == 0)
        assert torch.equal(tensor_of(store, "a"), pages(1, 2))
        together = [in_thread(lambda: tensor_of(store, "a")) for _ in range(12)]
        assert all(torch.equal(future.result(60), pages(1, 2)) for future in together)  # type: ignore[arg-type]
        assert_quiet(store)


def test_a_cancelled_read_that_hangs_keeps_its_memory(tmp_path: Path, gate: Gate) -> None:
    async def go() -> None:
        async with AsyncTierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
            await store.put("a", pages(1, 2), tier="nvme")
            gate.shut("preadv")
            task = asyncio.create_task(store.read("a"))
            await asyncio.to_thread(wait_until, lambda: gate.hanging)
            start = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - start < SOON_S
            assert store.engine.slots.num_quarantined == 1, "the slot is free, and the drive may still write into it"
            gate.open()
            await asyncio.to_thread(wait_until, lambda: not store.engine.slots.num_quarantined)
            assert torch.equal(await store.read("a"), pages(1, 2))  # type: ignore[arg-type]

    asyncio.run(go())


def test_a_cancelled_put_that_hangs_keeps_its_file(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system frees a file's bytes only once nobody has it open any more, so they stay counted."""
    write = ShardWriter.write

    async def hanging(self: ShardWriter, offset: int, source: memoryview) -> None:
        gate.shut("pwritev", file="block-a-", late=True)  # not before: the header passes
        await write(self, offset, source)

    async def go() -> None:
        async with AsyncTierStore(gpu=6 * PAGE, ram=13 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
            directory = store.engine.directory
            assert directory is not None
            before = directory.used_bytes
            with monkeypatch.context() as patch:
                patch.setattr(ShardWriter, "write", hanging)
                task = asyncio.create_task(store.put("a", pages(1, 2), tier="nvme"))
                await asyncio.to_thread(wait_until, lambda: gate.hanging)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert directory.used_bytes > before, "room is given away that the drive has not got back"
            gate.open()
            await asyncio.to_thread(wait_until, lambda: not gate.hanging)
            await store.commit()
            assert not list((tmp_path / "swap").glob("block-a-*"))

    asyncio.run(go())


def open_files() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found


def test_a_file_that_is_made_late_is_not_left_open(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open
    monkeypatch.setattr(os, "open", gate.through("open", opening))
    with opened(tmp_path) as store:
        gate.shut("open", file="block-a-")
        given_up(lambda: store.put("a", pages(1, 2), tier="nvme"), "a")
        gate.open()
        wait_until(lambda: not gate.hanging)
        time.sleep(0.1)
        assert not [name for name in open_files() if "block-a-" in name]


@pytest.mark.parametrize("portable_path", [False, True])
def test_requests_behind_one_that_hangs_are_not_begun(tmp_path: Path, gate: Gate, portable_path: bool) -> None:
    """Else each would cost a thread."""
    files = LocalFiles(portable=portable_path)

    async def go() -> None:
        file = files.file(str(tmp_path / "x"), write=True)
        await file.create(12 * PAGE)
        gate.shut("preadv")
        outcomes = await file.read([Request(number * PAGE, aligned_buffer(PAGE)) for number in range(12)])
        stalled = [outcome for outcome in outcomes if isinstance(outcome, threads.StalledError)]
        assert len(stalled) == 12
        assert sum(len(outcome.landed) for outcome in stalled) == files.num_threads
        gate.open()
        await asyncio.to_thread(wait_until, lambda: not gate.hanging)
        await file.close()

    asyncio.run(go())
    files.close()


@pytest.mark.native_files  # slows positional reads
def test_a_slow_drive_is_not_a_hung_one(tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request takes a while, the whole many times the stall limit: it makes progress."""
    real = local._PREADV

    def slow(*arguments: Any) -> Any:
        time.sleep(STALL_S / 3)
        return real(*arguments)

    monkeypatch.setattr("tierstore.nvme.shards.CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr("tierstore.nvme.checksums.CHUNK_BYTES", 1 << 20)
    big = torch.arange(10 << 20, dtype=torch.float32)
    with TierStore(gpu="64MiB", ram="80MiB", nvme=tmp_path / "swap", device="cpu") as store:
        store.put("big", big, tier="nvme")
        monkeypatch.setattr(local, "_PREADV", slow)
        start = time.monotonic()
        assert torch.equal(use(store, "big"), big)
        assert time.monotonic() - start > 2 * STALL_S


def test_opening_on_a_drive_that_hangs(tmp_path: Path, gate: Gate) -> None:
    with opened(tmp_path) as store:
        store.put("a", pages(1, 2))
        store.commit()
    gate.shut("lstat")
    start = time.monotonic()
    with pytest.raises(TierstoreError, match="no answer"):
        Directory.open(tmp_path / "swap")
    assert time.monotonic() - start < SOON_S
    gate.open()
    with opened(tmp_path) as store:
        assert torch.equal(tensor_of(store, "a"), pages(1, 2))


def test_the_portable_path_is_watched_too(tmp_path: Path, gate: Gate) -> None:
    with mock.patch("tierstore.nvme.directory.LocalFiles", return_value=LocalFiles(portable=True)), opened(tmp_path) as store:
        store.put("a", pages(1, 2), tier="nvme")
        real = os.open
        hangs = gate.through("open", real)

        def no_follow(self: Posix, path: str, flags: int, *, direct: bool = False) -> int:
            return int(hangs(path, flags))

        with mock.patch.object(Posix, "open", no_follow):
            gate.shut("open", file="block-a-")
            given_up(lambda: use(store, "a"), "a")
            gate.file = "nothing"
            assert torch.equal(use(store, "a"), pages(1, 2))
        gate.open()
        wait_until(lambda: store.stats().tiers["ram"].quarantined_bytes == 0)
        assert_quiet(store)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["use", "read", "hold ram"])
@pytest.mark.parametrize("nvme", [False, True], ids=["two tiers", "three tiers"])
def test_a_read_of_a_model_file_that_never_returns(tmp_path: Path, gate: Gate, call: str, late: bool, nvme: bool) -> None:
    """It may still fill transfer space, or the block's extent: both are kept until it has returned, and nobody sees what it brings."""
    tensors = {f"{name}.{part}": pages(number + 10 * part, 2)[:1500] for number, name in enumerate("ab") for part in range(2)}
    for name in "ab":
        save_file({key: tensor for key, tensor in tensors.items() if key[0] == name}, tmp_path / f"model-{name}.safetensors")

    def right(store: TierStore, name: str) -> bool:
        with store.use(name, timeout=60) as leased:
            return all(torch.equal(tensor, tensors[key]) for key, tensor in leased.items())

    reads: dict[str, Callable[[TierStore], object]] = {
        "use": lambda store: right(store, "a"),
        "read": lambda store: store.read("a"),
        "hold ram": lambda store: store.hold("a", "ram"),
    }
    with TierStore(gpu=10 * PAGE, ram=(13 + 4) * PAGE, nvme=tmp_path / "swap" if nvme else None, device="cpu") as store:
        for name in "ab":
            store.adopt(tmp_path / f"model-{name}.safetensors")
        gate.shut("preadv", file="model-a", late=late)
        given_up(lambda: reads[call](store), "a", file="model-a")
        assert store.stats().tiers["ram"].quarantined_bytes > 0
        gate.file = "nothing"
        assert right(store, "b")
        check_invariants(store.engine)
        store.put("mine", pages(3, 2))
        for _ in range(3):
            store.evict("b")
            assert right(store, "b")
        gate.open()
        wait_until(lambda: store.stats().tiers["ram"].quarantined_bytes == 0)
        for name in "ab":
            store.unhold(name)
            assert right(store, name), "bytes that came late are served"
            found = store.read(name)
            assert all(torch.equal(found[key], tensors[key]) for key in found)  # type: ignore[call-overload]
        assert torch.equal(tensor_of(store, "mine"), pages(3, 2))
        assert_quiet(store)
        check_invariants(store.engine)
