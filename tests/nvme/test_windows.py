"""What Windows is asked for, by a stand-in that records it: handles, sharing, alignment, links, room, errors; paths and names."""

from __future__ import annotations

import asyncio
import errno
import ntpath
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.nvme.common import contents, shard_files, with_directory
from tests.nvme.kernel32 import Kernel32, as_error, stand_in
from tierstore import TierStore
from tierstore.errors import DirectoryError, OptionError, TierFullError, TransferError
from tierstore.nvme import local, names, windows
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import Request, aligned_buffer, move_all
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.shards import Entry
from tierstore.nvme.windows import (
    FILE_FLAG_NO_BUFFERING,
    FILE_FLAG_OPEN_REPARSE_POINT,
    FILE_FLAG_WRITE_THROUGH,
    GENERIC_READ,
    GENERIC_WRITE,
    extended,
    plain,
    reserved_part,
)

PAGE = 4096
SHARE_ALL = 7


@pytest.fixture
def kernel() -> Kernel32:
    return stand_in()[1]


def files_of(kernel: Kernel32) -> LocalFiles:
    system = windows.Windows(kernel, kernel, kernel.last_error, as_error)
    return LocalFiles(portable=True, system=system)


def opened(kernel: Kernel32, name: str) -> list[tuple[Any, ...]]:
    """What `CreateFileW` was asked for one file: access, share, disposition, flags."""
    return [(call[1], call[2], call[4], call[5]) for call in kernel.made("CreateFileW") if ntpath.basename(call[0]) == name]


# -- handles ------------------------------------------------------------------------------------------------------------


def test_a_directory_through_the_calls_of_windows(kernel: Kernel32, swap: str, block_of: Any, payload_of: Any) -> None:
    blocks = [block_of("layer.0", 4 * PAGE), block_of("con", 9 * PAGE)]

    async def fill(directory: Directory) -> None:
        assert directory.direct
        shards = [await directory.write(block, payload_of(block, 1)) for block in blocks]
        assert await directory.write(blocks[0], payload_of(blocks[0], 2), shards[0]) is shards[0]
        for step in range(4):
            await directory.commit([Entry(block, shard) for block, shard in zip(blocks, shards, strict=True)], step)
            old, shards[1] = shards[1], await directory.write(blocks[1], payload_of(blocks[1], 10 + step), shards[1])
            directory.discard(old)
        assert directory.reused_files, "renamed and rewritten"
        assert await contents(directory, shards[1]) == payload_of(blocks[1], 13)

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == 3
        assert await contents(directory, directory.entries["layer.0"].shard) == payload_of(blocks[0], 2)
        assert await contents(directory, directory.entries["con"].shard) == payload_of(blocks[1], 12)

    with_directory(swap, fill, files=files_of(kernel))
    with_directory(swap, check, files=files_of(kernel))
    with_directory(swap, check)  # and anybody else
    assert not kernel.open_handles()
    for path, access, share, *_, flags, template in kernel.made("CreateFileW"):
        assert share == SHARE_ALL, path
        assert flags & FILE_FLAG_OPEN_REPARSE_POINT, path
        assert template is None
        assert bool(flags & FILE_FLAG_WRITE_THROUGH) == bool(access & GENERIC_WRITE and not flags & FILE_FLAG_NO_BUFFERING), path
    payloads = [call for name in shard_files(swap) for call in opened(kernel, name)]
    unbuffered = {access for access, _, _, flags in payloads if flags & FILE_FLAG_NO_BUFFERING}
    assert unbuffered == {GENERIC_READ, GENERIC_READ | GENERIC_WRITE}
    moves = {ntpath.basename(target): flags for _, target, flags in kernel.made("MoveFileExW")}
    assert moves["CURRENT"] == moves["manifest-00000002.json"] == windows.MOVEFILE_REPLACE_EXISTING | windows.MOVEFILE_WRITE_THROUGH
    assert {flags for name, flags in moves.items() if name.startswith("block-")} == {windows.MOVEFILE_REPLACE_EXISTING}


