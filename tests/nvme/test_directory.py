"""A directory in good times: writing, reading, committing, reopening; which files are touched; the limit; the lock."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from safetensors.torch import load_file

from tests.nvme.common import contents, kept, shard_files, with_directory
from tierstore.catalog import FILLER_PREFIX, Block
from tierstore.errors import BusyError, ClosedError, DirectoryError, OptionError, ShardError, TierFullError
from tierstore.nvme.checksums import CHUNK_BYTES
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import aligned_buffer
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.shards import Entry, Shard
from tierstore.nvme.space import FIXED_BYTES, footprint
from tierstore.nvme.system import Posix

T = TypeVar("T")


def snapshot(path: str) -> tuple[bytes, int]:
    return Path(path).read_bytes(), os.stat(path).st_mtime_ns


def measured(path: str) -> int:
    """What the directory takes by the system's own count."""
    return sum(os.lstat(os.path.join(path, name)).st_blocks * 512 for name in os.listdir(path)) + os.stat(path).st_blocks * 512


def test_write_read_commit_reopen(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    blocks = [block_of("layer.0", 4096), block_of("gewicht/é☃", 5 * 4096), block_of("con", CHUNK_BYTES + 8192)]
    payloads = {block.name: payload_of(block, seed) for seed, block in enumerate(blocks)}

    async def first(directory: Directory) -> None:
        assert directory.committed is None
        assert not directory.entries
        entries = [Entry(block, await directory.write(block, payloads[block.name])) for block in blocks]
        for entry in entries:
            assert await contents(directory, entry.shard) == payloads[entry.block.name]
        assert await directory.commit(entries, {"step": 3}) == 1
        assert directory.committed is not None
        assert directory.committed.metadata == {"step": 3}

    async def second(directory: Directory) -> None:
        assert directory.committed is not None
        assert (directory.committed.generation, directory.committed.metadata) == (1, {"step": 3})
        assert list(directory.entries) == [block.name for block in blocks]
        for name, entry in directory.entries.items():
            assert entry.block == next(block for block in blocks if block.name == name)
            assert await contents(directory, entry.shard) == payloads[name]

    with_directory(swap, first, files=files)
    assert os.stat(swap).st_mode & 0o777 == 0o700
    with_directory(swap, second, files=files)
    for block, name in zip(blocks, sorted(shard_files(swap), key=lambda name: name[-20:]), strict=True):
        tensors = {key: value for key, value in load_file(os.path.join(swap, name)).items() if not key.startswith(FILLER_PREFIX)}
        assert {key: tuple(value.shape) for key, value in tensors.items()} == {spec.name: spec.shape for spec in block.tensors}
        for spec in block.tensors:
            assert tensors[spec.name].numpy().tobytes() == payloads[block.name][spec.offset : spec.offset + spec.nbytes]


def test_parts_of_a_payload(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 2 * CHUNK_BYTES + 8192)
    payload = payload_of(block)

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload)
        for offset, nbytes in ((0, 4096), (4096, CHUNK_BYTES), (CHUNK_BYTES - 4096, 8192), (2 * CHUNK_BYTES, 8192), (5, 1000), (0, 0)):
            into = aligned_buffer(nbytes)
            await directory.read(shard, into, offset=offset)
            assert into == payload[offset : offset + nbytes]
        with pytest.raises(ValueError, match="not within"):
            await directory.read(shard, aligned_buffer(4096), offset=block.nbytes)

    with_directory(swap, use, files=files)


