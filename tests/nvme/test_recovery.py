"""Bad times: killed processes, forks, full and failing drives, damaged directories."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.nvme.common import contents, shard_files, with_directory
from tierstore.errors import BusyError, DirectoryError, ShardError, TierFullError, TransferError
from tierstore.nvme.directory import Directory
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.shards import Entry, Shard
from tierstore.nvme.space import FIXED_BYTES, footprint

T = TypeVar("T")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def leave_half_a_manifest(path: str) -> None:
    Path(path, "manifest-00000099.json.tmp").write_bytes(b'{"format":1,"gen')


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child and return its wait status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: that is what is tested
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


@needs_fork
@pytest.mark.parametrize("portable", [False, True])
def test_killed_between_commits(swap: str, block_of: Any, payload_of: Any, portable: bool) -> None:
    block = block_of("w", 16 * 4096)

    def one_life(first: int) -> Callable[[], None]:
        async def live(directory: Directory) -> None:
            shard = directory.entries["w"].shard if directory.entries else None
            for step in range(first, first + 3):
                old, shard = shard, await directory.write(block, payload_of(block, step), shard)
                if old is not None and old is not shard:
                    directory.discard(old)
                await directory.commit([Entry(block, shard)], step)
            await directory.write(block, payload_of(block, 99), shard)
            leave_half_a_manifest(swap)
            os.kill(os.getpid(), signal.SIGKILL)

        return lambda: asyncio.run(live(Directory.open(swap, files=LocalFiles(portable=portable))))

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == life * 10 + 2
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, life * 10 + 2)
        assert len(shard_files(swap)) == len(directory.generations), "left-overs are removed"
        assert not [name for name in os.listdir(swap) if name.endswith(".tmp")]

    for life in range(3):
        status = in_child(one_life(life * 10))
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert len(shard_files(swap)) >= 2
        with_directory(swap, check, files=LocalFiles(portable=portable))


@needs_fork
def test_forked_children_are_harmless(swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block))

        def child() -> None:
            directory.forget_in_child()
            asyncio.run(directory.close())
            del directory._lock  # as when the object dies with the child

        assert in_child(child) == 0
        assert shard_files(swap) == {shard.file}

        def intruder() -> None:
            with pytest.raises(BusyError) as caught:
                Directory.open(swap)
            assert caught.value.pid == os.getppid()

        assert in_child(intruder) == 0
        assert await contents(directory, shard) == payload_of(block)
        await directory.commit([Entry(block, shard)])

    with_directory(swap, use)
    with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard))


def busy_life(swap: str, blocks: list[Any], payload_of: Any, said: int, seed: int, portable: bool) -> None:
    """Write, commit and read at once, for ever; each commit that returned is said through the pipe. Metadata: block to seed."""
    rng = random.Random(seed)

    async def live(directory: Directory) -> None:
        shards = {name: entry.shard for name, entry in directory.entries.items()}
        seeds: dict[str, int] = dict(directory.committed.metadata) if directory.committed is not None else {}

        async def write(block: Any) -> None:
            value, old = rng.randrange(10**6), shards.get(block.name)
            shards[block.name] = await directory.write(block, payload_of(block, value), old)
            seeds[block.name] = value
            if old is not None and old is not shards[block.name]:
                directory.discard(old)

        async def commit() -> None:
            generation = await directory.commit([Entry(block, shards[block.name]) for block in blocks], dict(seeds))
            os.write(said, b"%d\n" % generation)

        await asyncio.gather(*(write(block) for block in blocks))
        while True:
            committing = asyncio.ensure_future(commit())
            await asyncio.sleep(0)
            for _ in range(2):
                await asyncio.gather(*(write(block) for block in rng.sample(blocks, 3)))
            await committing
            assert directory.peak_bytes <= directory.limit_bytes

    asyncio.run(live(Directory.open(swap, files=LocalFiles(portable=portable))))


@needs_fork
@pytest.mark.parametrize("portable", [False, True])
def test_killed_at_any_moment(swap: str, block_of: Any, payload_of: Any, portable: bool) -> None:
    """Reopening gives the last generation whose commit had returned, or the one in flight: complete, and nothing else."""
    blocks = [block_of(f"b{number}", (number + 1) * 4096) for number in range(6)]
    rng = random.Random(portable)
    last = 0

    async def check(directory: Directory) -> int:
        if directory.committed is None:
            return 0
        for name, entry in directory.entries.items():
            assert await contents(directory, entry.shard) == payload_of(entry.block, directory.committed.metadata[name])
        assert len(shard_files(swap)) <= len(blocks) * len(directory.generations), "nothing accumulates"
        return directory.committed.generation

    for life in range(5):
        hear, say = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            os.close(hear)
            try:
                busy_life(swap, blocks, payload_of, say, life, portable)
            finally:
                os._exit(1)
        os.close(say)
        time.sleep(rng.uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the child failed by itself"
        with os.fdopen(hear) as heard:
            last = max([last, *map(int, heard)])
        found = with_directory(swap, check, files=LocalFiles(portable=portable))
        assert found in (last, last + 1)
        last = found
    assert last > 5


def filled(swap: str, block_of: Any, payload_of: Any, *, steps: int = 2, **options: Any) -> Any:
    """A directory with `steps` commits of one block; the metadata is the step, and so is the payload's seed."""
    block = block_of()

    async def fill(directory: Directory) -> None:
        shard: Shard | None = None
        for step in range(steps):
            old, shard = shard, await directory.write(block, payload_of(block, step), shard)
            if old is not None:
                directory.discard(old)
            await directory.commit([Entry(block, shard)], step)

    with_directory(swap, fill, **options)
    return block