def test_a_whole_store_through_the_calls_of_windows(
    kernel: Kernel32, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "native", lambda: (windows.Windows(kernel, kernel, kernel.last_error, as_error), True))
    sizes: dict[str, Any] = {"gpu": 8 * PAGE, "ram": 24 * PAGE, "nvme": tmp_path / "swap", "device": "cpu"}
    with TierStore(**sizes) as store:
        for number in range(20):
            store.put(f"b{number}", torch.full((PAGE // 4,), float(number)))
        for number in range(20):
            with store.use(f"b{number}", write=True) as tensor:
                tensor.add_(100)
        store.commit({"step": 1})
        assert store.stats().direct_io
    with TierStore(**sizes) as store:
        assert store.committed is not None
        for number in range(20):
            assert (store.read(f"b{number}") == number + 100).all()  # type: ignore[union-attr]
    assert "direct I/O" not in caplog.text
    assert not kernel.open_handles()

    kernel.takes_direct = False  # the drive was moved to a share that refuses
    with TierStore(**sizes) as store:
        assert store.stats().direct_io is False
        with store.use("b3", write=True) as tensor:
            assert (tensor == 103).all()
            tensor.fill_(7)
        store.commit({"step": 2})
        assert (store.read("b3") == 7).all()  # type: ignore[union-attr]
    told = [record.getMessage() for record in caplog.records if "direct I/O is not available" in record.getMessage()]
    assert len(told) == 1, "once"


@pytest.mark.parametrize(
    ("offset", "first", "nbytes", "direct"),
    [(0, 0, PAGE, True), (PAGE, 0, 2 * PAGE, True), (512, 0, PAGE, False), (0, 512, PAGE, False), (0, 0, PAGE - 512, False)],
)
def test_only_aligned_requests_are_unbuffered(kernel: Kernel32, tmp_path: Path, offset: int, first: int, nbytes: int, direct: bool) -> None:
    files = files_of(kernel)
    memory = aligned_buffer(4 * PAGE)
    memory[:] = os.urandom(4 * PAGE)
    buffer, back = memory[first : first + nbytes], aligned_buffer(4 * PAGE)[first : first + nbytes]

    async def go() -> None:
        await files.probe(str(tmp_path), True)
        file = files.file(str(tmp_path / "x"), write=True)
        await file.create(8 * PAGE)
        await move_all(files, file.write, [Request(offset, buffer)])
        await move_all(files, file.read, [Request(offset, back)])

    asyncio.run(go())
    files.close()
    assert back == buffer
    create, write, read = opened(kernel, "x")
    assert create == (GENERIC_WRITE, SHARE_ALL, windows.CREATE_NEW, create[3])
    assert write[0] == GENERIC_READ | GENERIC_WRITE
    assert read[0] == GENERIC_READ
    assert write[2] == read[2] == windows.OPEN_EXISTING
    for flags in (write[3], read[3]):
        assert bool(flags & FILE_FLAG_NO_BUFFERING) == direct
    assert bool(write[3] & FILE_FLAG_WRITE_THROUGH) != direct, "what the cache takes may be lost without a word"


def test_room_is_made_by_setting_the_end(kernel: Kernel32, tmp_path: Path) -> None:
    files = files_of(kernel)

    async def go() -> None:
        await files.file(str(tmp_path / "x"), write=True).create(5 << 30)

    kernel.failing["SetFileInformationByHandle"] = [112, 39, 1295]
    for code in (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(OSError, match="Windows error") as caught:
            asyncio.run(go())
        assert caught.value.errno == code
        os.unlink(tmp_path / "x")
    asyncio.run(go())
    files.close()
    assert [end.nbytes for _, _, end, _ in kernel.made("SetFileInformationByHandle")] == [5 << 30] * 4
    assert os.stat(tmp_path / "x").st_size == 5 << 30
    assert not kernel.open_handles()


def test_a_full_drive(kernel: Kernel32, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        await directory.commit([Entry(block, shard)])
        kernel.failing["SetFileInformationByHandle"] = [112]
        with pytest.raises(TierFullError):
            await directory.write(block, payload_of(block, 2), shard)
        assert await contents(directory, await directory.write(block, payload_of(block, 3), shard)) == payload_of(block, 3)

    with_directory(swap, use, files=files_of(kernel))


def test_a_sync_flushes_a_handle_that_may_write_and_its_error_is_the_commits(
    kernel: Kernel32, swap: str, block_of: Any, payload_of: Any
) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        flushed = len(kernel.made("FlushFileBuffers"))
        kernel.failing["FlushFileBuffers"] = [1117]  # an I/O device error
        with pytest.raises(TransferError, match="syncing block 'w'"):
            await directory.commit([Entry(block, shard)])
        assert shard.suspect
        assert len(kernel.made("FlushFileBuffers")) == flushed + 1
        await directory.commit([Entry(block, shard)])
        assert await contents(directory, shard) == payload_of(block, 1)

    with_directory(swap, use, files=files_of(kernel))


def test_links_are_not_followed(kernel: Kernel32, tmp_path: Path) -> None:
    files = files_of(kernel)
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
        ):
            with pytest.raises(OSError, match="it is a link") as caught:
                await call()
            assert caught.value.errno == errno.ELOOP
        with pytest.raises(FileExistsError):
            await file.create(PAGE)

    asyncio.run(go())
    files.close()
    assert outside.read_bytes() == bytes(PAGE)
    assert not kernel.open_handles()


def test_small_files_are_replaced_whole(kernel: Kernel32, tmp_path: Path) -> None:
    """`CREATE_ALWAYS` does not go with not following links: the file is emptied by a call of its own."""
    files, path = files_of(kernel), str(tmp_path / "small")

    async def go() -> None:
        for data in (b"0123456789", b"abc", b""):
            await files.save(path, data, sync=True)
            assert await files.load(path, 100) == data

    asyncio.run(go())
    files.close()
    assert {disposition for access, _, disposition, _ in opened(kernel, "small") if access & GENERIC_WRITE} == {windows.OPEN_ALWAYS}


def test_errors_keep_their_number_and_name_the_path_as_people_write_it(kernel: Kernel32, tmp_path: Path) -> None:
    system, path = windows.Windows(kernel, kernel, kernel.last_error, as_error), str(tmp_path / "absent")
    for call in (lambda: system.open(path, os.O_RDONLY), lambda: system.unlink(path), lambda: system.replace(path, path + "2")):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert getattr(caught.value, "winerror", None) == 2
        assert caught.value.filename == path


def test_files_are_renamed_and_deleted_while_they_are_read(kernel: Kernel32, tmp_path: Path) -> None:
    """The stand-in refuses it where a handle does not share deletion."""
    system = windows.Windows(kernel, kernel, kernel.last_error, as_error)
    (tmp_path / "x").write_bytes(b"x")
    descriptor = system.open(str(tmp_path / "x"), os.O_RDONLY)
    system.replace(str(tmp_path / "x"), str(tmp_path / "y"))
    (tmp_path / "x").write_bytes(b"z")
    other = system.open(str(tmp_path / "x"), os.O_RDWR)
    system.unlink(str(tmp_path / "x"))
    assert os.read(descriptor, 1) == b"x"
    os.close(descriptor)
    os.close(other)
    selfish = kernel._CreateFileW(str(tmp_path / "y"), GENERIC_READ, 1, None, windows.OPEN_EXISTING, 0, None)
    with pytest.raises(PermissionError):
        system.unlink(str(tmp_path / "y"))
    with pytest.raises(PermissionError):
        system.open(str(tmp_path / "y"), os.O_RDWR)
    kernel._CloseHandle(selfish)


def test_direct_io_is_told_truthfully(kernel: Kernel32, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    files = files_of(kernel)
    asyncio.run(files.probe(str(tmp_path), True))
    assert files.direct
    create, write, read = opened(kernel, names.PROBE_NAME)
    assert create[2] == windows.CREATE_NEW
    assert write[3] & read[3] & FILE_FLAG_NO_BUFFERING
    assert not list(tmp_path.iterdir())
    asyncio.run(files.probe(str(tmp_path), False))
    assert not files.direct

    kernel.takes_direct = False
    with pytest.raises(OptionError, match="Windows error 87"):
        asyncio.run(files.probe(str(tmp_path), True))
    asyncio.run(files.probe(str(tmp_path), "auto"))
    assert not files.direct
    assert caplog.text.count("direct I/O is not available") == 1
    assert not list(tmp_path.iterdir())

    kernel.takes_direct = True  # and lies
    monkeypatch.setattr("aiofiles.threadpool.binary.AsyncFileIO.readinto", lambda self, buffer: asyncio.sleep(0, len(buffer)))
    with pytest.raises(OptionError, match="differed from the page written"):
        asyncio.run(files.probe(str(tmp_path), True))
    files.close()


# -- files that others hold ---------------------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited for between attempts, without waiting."""
    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("tierstore.nvme.windows.asyncio.sleep", sleep)
    return waited


@pytest.mark.parametrize("code", [5, 32, 33])
@pytest.mark.parametrize("call", ["replace", "unlink", "open"])
def test_a_file_that_is_held_is_tried_again(kernel: Kernel32, tmp_path: Path, pauses: list[float], code: int, call: str) -> None:
    files, path = files_of(kernel), str(tmp_path / "x")
    name = {"replace": "MoveFileExW", "unlink": "DeleteFileW", "open": "CreateFileW"}[call]

    async def once() -> None:
        if call == "replace":
            await files.replace(path, path + "2")
        elif call == "unlink":
            await files.unlink(path)
        else:
            assert await files.load(path, 1) == b"x"

    Path(path).write_bytes(b"x")
    kernel.failing[name] = [code] * 5
    asyncio.run(once())
    assert pauses == list(windows.PAUSES_S[:5])
    assert pauses == sorted(pauses)
    assert 1.5 < sum(windows.PAUSES_S) < 2.5
    Path(path).write_bytes(b"x")
    kernel.failing[name] = [code] * 100
    with pytest.raises(PermissionError) as caught:
        asyncio.run(once())
    assert getattr(caught.value, "winerror", None) == code
    assert len(kernel.made(name)) == 6 + 1 + len(windows.PAUSES_S)
    files.close()


@pytest.mark.parametrize("code", [2, 3, 112, 1117])
def test_other_errors_come_at_once(kernel: Kernel32, tmp_path: Path, pauses: list[float], code: int) -> None:
    files = files_of(kernel)
    kernel.failing["DeleteFileW"] = [code]
    with pytest.raises(OSError, match=f"Windows error {code}"):
        asyncio.run(files.unlink(str(tmp_path / "x")))
    files.close()
    assert not pauses


def test_errors_of_posix_come_at_once(tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def refuse(*paths: str) -> None:
        calls["made"] += 1
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    files = LocalFiles(portable=False)
    with pytest.raises(PermissionError):
        asyncio.run(files.replace(str(tmp_path / "x"), str(tmp_path / "y")))
    with pytest.raises(PermissionError):
        asyncio.run(files.unlink(str(tmp_path / "x")))
    files.close()
    assert calls["made"] == 2
    assert not pauses


def test_the_loop_goes_on_while_a_file_is_held(kernel: Kernel32, tmp_path: Path) -> None:
    """And whoever is cancelled meanwhile need not wait."""
    files = files_of(kernel)
    kernel.failing["DeleteFileW"] = [32] * 100
    (tmp_path / "x").write_bytes(b"x")

    async def go() -> None:
        task = asyncio.ensure_future(files.unlink(str(tmp_path / "x")))
        while len(kernel.made("DeleteFileW")) < 3:  # noqa: ASYNC110  # the call knows nothing of events
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    files.close()
    assert len(kernel.made("DeleteFileW")) < len(windows.PAUSES_S)


def test_a_commit_outlasts_a_virus_scanner(kernel: Kernel32, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        kernel.failing.update({"MoveFileExW": [32, 5], "DeleteFileW": [32], "CreateFileW": [32, 32]})
        assert await directory.commit([Entry(block, shard)], "held") == 1
        assert not kernel.failing["MoveFileExW"]
        assert not kernel.failing["CreateFileW"]

    with_directory(swap, use, files=files_of(kernel))
    with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard))


# -- paths and names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("C:\\swap\\CURRENT", "C:\\swap\\CURRENT"),
        ("C:\\" + "d" * 300, "\\\\?\\C:\\" + "d" * 300),
        ("C:/" + "d" * 300 + "/x/../y", "\\\\?\\C:\\" + "d" * 300 + "\\y"),
        ("\\\\server\\share\\" + "d" * 300, "\\\\?\\UNC\\server\\share\\" + "d" * 300),
        ("\\\\?\\C:\\" + "d" * 300, "\\\\?\\C:\\" + "d" * 300),
        ("\\\\?\\UNC\\server\\share\\" + "d" * 300, "\\\\?\\UNC\\server\\share\\" + "d" * 300),
        ("\\\\.\\C:\\" + "d" * 300, "\\\\.\\C:\\" + "d" * 300),
        ("/home/" + "d" * 300, "/home/" + "d" * 300),
    ],
)
def test_long_paths(path: str, expected: str) -> None:
    assert extended(path) == expected
    assert extended(expected) == expected
    assert not plain(extended(path)).startswith("\\\\?\\")
    assert plain(plain(path)) == plain(path)


def test_every_call_takes_long_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `C:` in a directory of POSIX. What is not a call of kernel32 is Python's own, and gets the same path."""
    system, kernel = stand_in(drive=str(tmp_path))
    files = LocalFiles(portable=True, system=system)
    directory = "C:\\" + "\\".join(["d" * 100] * 3)
    (tmp_path / "/".join(["d" * 100] * 3)).mkdir(parents=True)
    given: dict[str, set[str]] = {}
    real = os.lstat
    for name, answer in (("lstat", os.lstat(tmp_path)), ("listdir", []), ("makedirs", None)):

        def note(path: str, *_: object, name: str = name, answer: object = answer) -> object:
            if path.startswith("/"):
                return real(path)  # the stand-in's own call
            given.setdefault(name, set()).add(path)
            return answer

        monkeypatch.setattr(os, name, note)

    async def go() -> None:
        path = f"{directory}\\x"
        await files.save(path, b"abc", sync=True)
        await files.replace(path, f"{directory}\\y")
        assert await files.load(f"{directory}\\y", 2) == b"ab"
        file = files.file(path, write=True)
        await file.create(PAGE)
        await move_all(files, file.write, [Request(0, aligned_buffer(PAGE))])
        await file.sync()
        await files.unlink(path)
        with pytest.raises(FileNotFoundError) as caught:
            await files.unlink(path)
        assert caught.value.filename == path
        await files.listdir(directory)
        await files.make_directory(directory)

    asyncio.run(go())
    files.close()
    long = f"\\\\?\\{directory}"
    assert set(given) >= {"listdir", "makedirs"}
    assert given["listdir"] == given["makedirs"] == {long}
    assert all(path.startswith(long) for paths in given.values() for path in paths)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["y"]
    assert {call[0] for call in kernel.made("CreateFileW")} == {f"\\\\?\\{directory}\\x", f"\\\\?\\{directory}\\y"}


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("C:\\swap\\con", "con"),
        ("C:\\NUL.txt\\swap", "NUL.txt"),
        ("swap/Com1", "Com1"),
        ("lpt³.x.y", "lpt³.x.y"),
        ("C:\\swap.", "swap."),
        ("C:\\swap \\x", "swap "),
        ("C:\\what?", "what?"),
        ("C:\\a:stream", "a:stream"),
        ("aux .x", "aux .x"),
        ("\\\\server\\share\\prn", "prn"),
        ("\\\\?\\C:\\conout$", "conout$"),
    ],
)
def test_reserved_names_are_refused_in_words(path: str, part: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert reserved_part(path) == part
    monkeypatch.setattr(windows, "HERE", True)
    with pytest.raises(DirectoryError, match=re.escape(repr(part))) as caught:
        Directory.open(path)
    assert caught.value.remedy
    assert caught.value.path == path


@pytest.mark.parametrize(
    "path", ["C:\\swap", "D:/swap/console", "..\\com\\com10\\nulls", "\\\\server\\share\\x.con", "C:\\.swap", "com0", ""]
)
def test_other_names_are_not(path: str) -> None:
    assert reserved_part(path) is None


def test_where_it_is_no_windows_any_name_goes(tmp_path: Path) -> None:
    asyncio.run(Directory.open(tmp_path / "con").close())


@given(st.text(max_size=80), st.integers(1, 10**15))
@example("CON", 1)
@example("../../etc/passwd", 1)
@example("C:\\x", 1)
@example("nul.", 1)
@example(" . ", 1)
@example("\u0130\u212a\uff23\uff2f\uff2e", 1)  # letters that become others in lower case
@example("x" * 500, 10**15)
def test_no_block_has_a_file_name_that_leads_elsewhere(block: str, number: int) -> None:
    name = names.shard_name(block, number)
    assert reserved_part(name) is None
    assert re.fullmatch(r"[a-z0-9_-]+\.safetensors", name, re.ASCII)
    assert name == name.lower() == name.casefold()
    assert len(name) <= 80
    assert names.is_ours(name)
    assert names.shard_number(name) == number


def test_blocks_that_differ_by_case_only_share_no_file(tmp_path: Path) -> None:
    blocks = {"W": 1.0, "w": 2.0, "É": 3.0, "é": 4.0, "e": 5.0, "\uff37": 6.0, "\uff57": 7.0}
    with TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
        for name, value in blocks.items():
            store.put(name, torch.full((PAGE // 4,), value), tier="nvme")
        files = shard_files(str(tmp_path / "swap"))
        assert len({name.casefold() for name in files}) == len(files) == len(blocks)
        store.commit()
    with TierStore(gpu=8 * PAGE, ram=24 * PAGE, nvme=tmp_path / "swap", device="cpu") as store:
        for name, value in blocks.items():
            assert (store.read(name) == value).all()  # type: ignore[union-attr]


# -- the stand-in itself ------------------------------------------------------------------------------------------------


def test_the_stand_in_refuses_what_was_not_declared() -> None:
    kernel: Any = Kernel32()
    with pytest.raises(AssertionError, match="not declared"):
        kernel.DeleteFileW("x")
    windows.Windows(kernel, kernel, kernel.last_error, as_error)
    with pytest.raises(Exception, match="wrong type"):
        kernel.DeleteFileW(b"x")
    with pytest.raises(AssertionError, match="arguments"):
        kernel.DeleteFileW("x", 1)


def test_loading_is_for_windows_only() -> None:
    if not windows.HERE:
        with pytest.raises(NotImplementedError):
            windows.system()