def test_committed_shards_are_never_touched(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        working = await directory.write(block, payload_of(block, 1))
        again = await directory.write(block, payload_of(block, 2), working)
        assert again is working, "between commits, shards are rewritten in place"
        assert directory.created_files == 1
        await directory.commit([Entry(block, working)])
        path = directory.path_of(working)
        before = snapshot(path)
        newer = await directory.write(block, payload_of(block, 3), working)
        assert newer is not working
        directory.discard(working)
        assert await directory.write(block, payload_of(block, 4), newer) is newer
        assert snapshot(path) == before
        assert await contents(directory, newer) == payload_of(block, 4)

    async def reopened(directory: Directory) -> None:
        entry = directory.entries["w"]
        assert await contents(directory, entry.shard) == payload_of(block, 2)
        assert await directory.write(block, payload_of(block, 5), entry.shard) is not entry.shard

    with_directory(swap, use, files=files)
    assert len(shard_files(swap)) == 1, "what was not committed is gone"
    with_directory(swap, reopened, files=files)
    assert len(shard_files(swap)) == 1


def test_a_shard_with_a_second_name_is_never_touched(files: Any, swap: str, tmp_path: Path, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        os.link(directory.path_of(shard), tmp_path / "exported")
        exported = (tmp_path / "exported").read_bytes()
        newer = await directory.write(block, payload_of(block, 2), shard)
        assert newer is not shard
        directory.discard(shard)  # its file waits to be reused: but not this one
        third = await directory.write(block, payload_of(block, 3))
        assert (tmp_path / "exported").read_bytes() == exported
        assert await contents(directory, third) == payload_of(block, 3)

    with_directory(swap, use, files=files)


def test_freed_files_are_rewritten_not_reallocated(swap: str, block_of: Any, payload_of: Any) -> None:
    blocks = [block_of(f"b{number}", 8192) for number in range(4)]

    async def use(directory: Directory) -> None:
        shards: dict[str, Shard] = {}
        sizes = []
        for step in range(6):
            for block in blocks:
                old = shards.get(block.name)
                shards[block.name] = await directory.write(block, payload_of(block, step), old)
                if old is not None and old is not shards[block.name]:
                    directory.discard(old)
            await directory.commit([Entry(block, shards[block.name]) for block in blocks])
            sizes.append(directory.used_bytes)
            assert measured(swap) <= directory.used_bytes
        assert directory.created_files == 4 * (kept() + 1), "one generation's worth beyond those kept, whatever the number of commits"
        assert directory.reused_files == 4 * 6 - directory.created_files
        assert sizes[kept() :] == [sizes[kept()]] * (6 - kept())
        for block in blocks:
            assert await contents(directory, shards[block.name]) == payload_of(block, 5)

    with_directory(swap, use)


def test_unchanged_blocks_keep_their_shards(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    still, moving = block_of("still"), block_of("moving")

    async def use(directory: Directory) -> None:
        kept = Entry(still, await directory.write(still, payload_of(still)))
        shard = await directory.write(moving, payload_of(moving))
        for step in range(3):
            await directory.commit([kept, Entry(moving, shard)], step)
            old, shard = shard, await directory.write(moving, payload_of(moving, step), shard)
            directory.discard(old)
        assert kept.shard.references == (1 if directory.files.syncs_directories else 2)
        assert await contents(directory, kept.shard) == payload_of(still)

    with_directory(swap, use, files=files)
    with_directory(swap, lambda directory: contents(directory, directory.entries["still"].shard), files=files)


def test_older_generations(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def fill(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 0))
        for step in range(1, 6):
            await directory.commit([Entry(block, shard)], step - 1)
            old, shard = shard, await directory.write(block, payload_of(block, step), shard)
            directory.discard(old)
        assert directory.generations[-3:] == (3, 4, 5)

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        step = directory.committed.metadata
        assert step == directory.committed.generation - 1
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, step)

    async def go_on(directory: Directory) -> int:
        await check(directory)
        old = directory.entries["w"].shard
        shard = await directory.write(block, payload_of(block, 77), old)
        directory.discard(old)
        generation = await directory.commit([Entry(block, shard)], 77)
        assert len(shard_files(swap)) <= 2 * len(directory.generations), "shards of generations left behind do not stay"
        return generation

    with_directory(swap, fill, keep=3, files=files)
    for generation in (3, 4, 5, None):
        with_directory(swap, check, generation=generation, files=files)
    with pytest.raises(DirectoryError, match="3, 4, 5") as caught:
        Directory.open(swap, generation=1, files=files)
    assert caught.value.available[-3:] == (3, 4, 5)
    assert with_directory(swap, go_on, generation=4, keep=1, files=files) == 6
    assert len(shard_files(swap)) == (1 if files.syncs_directories else 2), "the generations that were left go, with their shards"


def test_streaming_writes(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 2 * CHUNK_BYTES + 8192)
    payload = payload_of(block)

    async def use(directory: Directory) -> None:
        old = await directory.write(block, payload_of(block, 9))
        writer = await directory.create(block)
        with pytest.raises(ValueError, match="whole pages"):
            await writer.write(0, payload[:100])
        with pytest.raises(ValueError, match="does not continue"):
            await writer.write(4096, payload[4096:8192])
        await writer.write(CHUNK_BYTES, payload[CHUNK_BYTES : 2 * CHUNK_BYTES + 4096])
        with pytest.raises(ValueError, match="bytes are written"):
            await writer.finish()
        for offset in range(0, CHUNK_BYTES, CHUNK_BYTES // 4):
            await writer.write(offset, payload[offset : offset + CHUNK_BYTES // 4])
        await writer.write(2 * CHUNK_BYTES + 4096, payload[2 * CHUNK_BYTES + 4096 :])
        shard = await writer.finish()
        assert await contents(directory, shard) == payload
        assert await contents(directory, old) == payload_of(block, 9)
        at_once = await directory.write(block, payload)
        assert shard.chunks == at_once.chunks
        used = directory.used_bytes
        writer = await directory.create(block)
        assert directory.used_bytes > used
        await writer.abort()
        assert directory.used_bytes == used
        assert len(shard_files(swap)) == 3

    with_directory(swap, use, files=files)


def test_the_limit_is_hard(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 16 * 4096)
    shard_bytes = block.nbytes + 4096
    limit = FIXED_BYTES + 3 * footprint(shard_bytes) + footprint(4096)

    async def use(directory: Directory) -> None:
        shards = [await directory.write(block, payload_of(block, number)) for number in range(3)]
        before = set(os.listdir(swap)), directory.used_bytes
        with pytest.raises(TierFullError, match="tier 'nvme' is full") as caught:
            await directory.write(block, payload_of(block))
        assert caught.value.need
        assert caught.value.have
        assert caught.value.remedy
        assert caught.value.block == "w"
        assert (set(os.listdir(swap)), directory.used_bytes) == before, "nothing was written"
        assert await directory.write(block, payload_of(block, 8), shards[0]) is shards[0]
        directory.discard(shards[1])
        other = block_of("other", 20 * 4096)  # of another length, so a pooled file has to go
        with pytest.raises(TierFullError):
            await directory.write(other, payload_of(other))
        directory.discard(shards[2])
        await directory.write(other, payload_of(other))
        assert await contents(directory, shards[0]) == payload_of(block, 8)
        await directory.commit([Entry(block, shards[0])])
        with pytest.raises(TierFullError, match="the manifest"):
            await directory.commit([Entry(block, shards[0])], "x" * 100_000)
        assert directory.committed is not None
        assert directory.committed.generation == 1
        assert await directory.commit([Entry(block, shards[0])], "x") == 2
        assert directory.peak_bytes <= directory.limit_bytes == limit
        assert measured(swap) <= directory.used_bytes

    with_directory(swap, use, limit=limit, files=files)
    with pytest.raises(TierFullError, match="nvme_limit"):
        Directory.open(swap, limit=FIXED_BYTES + 8192, files=files)
    with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard), limit=limit, files=files)


def test_many_at_once_stay_within_the_limit(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    """Writers, readers and commits at once, with little room: right bytes, and never more on the drive than counted."""
    rng = random.Random(3)
    blocks = [block_of(f"b{number}", rng.randrange(1, 40) * 4096) for number in range(8)]
    live = sum(footprint(block.nbytes + 4096) for block in blocks)
    limit = FIXED_BYTES + int(2.2 * live) + 8 * footprint(8192)
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                samples.append(measured(swap))

    async def use(directory: Directory) -> None:
        shards: dict[str, Shard] = {}
        full = 0

        async def live(block: Block, seed: int) -> None:
            nonlocal full
            mine = random.Random(seed)
            newest = 0
            for step in range(15):
                old = shards.get(block.name)
                try:
                    shards[block.name] = await directory.write(block, payload_of(block, step), old)
                    newest = step
                except TierFullError:
                    full += 1
                    assert old is not None
                if old is not None and old is not shards[block.name]:
                    directory.discard(old)
                if mine.random() < 0.5:
                    assert await contents(directory, shards[block.name]) == payload_of(block, newest)

        async def commit() -> None:
            for _ in range(12):
                whole = [Entry(block, shards[block.name]) for block in blocks if block.name in shards and shards[block.name].whole]
                with contextlib.suppress(TierFullError):  # no room for the manifest beside so many writers
                    await directory.commit(whole)
                await asyncio.sleep(0)

        await asyncio.gather(*(live(block, seed) for seed, block in enumerate(blocks)), commit())
        assert directory.peak_bytes <= limit

    sampler = threading.Thread(target=sample)
    os.mkdir(swap)
    sampler.start()
    try:
        with_directory(swap, use, limit=limit, files=files)
    finally:
        done.set()
        sampler.join()
    assert max(samples) <= limit


def test_without_a_limit_the_free_space_counts(swap: str) -> None:
    async def use(directory: Directory) -> None:
        free = os.statvfs(swap).f_bavail * os.statvfs(swap).f_frsize
        assert 0.5 * free < directory.limit_bytes < free

    with_directory(swap, use)


def test_checksums_are_verified_at_the_first_read(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", CHUNK_BYTES + 8192)

    async def fill(directory: Directory) -> str:
        shard = await directory.write(block, payload_of(block))
        await directory.commit([Entry(block, shard)])
        return directory.path_of(shard)

    path = with_directory(swap, fill, files=files)

    def flip(offset: int) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 4]))

    async def refused(directory: Directory) -> Any:
        for _ in range(2):
            with pytest.raises(ShardError) as caught:
                await contents(directory, directory.entries["w"].shard)
        assert caught.value.block == "w"
        assert caught.value.path == path
        assert os.path.basename(path) in str(caught.value)
        return caught.value.chunk

    async def part_refused(directory: Directory) -> Any:
        """What is damaged lies outside of what is asked for, but in its chunk."""
        shard = directory.entries["w"].shard
        with pytest.raises(ShardError) as caught:
            for offset in (8192, CHUNK_BYTES + 4096):
                await directory.read(shard, aligned_buffer(4096), offset=offset)
        return caught.value.chunk

    for offset, chunk in ((20, None), (5000, 0), (4096 + CHUNK_BYTES + 100, 1)):
        flip(offset)
        assert with_directory(swap, refused, files=files) == chunk
        assert with_directory(swap, part_refused, files=files) == chunk
        with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard), checksum=False, files=files)
        flip(offset)
    with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard), files=files)