def test_what_was_never_committed_is_not_deleted_silently(
    swap: str, block_of: Any, payload_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody may have lost the manifests only."""
    filled(swap, block_of, payload_of)
    for path in Path(swap).iterdir():
        if path.name == "CURRENT" or path.name.startswith("manifest-"):
            path.unlink()
    left = shard_files(swap)
    size = sum(Path(swap, name).stat().st_size for name in left)
    assert size

    async def nothing(directory: Directory) -> None:
        assert directory.committed is None

    with_directory(swap, nothing)
    assert f"deleted {len(left)} shards ({size} bytes)" in caplog.text
    assert not shard_files(swap)


def test_a_damaged_newest_manifest(swap: str, block_of: Any, payload_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    block = filled(swap, block_of, payload_of, keep=2)
    newest = Path(swap, "manifest-00000002.json")
    newest.write_bytes(newest.read_bytes().replace(b'"single":false', b'"single":true '))
    before = shard_files(swap)

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == 0
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, 0)
        assert directory.generations == (1,)

    with_directory(swap, check)
    assert "generation 2" in caplog.text
    assert shard_files(swap) == before, "shards that a damaged manifest may name are not thrown away at once"
    with pytest.raises(ShardError, match="generation 2 cannot be opened"):
        Directory.open(swap, generation=2)

    async def go_on(directory: Directory) -> int:
        return await directory.commit(list(directory.entries.values()), "on")

    assert with_directory(swap, go_on, keep=2) == 3
    assert len(shard_files(swap)) == 1
    assert not newest.exists()


def test_damage_names_the_bytes_and_what_may_be_there(swap: str, block_of: Any, payload_of: Any) -> None:
    block = filled(swap, block_of, payload_of, steps=1)
    (name,) = shard_files(swap)
    data = bytearray(Path(swap, name).read_bytes())
    data[5000] ^= 1
    Path(swap, name).write_bytes(data)
    with pytest.raises(ShardError, match=f"chunk 0 \\(bytes 4096 to {4096 + block.nbytes}\\) does not match.*if keep= has kept one"):
        with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard))


def test_nothing_but_damage(swap: str, block_of: Any, payload_of: Any) -> None:
    filled(swap, block_of, payload_of, steps=1)
    manifest = Path(swap, "manifest-00000001.json")
    whole = manifest.read_bytes()
    files = set(os.listdir(swap))
    for bad in (whole[:-5], b"", b"\0" * len(whole), whole.replace(b'"format":1', b'"format":2')):
        manifest.write_bytes(bad)
        with pytest.raises(ShardError, match="generation 1 cannot be opened"):
            Directory.open(swap)
        assert set(os.listdir(swap)) - {"tierstore.pid"} == files
    manifest.unlink()
    with pytest.raises(ShardError, match="manifest of generation 1 is missing"):
        Directory.open(swap)
    Path(swap, "CURRENT").write_bytes(whole)  # as if it had been renamed
    with pytest.raises(ShardError, match="CURRENT"):
        Directory.open(swap)
    assert set(os.listdir(swap)) - {"tierstore.pid"} == files - {manifest.name}
    manifest.write_bytes(whole)
    with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard))


# -- which store a directory is --------------------------------------------------------------------------------------------


def store_of(path: Path) -> str:
    return str(json.loads(path.read_bytes())["store"])


def stores_in(swap: str) -> set[str]:
    return {store_of(path) for path in Path(swap).iterdir() if path.name == "CURRENT" or path.name.startswith("manifest-")}


def opened(swap: str, **options: Any) -> tuple[str, Any]:
    """Which store it is, and the metadata of what was committed."""

    async def look(directory: Directory) -> tuple[str, Any]:
        return directory.store, None if directory.committed is None else directory.committed.metadata

    return with_directory(swap, look, **options)


def put_manifest(source: str, target: str, generation: int) -> None:
    name = f"manifest-{generation:08d}.json"
    shutil.copy(Path(source, name), Path(target, name))


@pytest.fixture
def other(tmp_path: Path, block_of: Any, payload_of: Any) -> str:
    """Another store, with generations 1 to 3, of the same block in shards of the same names."""
    filled(str(tmp_path / "other"), block_of, payload_of, steps=3, keep=3)
    return str(tmp_path / "other")


def test_each_directory_says_which_store_it_is(swap: str, other: str, block_of: Any, payload_of: Any) -> None:
    first, _ = opened(swap)
    assert opened(swap)[0] != first, "nobody knows it before the first commit"
    filled(swap, block_of, payload_of, keep=3)
    (store,) = stores_in(swap)
    assert opened(swap) == (store, 1)
    assert opened(swap, generation=1) == (store, 0)

    async def go_on(directory: Directory) -> int:
        return await directory.commit(list(directory.entries.values()), "on")

    assert with_directory(swap, go_on, keep=3) == 3
    assert stores_in(swap) == {store}
    assert stores_in(other) not in ({store}, {first})


@pytest.mark.parametrize("nth", range(2))
def test_a_first_commit_that_ends_before_current(files: Any, swap: str, block_of: Any, payload_of: Any, nth: int) -> None:
    """Neither where the manifest had no name yet, nor where it had one and there was no `CURRENT`."""
    block = block_of()

    async def fail(directory: Directory) -> str:
        shard = await directory.write(block, payload_of(block))
        fail_later(files, "replace", nth)
        with contextlib.suppress(TransferError):
            await directory.commit([Entry(block, shard)], "first")
        return directory.store

    first = with_directory(swap, fail, files=files)
    assert not Path(swap, "CURRENT").exists()
    Path(swap, "CURRENT.tmp").write_bytes(b"")
    store, metadata = opened(swap)
    assert (store == first, metadata) == ((True, "first") if nth else (False, None))
    filled(swap, block_of, payload_of)
    assert opened(swap)[1] == 1
    assert stores_in(swap) == {first} if nth else len(stores_in(swap)) == 1


def test_between_the_manifest_and_current(swap: str, tmp_path: Path, block_of: Any, payload_of: Any) -> None:
    """An old `CURRENT` of the same store, none, and a damaged one."""
    filled(swap, block_of, payload_of, steps=1, keep=2)
    old = Path(swap, "CURRENT").read_bytes()
    filled(swap, block_of, payload_of, steps=1, keep=2)
    (store,) = stores_in(swap)
    for current in (old, old[:-4], b""):
        Path(swap, "CURRENT").write_bytes(current)
        assert opened(swap, keep=2) == (store, 0)
        assert opened(swap, keep=2, generation=1) == (store, 0)
    Path(swap, "CURRENT").unlink()
    assert opened(swap, keep=2) == (store, 0)


def test_a_manifest_of_another_store(swap: str, other: str, block_of: Any, payload_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is damage: an older generation of this store is opened, and the file goes only when a new commit is durable."""
    block = filled(swap, block_of, payload_of, keep=2)
    (store,), (foreign,) = stores_in(swap), stores_in(other)
    put_manifest(other, swap, 2)
    put_manifest(other, swap, 3)
    shards = shard_files(swap)
    assert opened(swap, keep=2) == (store, 0)
    assert "generation 3" in caplog.text
    assert shard_files(swap) == shards
    with pytest.raises(ShardError, match=f"manifest-00000003.json.*belongs to another store.*{store}.*{foreign}") as caught:
        Directory.open(swap, generation=3)
    assert caught.value.generation == 3

    async def go_on(directory: Directory) -> int:
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, 0)
        return await directory.commit(list(directory.entries.values()), "on")

    assert with_directory(swap, go_on) == 4
    assert stores_in(swap) == {store}


