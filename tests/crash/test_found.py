"""What the crash suite has found, each as small as it can be."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.crash.cuts import new_disk
from tests.crash.disk import NOTHING, CrashDisk, Survival
from tests.crash.door import Door
from tests.crash.ledger import Ledger, Value, block_of
from tests.crash.life import PATH, Life, Plan, open_door
from tests.crash.recovery import Checker
from tests.crash.seeds import silence
from tierstore.nvme.local import LocalFiles

PLAIN = Plan(keep=1, checksum=True, limit=None, actions=0, closes=False)


async def begin(disk: CrashDisk, plan: Plan = PLAIN) -> Life:
    life = Life(disk, plan, "found", Ledger())
    life.door = Door(disk)
    await life.open()
    return life


@pytest.mark.parametrize("journaled", [False, True])
def test_shards_are_never_found_without_the_file_that_says_whose_they_are(journaled: bool) -> None:
    """The name of the lock file was lost in a power cut, the names of shards were not: the store's own directory was foreign to it."""

    async def go() -> None:
        disk = new_disk(journaled=journaled, seed="")
        life = await begin(disk)
        await life.write("a")
        left = disk.cut(NOTHING)
        left.create(f"{PATH}/block-a-00000001.safetensors", 10)
        await open_door(Door(left), PLAIN)

    asyncio.run(go())


@pytest.mark.parametrize("journaled", [False, True])
def test_a_commit_that_a_store_was_opened_at_is_there_for_good(journaled: bool) -> None:
    """A process was killed between naming the manifest and making that durable: the next one saw a commit that could still go."""

    async def go() -> None:
        disk = new_disk(journaled=journaled, seed="")
        life = await begin(disk)
        await life.write("a")
        left: list[CrashDisk] = []
        disk.on_replace = lambda now, path: left.append(now.kill(NOTHING)) if "manifest" in path else None  # type: ignore[attr-defined]
        await life.commit()
        killed = left[0]
        directory = await open_door(Door(killed), PLAIN)
        assert directory.committed is not None
        again = await open_door(Door(killed.cut(NOTHING)), PLAIN)
        assert again.committed == directory.committed

    asyncio.run(go())


def test_an_old_generation_does_not_come_back_without_its_shards() -> None:
    """Where directories cannot be synced, manifests came back after a power cut whose shards had been rewritten, and were listed."""

    async def go() -> None:
        disk = new_disk(journaled=True, seed="")
        life = await begin(disk)
        for _ in range(4):
            await life.write("a")
            await life.commit()
        await life.write("a")
        for seed in range(40):
            left = disk.cut(Survival.drawn(random.Random(seed)))
            await Checker().check(left, life.ledger, PLAIN, killed=False, goes_on=False)

    asyncio.run(go())


def test_every_directory_that_is_made_gets_a_durable_name(tmp_path: Path) -> None:
    """Only the last of several was synced: a power cut could take the others, with all commits in them."""
    synced: list[str] = []

    class Watching(LocalFiles):
        async def sync_directory(self, path: str) -> None:
            synced.append(path)
            await super().sync_directory(path)

    files = Watching(portable=False)
    asyncio.run(files.make_directory(str(tmp_path / "a" / "b" / "c")))
    files.close()
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(synced)


def test_without_checksums_nothing_is_believed_that_a_failed_sync_may_have_dropped() -> None:
    """The shard was copied as it could be read back, which is what it held before. Now nothing is served or committed from it."""

    async def go() -> None:
        plan = Plan(keep=1, checksum=False, limit=None, actions=0, closes=False)
        disk = new_disk(journaled=False, seed="")
        life = await begin(disk, plan)
        life.values["a"] = Value(1, 1)
        await life.store("a")
        shard = life.shards["a"]
        disk.cache_keeps = False
        failing: Any = life.directory.path_of(shard)
        real = disk.sync
        disk.sync = lambda path: _fail(disk, path) if path == failing else real(path)  # type: ignore[method-assign]
        assert not await life.commit()
        disk.sync = real  # type: ignore[method-assign]
        assert block_of("a", 1) == shard.block
        assert not await life.commit()
        await Checker().check(disk.cut(NOTHING), life.ledger, plan, killed=False)

    with silence():
        asyncio.run(go())


def _fail(disk: CrashDisk, path: str) -> None:
    disk.lose(path)
    raise OSError(5, "Input/output error")
