"""The door to the file system: alignment, short counts, interruptions, symbolic links, cancellation."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tierstore.errors import OptionError
from tierstore.nvme.files import Request, aligned_buffer, is_aligned, land, move_all
from tierstore.nvme.local import LocalFiles

PAGE = 4096


def test_alignment_is_seen() -> None:
    buffer = aligned_buffer(3 * PAGE)
    assert is_aligned(0, buffer)
    assert is_aligned(PAGE, buffer[PAGE:])
    assert not is_aligned(100, buffer)
    assert not is_aligned(0, buffer[1 : PAGE + 1])
    assert not is_aligned(0, buffer[:100])
    assert not is_aligned(0, memoryview(bytes(PAGE)))


@pytest.mark.parametrize("first", [0, 1])
def test_unaligned_requests_go_another_way(files: Any, tmp_path: Path, first: int) -> None:
    """Direct I/O would answer EINVAL; and both ways see each other's bytes."""

    async def go() -> None:
        await files.probe(str(tmp_path), "auto")
        source = aligned_buffer(4 * PAGE)
        source[:] = os.urandom(4 * PAGE)
        file = files.file(str(tmp_path / "x"), write=True)
        await file.create(4 * PAGE)
        await move_all(files, file.write, [Request(0, source)])
        odd = aligned_buffer(4 * PAGE)[first : first + 2 * PAGE + 3]
        await move_all(files, file.read, [Request(PAGE + 5, odd)])
        assert odd == source[PAGE + 5 : 3 * PAGE + 8]
        await move_all(files, file.write, [Request(7, memoryview(b"read-only bytes"))])
        even = aligned_buffer(PAGE)
        await move_all(files, file.read, [Request(0, even)])
        assert bytes(even[:22]) == bytes(source[:7]) + b"read-only bytes"
        await file.close()

    asyncio.run(go())
    files.close()


def test_short_counts_and_interruptions_are_repeated(files: Any, tmp_path: Path) -> None:
    files.short, files.interrupt = 1000, True
    seen: list[int] = []

    async def go() -> None:
        data = memoryview(bytearray(os.urandom(3 * PAGE)))
        file = files.file(str(tmp_path / "x"), write=True)
        await file.create(3 * PAGE)
        await move_all(files, file.write, [Request(0, data, lambda buffer: seen.append(len(buffer)))])
        back = memoryview(bytearray(3 * PAGE))
        await move_all(files, file.read, [Request(0, back, lambda buffer: seen.append(len(buffer)))])
        assert back == data
        with pytest.raises(OSError, match="4096 bytes early"):
            await move_all(files, file.read, [Request(2 * PAGE, memoryview(bytearray(2 * PAGE)))])
        await file.close()

    asyncio.run(go())
    files.close()
    assert seen == [3 * PAGE, 3 * PAGE], "what is to be done with the bytes is done once, when all are there"