@pytest.mark.parametrize("generation", [None, 1, 2])
def test_files_of_different_stores_and_nothing_that_decides(
    swap: str, other: str, block_of: Any, payload_of: Any, generation: int | None
) -> None:
    filled(swap, block_of, payload_of, keep=2)
    (store,), (foreign,) = stores_in(swap), stores_in(other)
    own = {path.name: path.read_bytes() for path in Path(swap).iterdir()}

    def refused(*said: str) -> str:
        before = {path.name: path.read_bytes() for path in Path(swap).iterdir() if path.name != "tierstore.pid"}
        with pytest.raises(ShardError, match="different stores") as caught:
            Directory.open(swap, generation=generation)
        assert {path.name: path.read_bytes() for path in Path(swap).iterdir() if path.name != "tierstore.pid"} == before
        assert all(text in str(caught.value) for text in (store, foreign, *said))
        assert set(caught.value.stores) == {store, foreign}
        return str(caught.value.remedy)

    shutil.copy(Path(other, "CURRENT"), Path(swap, "CURRENT"))
    assert "delete CURRENT" in refused("CURRENT", "manifest-00000001.json", "manifest-00000002.json")
    Path(swap, "CURRENT").unlink()
    assert opened(swap, keep=2) == (store, 1)
    put_manifest(other, swap, 2)
    assert "restore CURRENT" in refused("manifest-00000001.json", "manifest-00000002.json")
    Path(swap, "CURRENT").write_bytes(b"rubbish")
    assert "restore CURRENT" in refused("manifest-00000001.json", "manifest-00000002.json")
    Path(swap, "CURRENT").write_bytes(own["CURRENT"])
    put_manifest(other, swap, 1)
    assert "restore the manifest" in refused("CURRENT", "manifest-00000001.json", "manifest-00000002.json")
    Path(swap, "manifest-00000002.json").write_bytes(own["manifest-00000002.json"])
    assert opened(swap, keep=2) == (store, 1)