def test_without_checksums(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def fill(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block))
        assert shard.chunks is None
        await directory.commit([Entry(block, shard)])

    with_directory(swap, fill, checksum=False, files=files)
    assert with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard), files=files) == payload_of(block)


def test_a_shard_read_while_it_is_discarded_stays(swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 2 * CHUNK_BYTES)

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        reading = asyncio.ensure_future(contents(directory, shard))
        await asyncio.sleep(0)
        directory.discard(shard)
        await directory.write(block, payload_of(block, 2))
        assert await reading == payload_of(block, 1)

    with_directory(swap, use)


def test_cancelled_writes_leave_nothing(swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 64 * 4096)

    async def use(directory: Directory) -> None:
        base = directory.used_bytes
        for delay in (0, 1, 2, 5, 20):
            task = asyncio.ensure_future(directory.write(block, payload_of(block)))
            for _ in range(delay):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        shard = await directory.write(block, payload_of(block))
        assert directory.used_bytes == base + footprint(block.nbytes + 4096), "all used one file, one after the other"
        task = asyncio.ensure_future(directory.commit([Entry(block, shard)]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert shard.references == len(directory.generations) == 1, "a commit under way is finished"

    with_directory(swap, use)


def test_the_lock(swap: str, block_of: Any) -> None:
    first = Directory.open(swap)
    with pytest.raises(BusyError, match=str(os.getpid())) as caught:
        Directory.open(swap)
    assert caught.value.pid == os.getpid()
    asyncio.run(first.close())
    asyncio.run(first.close())
    second = Directory.open(swap)
    with pytest.raises(ClosedError):
        asyncio.run(first.create(block_of()))
    asyncio.run(second.close())


def test_opening_beside_a_running_loop_and_on_any_thread(swap: str) -> None:
    async def go() -> None:
        directory = Directory.open(swap)
        await directory.close()

    asyncio.run(go())
    opened: list[Directory] = []
    thread = threading.Thread(target=lambda: opened.append(Directory.open(swap)))
    thread.start()
    thread.join()
    asyncio.run(opened[0].close())


def test_foreign_files_are_refused_and_left_alone(swap: str) -> None:
    for foreign in ("notes.txt", "model.safetensors", "block-w-00000001.safetensors", ".hidden", "manifest-1.json"):
        os.makedirs(swap, exist_ok=True)
        Path(swap, foreign).write_text("mine", encoding="utf-8")
        with pytest.raises(DirectoryError, match=foreign.replace(".", r"\.")):
            Directory.open(swap)
        assert os.listdir(swap) == [foreign]
        assert Path(swap, foreign).read_text(encoding="utf-8") == "mine"
        os.unlink(os.path.join(swap, foreign))
    os.mkdir(os.path.join(swap, "sub"))
    with pytest.raises(DirectoryError, match="sub"):
        Directory.open(swap)


def test_places_that_cannot_be_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(DirectoryError, match="not a directory"):
        Directory.open(tmp_path / "file")
    with pytest.raises(DirectoryError, match="cannot be used"):
        Directory.open(tmp_path / "file" / "below")

    async def read_only(self: LocalFiles, path: str, data: bytes, *, sync: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFiles, "save", read_only)
    with pytest.raises(DirectoryError, match="writable"):
        Directory.open(tmp_path / "new")
    monkeypatch.undo()
    asyncio.run(Directory.open(tmp_path / "new").close())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DirectoryError, match="cannot be used"):
        Directory.open(tmp_path / "locked")


def test_bad_options(swap: str) -> None:
    with pytest.raises(OptionError, match="keep"):
        Directory.open(swap, keep=0)
    assert not os.path.exists(swap)
    with pytest.raises(OptionError, match="direct_io"):
        Directory.open(swap, direct_io="yes")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="direct"):
        Directory.open(swap, direct_io=True, files=LocalFiles(portable=True, system=Posix()))
    asyncio.run(Directory.open(swap).close())


def test_bad_metadata_changes_nothing(swap: str, block_of: Callable[..., Block], payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block))
        with pytest.raises(OptionError, match="JSON"):
            await directory.commit([Entry(block, shard)], {"when": object()})
        assert directory.committed is None
        assert shard.references == 0

    with_directory(swap, use)