def test_direct_io_is_probed(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    files = LocalFiles(portable=False)
    asyncio.run(files.probe(str(tmp_path), "auto"))
    expected = files.direct
    asyncio.run(files.probe(str(tmp_path), False))
    assert files.direct is False
    assert not list(tmp_path.iterdir())
    with pytest.raises(OptionError, match="direct_io"):
        asyncio.run(files.probe(str(tmp_path), "always"))  # type: ignore[arg-type]
    if expected:
        asyncio.run(files.probe(str(tmp_path), True))
        assert files.direct

    def refuse(*args: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("tierstore.nvme.local._PWRITEV", refuse)
    monkeypatch.setattr("tierstore.nvme.local._PREADV", refuse)
    asyncio.run(files.probe(str(tmp_path), "auto"))
    assert not files.direct
    assert "direct I/O is not available" in caplog.text
    with pytest.raises(OptionError, match="refuses direct I/O"):
        asyncio.run(files.probe(str(tmp_path), True))
    assert not list(tmp_path.iterdir())
    files.close()


@pytest.mark.native_files
def test_a_full_drive_is_not_taken_for_one_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed off for as long as the store was open, though there was room a moment later."""
    files = LocalFiles()
    asyncio.run(files.probe(str(tmp_path), "auto"))
    if not files.direct:
        pytest.skip("there is no direct I/O in the temporary directory")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    asyncio.run(files.probe(str(tmp_path), True))
    assert files.direct
    assert not list(tmp_path.iterdir())
    files.close()


def test_links_are_not_followed(files: Any, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(bytes(PAGE))
    link = tmp_path / "link"
    link.symlink_to(outside)

    async def go() -> None:
        file = files.file(str(link), write=True)
        for call in (
            lambda: move_all(files, file.write, [Request(0, memoryview(b"x" * PAGE))]),
            lambda: move_all(files, file.read, [Request(0, memoryview(bytearray(PAGE)))]),
            lambda: files.save(str(link), b"x", sync=False),
            lambda: files.load(str(link), 10),
            lambda: file.create(PAGE),
        ):
            with pytest.raises(OSError, match=r"link|exists"):
                await call()
        assert not (await files.stat(str(link))).regular

    asyncio.run(go())
    files.close()
    assert outside.read_bytes() == bytes(PAGE)


def test_small_files(files: Any, tmp_path: Path) -> None:
    async def go() -> None:
        path = str(tmp_path / "small")
        await files.save(path, b"0123456789", sync=True)
        assert await files.load(path, 4) == b"0123"
        assert await files.load(path, 100) == b"0123456789"
        await files.save(path, b"ab", sync=False)
        assert await files.load(path, 100) == b"ab"
        assert os.stat(path).st_mode & 0o777 == 0o600
        await files.replace(path, path + "2")
        assert await files.listdir(str(tmp_path)) == ["small2"]
        assert (await files.stat(path + "2")).nbytes == 2

    asyncio.run(go())
    files.close()


def test_cancelling_waits_for_the_thread() -> None:
    files = LocalFiles()
    started, gate, done = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        gate.wait(10)
        done.set()

    async def go() -> None:
        task = asyncio.ensure_future(files.work(slow))
        await asyncio.to_thread(started.wait, 10)
        for _ in range(3):  # insisting changes nothing
            task.cancel()
            await asyncio.sleep(0.001)
            assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()

    asyncio.run(go())
    files.close()


def test_all_requests_end_before_the_first_failure_is_raised(files: Any, tmp_path: Path) -> None:
    ended: list[int] = []

    def slowly(number: int) -> Callable[[memoryview], None]:
        def then(buffer: memoryview) -> None:
            time.sleep(0.01 * number)
            ended.append(number)
            if number < 2:
                raise ValueError(number)

        return then

    async def go() -> None:
        file = files.file(str(tmp_path / "x"), write=True)
        await file.create(3 * PAGE)
        for move in (file.write, file.read):
            requests = [Request(number * PAGE, aligned_buffer(PAGE), slowly(number)) for number in range(3)]
            with pytest.raises(ValueError, match="0"):
                await move_all(files, move, requests)
        assert ended == [0, 1, 2, 0, 1, 2]
        await file.close()
        with pytest.raises(ZeroDivisionError):
            await land(files.work(lambda: 1 // 0))

    asyncio.run(go())
    files.close()


def test_reads_queue_behind_nothing_else() -> None:
    files = LocalFiles(threads=1)
    gate = threading.Event()

    async def go() -> None:
        writing = asyncio.ensure_future(files.on_threads("write", [lambda: gate.wait(10)]))
        syncing = asyncio.ensure_future(files.work(gate.wait, 10))
        await asyncio.sleep(0)
        assert await files.on_threads("read", [lambda: 7]) == [7]
        gate.set()
        assert await writing == [True]
        assert await syncing

    asyncio.run(go())
    files.close()


def test_several_requests_are_under_way_together(files: Any, tmp_path: Path) -> None:
    """As many as there are threads, not one more has its file open; and what is to be done with the bytes is done on those threads."""
    together = threading.Barrier(files.num_threads)
    threads: set[str] = set()
    handles: list[int] = []
    path = str(tmp_path / "x")

    def then(buffer: memoryview) -> None:
        threads.add(threading.current_thread().name)
        if os.path.exists("/proc/self/fd"):
            handles.append(sum(os.path.realpath(f"/proc/self/fd/{fd}") == path for fd in os.listdir("/proc/self/fd")))
        together.wait(30)

    async def go() -> None:
        file = files.file(path, write=True)
        count = 3 * files.num_threads
        await file.create(count * PAGE)
        for move, kind in ((file.write, "write"), (file.read, "read")):
            threads.clear()
            await move_all(files, move, [Request(number * PAGE, aligned_buffer(PAGE), then) for number in range(count)])
            assert all(name.startswith(f"tierstore-{kind}_") for name in threads)
        await file.close()

    asyncio.run(go())
    files.close()
    assert max(handles, default=0) <= files.num_threads