def test_missing_shortened_and_linked_shards(swap: str, tmp_path: Path, block_of: Any, payload_of: Any) -> None:
    filled(swap, block_of, payload_of, steps=1)
    shard = Path(swap, *shard_files(swap))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ShardError, match="block 'w'") as caught:
        Directory.open(swap)
    assert caught.value.blocks == ("w",)
    shard.unlink()
    with pytest.raises(ShardError, match="is missing"):
        Directory.open(swap)
    (tmp_path / "elsewhere").write_bytes(whole)
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DirectoryError, match="link"):
        Directory.open(swap)
    assert (tmp_path / "elsewhere").read_bytes() == whole


def test_a_failed_sync_is_never_retried_on_the_same_file(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of("w", 3 << 20)

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        first = shard.file
        files.fail("file.sync")
        with pytest.raises(TransferError, match="syncing block 'w'") as caught:
            await directory.commit([Entry(block, shard)])
        assert caught.value.block == "w"
        assert directory.committed is None
        assert shard.references == 0
        assert await contents(directory, shard) == payload_of(block, 1)
        await directory.commit([Entry(block, shard)])
        assert shard.file != first
        assert sum(entry == f"file.sync {first}" for entry in files.log) == 1
        assert await contents(directory, shard) == payload_of(block, 1)
        other = await directory.write(block, payload_of(block, 2), shard)
        files.fail("file.sync")
        with pytest.raises(TransferError):
            await directory.commit([Entry(block, other)])
        assert await directory.write(block, payload_of(block, 3), other) is not other
        directory.discard(other)
        reused = directory.reused_files
        await directory.write(block, payload_of(block, 4))
        assert directory.reused_files == reused, "nor is the file written again"

    with_directory(swap, use, files=files)
    assert with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard), files=files) == payload_of(block, 1)


CALLS_OF_A_COMMIT = {"save": 2, "sync_directory": 3, "replace": 2}


@pytest.mark.parametrize(("operation", "nth"), [(operation, nth) for operation, calls in CALLS_OF_A_COMMIT.items() for nth in range(calls)])
def test_commits_that_fail_halfway(files: Any, swap: str, block_of: Any, payload_of: Any, operation: str, nth: int) -> None:
    """Whatever fails, the store goes on, and what recovery finds is a committed state whose shards are intact."""
    block = block_of()

    async def use(directory: Directory) -> int:
        shard = await directory.write(block, payload_of(block, 0))
        await directory.commit([Entry(block, shard)], 0)
        newest = 0
        for step in range(1, 5):
            old, shard = shard, await directory.write(block, payload_of(block, step), shard)
            if old is not shard:
                directory.discard(old)
            if step == 2:
                fail_later(files, operation, nth)
            try:
                await directory.commit([Entry(block, shard)], step)
                newest = step
            except TransferError:
                assert step == 2
        return newest

    assert with_directory(swap, use, files=files) == 4

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == 4
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, 4)

    with_directory(swap, check, files=files)
    assert len(shard_files(swap)) == (1 if files.syncs_directories else 2)


def test_a_commit_in_doubt_takes_no_good_ones_place(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> tuple[int, ...]:
        shard: Shard | None = None
        for step in range(1, 5):
            old, shard = shard, await directory.write(block, payload_of(block, step), shard)
            if old is not None and old is not shard:
                directory.discard(old)
            if step == 3:
                files.fail("replace")
                with pytest.raises(TransferError, match="naming the manifest"):
                    await directory.commit([Entry(block, shard)], step)
                assert 3 not in directory.generations
            else:
                await directory.commit([Entry(block, shard)], step)
        return directory.generations

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == directory.committed.generation
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, directory.committed.metadata)

    generations = with_directory(swap, use, keep=2, files=files)
    assert generations[-2:] == (2, 4)
    for generation in generations:
        with_directory(swap, check, generation=generation, files=files)


def test_commits_in_doubt_do_not_pile_up(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    """Each kept its shards until a commit succeeded, and with a limit none could any more."""
    block = block_of("w", 64 * 4096)
    limit = FIXED_BYTES + (3 if files.syncs_directories else 4) * (footprint(block.nbytes + 4096) + footprint(8192))

    async def use(directory: Directory) -> None:
        shard: Shard | None = None
        for step in range(8):
            old, shard = shard, await directory.write(block, payload_of(block, step), shard)
            if old is not None and old is not shard:
                directory.discard(old)
            if 1 <= step <= 4:
                files.fail("replace")
                with pytest.raises(TransferError, match="naming the manifest"):
                    await directory.commit([Entry(block, shard)], step)
            else:
                await directory.commit([Entry(block, shard)], step)
            assert directory.used_bytes <= limit

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == 7
        assert await contents(directory, directory.entries["w"].shard) == payload_of(block, 7)

    with_directory(swap, use, files=files, limit=limit)
    with_directory(swap, check, files=files)


@pytest.mark.parametrize("nth", [0, 1])
def test_pooled_files_make_room_for_what_a_commit_writes(files: Any, swap: str, block_of: Any, payload_of: Any, nth: int) -> None:
    """On a full drive the manifest found no room, and gigabytes of freed files waited beside it."""
    block, other = block_of(), block_of("other")

    async def use(directory: Directory) -> None:
        shard, second = await directory.write(block, payload_of(block)), await directory.write(other, payload_of(other))
        await directory.commit([Entry(block, shard), Entry(other, second)])
        for step in range(2):
            newer = await directory.write(block, payload_of(block, step), shard)
            directory.discard(shard)
            shard = newer
            assert await directory.commit([Entry(block, shard), Entry(other, second)], step)
        pooled = set(directory._space._pool)
        assert pooled
        fail_later(files, "save", nth, errno.ENOSPC)
        assert await directory.commit([Entry(block, shard), Entry(other, second)], "full")
        assert not pooled & shard_files(swap)

    async def check(directory: Directory) -> None:
        assert directory.committed is not None
        assert directory.committed.metadata == "full"

    with_directory(swap, use, files=files)
    with_directory(swap, check, files=files)


def test_a_file_that_cannot_be_made_whole_leaves_nothing(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    """An error of close() came through as it was, and the file stayed."""
    block = block_of()

    async def use(directory: Directory) -> None:
        used = directory.used_bytes
        files.fail("file.close", errno.EDQUOT)
        with pytest.raises(TierFullError, match="making a file for block 'w'"):
            await directory.write(block, payload_of(block))
        assert directory.used_bytes == used
        assert not shard_files(swap)

    with_directory(swap, use, files=files)


def test_an_error_of_close_is_one_of_the_bytes(
    files: Any, swap: str, block_of: Any, payload_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond so many unsynced handles the oldest are closed; what a file system tells only then was passed over."""
    if files.portable:
        pytest.skip("no handle stays open there")
    block, other = block_of(), block_of("other")
    monkeypatch.setattr("tierstore.nvme.shelf.MAX_UNSYNCED_HANDLES", 0)

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        files.fail("file.close")
        await directory._close_retired()
        assert shard.suspect
        first = shard.file
        await directory.commit([Entry(block, shard)])
        assert shard.file != first
        await directory.write(other, payload_of(other))

    with_directory(swap, use, files=files)
    assert with_directory(swap, lambda directory: contents(directory, directory.entries["w"].shard)) == payload_of(block, 1)


def test_what_cannot_be_deleted_now_is_deleted_later(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    """A virus scanner that had it open kept it counted, and on the drive, for as long as the store was open."""
    block = block_of()

    async def use(directory: Directory) -> None:
        kept = await directory.write(block, payload_of(block))
        await directory.commit([Entry(block, kept)])
        used = directory.used_bytes
        for pages in (5, 6, 7):
            passing = block_of("x", pages * 4096)
            directory.discard(await directory.write(passing, payload_of(passing)))
        files.fail("unlink", errno.EBUSY, times=2)
        await directory._space.trim()
        assert directory.used_bytes > used
        await directory.commit([Entry(block, kept)])
        manifests = 0 if files.syncs_directories else footprint(4096)  # one more is kept there
        assert directory.used_bytes <= used + manifests
        assert len(shard_files(swap)) == 1

    with_directory(swap, use, files=files)


def fail_later(files: Any, operation: str, nth: int, code: int = errno.EIO) -> None:
    """Let `operation` fail once, after `nth` further calls."""
    pass_by = type(files).pass_by
    left = nth

    def counting(name: str, path: str) -> None:
        nonlocal left
        if name == operation:
            left -= 1
            if left == -1:
                raise OSError(code, os.strerror(code))
        pass_by(files, name, path)

    files.pass_by = counting


def test_failed_writes_in_place_are_not_trusted(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 1))
        files.fail("file.write")
        with pytest.raises(TransferError, match="writing block 'w'"):
            await directory.write(block, payload_of(block, 2), shard)
        assert shard.broken
        newer = await directory.write(block, payload_of(block, 2), shard)
        assert newer is not shard
        directory.discard(shard)
        used = directory.used_bytes
        files.fail("file.write", errno.ENOSPC)
        with pytest.raises(TierFullError, match="drive ran full"):
            await directory.write(block, payload_of(block, 3))
        await directory.commit([Entry(block, newer)])
        assert directory.used_bytes <= used
        files.fail("file.read")
        with pytest.raises(TransferError, match="reading block 'w'") as caught:
            await contents(directory, newer)
        assert caught.value.path == directory.path_of(newer)
        assert await contents(directory, newer) == payload_of(block, 2)

    with_directory(swap, use, files=files)


def test_a_full_drive_costs_only_the_pool(files: Any, swap: str, block_of: Any, payload_of: Any) -> None:
    block, other = block_of(), block_of("other", 8 * 4096)

    async def use(directory: Directory) -> None:
        kept = await directory.write(block, payload_of(block))
        directory.discard(await directory.write(block, payload_of(block)))
        used = directory.used_bytes
        files.fail("file.create", errno.ENOSPC)
        shard = await directory.write(other, payload_of(other))  # after giving up the pooled file
        assert await contents(directory, shard) == payload_of(other)
        assert len(shard_files(swap)) == 2
        files.fail("file.create", errno.ENOSPC)
        used = directory.used_bytes
        with pytest.raises(TierFullError) as caught:
            await directory.write(other, payload_of(other))
        assert caught.value.remedy
        assert directory.used_bytes == used
        await directory.commit([Entry(block, kept), Entry(other, shard)])

    with_directory(swap, use, files=files)


def test_the_order_of_a_commit(swap: str, block_of: Any, payload_of: Any, files: Any) -> None:
    if files.portable:
        pytest.skip("directories are not synced there")
    block = block_of()

    async def use(directory: Directory) -> None:
        shard = await directory.write(block, payload_of(block, 0))
        await directory.commit([Entry(block, shard)])
        newer = await directory.write(block, payload_of(block, 1), shard)
        directory.discard(shard)
        files.log.clear()
        await directory.commit([Entry(block, newer)])
        assert [entry for entry in files.log if not entry.startswith("file.close")] == [
            f"file.sync {newer.file}",
            "save manifest-00000002.json.tmp",
            "sync_directory swap",
            "replace manifest-00000002.json",
            "sync_directory swap",
            "save CURRENT.tmp",
            "replace CURRENT",
            "unlink manifest-00000001.json",
            "unlink manifest-00000001.json.tmp",
            "sync_directory swap",
        ]
        files.log.clear()
        await directory.commit([Entry(block, newer)])
        assert not [entry for entry in files.log if entry.startswith("file.")], "what did not change is not synced again"

    with_directory(swap, use, files=files)
