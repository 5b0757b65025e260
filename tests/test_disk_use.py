"""How much of the drive commits take: never more than is stated, and no more than that is ever needed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.patience import in_thread, wait_until
from tests.quiet import assert_quiet, disk_bytes
from tierstore import CommitHandle, TierStore
from tierstore.catalog import PAGE
from tierstore.errors import TierFullError
from tierstore.nvme import local
from tierstore.nvme.space import FIXED_BYTES, footprint

NUM_BLOCKS, BLOCK_BYTES = 8, 16 * PAGE
STATE_BYTES = NUM_BLOCKS * footprint(BLOCK_BYTES + PAGE)
"""S of the stated bound: every block, its header, and what a file is counted as beyond its length."""

MANIFEST_BYTES = footprint(2 * PAGE)


class Syncs:
    """The drive's syncs of files: while closed, they wait."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.waiting = 0

    def __call__(self, sync: Callable[[int], None], descriptor: int) -> None:
        self.waiting += 1
        assert self.open.wait(60)
        self.waiting -= 1
        sync(descriptor)


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Syncs]:
    gate, fsync = Syncs(), os.fsync
    monkeypatch.setattr(local.os, "fsync", lambda descriptor: gate(fsync, descriptor))
    yield gate
    gate.open.set()


def opened(path: Path, **options: object) -> TierStore:
    """Everything moves: the device holds a quarter of the blocks, RAM half of them."""
    return TierStore(**{"gpu": 2 * BLOCK_BYTES, "ram": 5 * BLOCK_BYTES, "nvme": path / "swap", "device": "cpu"} | options)  # type: ignore[arg-type]


def put_all(store: TierStore) -> None:
    for number in range(NUM_BLOCKS):
        store.put(f"b{number}", torch.zeros(BLOCK_BYTES // 4))


def add_to_all(store: TierStore, value: float = 1) -> None:
    for number in range(NUM_BLOCKS):
        with store.use(f"b{number}", write=True, timeout=60) as tensor:
            tensor.add_(value)


def handle_of(store: TierStore, metadata: object = None) -> CommitHandle:
    handle = store.commit(metadata, wait=False)
    assert isinstance(handle, CommitHandle)
    return handle


@pytest.mark.parametrize("keep", [1, 3])
def test_a_limit_of_two_generations_more_than_kept_is_enough(tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits pile up behind slow syncs, and the loop never waits for one: what finds no room waits for theirs, and nothing fails."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.003)
        fsync(descriptor)

    monkeypatch.setattr(local.os, "fsync", slow)
    limit = FIXED_BYTES + (keep + 2) * (STATE_BYTES + MANIFEST_BYTES)
    with opened(tmp_path, nvme_limit=limit, keep=keep) as store:
        put_all(store)
        handles = []
        for step in range(1, 13):
            add_to_all(store)
            handles.append(handle_of(store, step))
        assert [handle.result(60) for handle in handles] == list(range(1, 13))
        assert store.stats().tiers["nvme"].peak_bytes <= limit
        assert store.stats().links["nvme_write"].failures == 0
        assert disk_bytes(tmp_path / "swap") <= limit
        assert_quiet(store)
    for generation in range(13 - keep, 13):
        with opened(tmp_path, keep=keep, generation=generation) as store:
            for number in range(NUM_BLOCKS):
                assert torch.equal(store.read(f"b{number}"), torch.full((BLOCK_BYTES // 4,), float(generation)))


def test_less_than_that_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    """A limit that holds one generation: the commit that needs a second fails, the first one stands, and the store goes on."""
    limit = FIXED_BYTES + STATE_BYTES + MANIFEST_BYTES + footprint(BLOCK_BYTES + PAGE)
    with opened(tmp_path, nvme_limit=limit) as store:
        put_all(store)
        assert store.commit("first") == 1
        with pytest.raises(TierFullError) as caught:
            add_to_all(store)
            store.commit("second")
        assert caught.value.tier == "nvme"
        assert store.committed is not None
        assert store.committed.metadata == "first"
        assert disk_bytes(tmp_path / "swap") <= limit
    with opened(tmp_path) as store:
        for number in range(NUM_BLOCKS):
            assert torch.equal(store.read(f"b{number}"), torch.zeros(BLOCK_BYTES // 4))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_what_commits_in_flight_take(tmp_path: Path, syncs: Syncs, in_flight: int) -> None:
    """With `keep` kept, n under way and the newest state spilled: (keep + n + 1) times the blocks, and all of that is in use."""
    with opened(tmp_path) as store:
        put_all(store)
        store.commit(0)
        syncs.open.clear()
        handles = []
        for step in range(1, in_flight + 1):
            add_to_all(store)
            handles.append(handle_of(store, step))
            wait_until(lambda: store.engine.directory._num_commits == len(handles))  # type: ignore[union-attr]
        add_to_all(store)
        in_thread(store.flush).result(60)
        bound = FIXED_BYTES + (1 + in_flight + 1) * (STATE_BYTES + MANIFEST_BYTES)
        used = store.stats().tiers["nvme"].used_bytes
        assert bound - STATE_BYTES < used <= bound
        assert disk_bytes(tmp_path / "swap") <= bound
        syncs.open.set()
        assert [handle.result(60) for handle in handles] == list(range(2, in_flight + 2))
        assert store.stats().tiers["nvme"].used_bytes <= FIXED_BYTES + 3 * STATE_BYTES + MANIFEST_BYTES, (
            "pooled files beyond one generation"
        )
        assert_quiet(store)
    assert disk_bytes(tmp_path / "swap") <= FIXED_BYTES + STATE_BYTES + MANIFEST_BYTES


def test_files_are_rewritten_not_made_anew(tmp_path: Path) -> None:
    """After the second commit no file is made any more: each generation is written into the files of the one before last."""
    with opened(tmp_path) as store:
        put_all(store)
        for step in range(3):
            add_to_all(store)
            store.commit(step)
        directory = store.engine.directory
        assert directory is not None
        made, reused = directory.created_files, directory.reused_files
        for step in range(5):
            add_to_all(store)
            store.commit(step)
        assert directory.created_files == made
        assert directory.reused_files >= reused + 5 * NUM_BLOCKS


def test_what_did_not_change_is_not_written(tmp_path: Path) -> None:
    """Bytes are counted: a commit writes the blocks that changed, and a block that lies on the drive and did not change never again."""
    with opened(tmp_path) as store:
        put_all(store)
        store.commit()
        before = store.stats().links["nvme_write"].bytes
        for number in range(NUM_BLOCKS):
            with store.use(f"b{number}"):
                pass
        store.commit()
        assert store.stats().links["nvme_write"].bytes == before
        with store.use("b3", write=True) as tensor:
            tensor.add_(1)
        store.commit()
        assert store.stats().links["nvme_write"].bytes == before + BLOCK_BYTES


def test_commits_behind_a_block_that_is_slow_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each commit would pin a version of its own of the other block: the next begins once the one before has all it needs."""
    write, slow, hanging = local._PWRITEV, threading.Event(), threading.Event()

    def gated(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if "block-b0" in os.readlink(f"/proc/self/fd/{descriptor}") and offset and not slow.is_set():
            hanging.set()
            assert slow.wait(60)
        return write(descriptor, buffers, offset)

    limit = FIXED_BYTES + 3 * (STATE_BYTES + MANIFEST_BYTES)
    with opened(tmp_path, nvme_limit=limit) as store:
        put_all(store)
        store.commit()
        monkeypatch.setattr(local, "_PWRITEV", gated)
        with store.use("b0", write=True) as tensor:
            tensor.add_(1)

        def loop() -> list[CommitHandle]:
            handles = []
            for step in range(4 * NUM_BLOCKS):
                with store.use("b1", write=True, timeout=60) as tensor:
                    tensor.add_(1)
                handles.append(handle_of(store, step))
            return handles

        looping = in_thread(loop)
        assert hanging.wait(20)
        time.sleep(0.2)
        assert store.stats().tiers["nvme"].used_bytes < FIXED_BYTES + 2 * (STATE_BYTES + MANIFEST_BYTES)
        slow.set()
        handles = looping.result(60)
        assert isinstance(handles, list)
        for handle in handles:
            handle.result(60)
        assert torch.equal(store.read("b1"), torch.full((BLOCK_BYTES // 4,), 4.0 * NUM_BLOCKS))


def test_a_full_drive_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each block that found no room was reported each time it was tried: dozens of lines for one full drive."""
    limit = FIXED_BYTES + STATE_BYTES + MANIFEST_BYTES + footprint(BLOCK_BYTES + PAGE)
    with opened(tmp_path, nvme_limit=limit) as store:
        put_all(store)
        store.commit()
        for _ in range(3):
            with pytest.raises(TierFullError) as caught:
                add_to_all(store)
                store.commit()
        assert "nvme_limit=" in caught.value.remedy
        assert sum("a transfer failed" in record.message for record in caplog.records if record.levelname == "WARNING") <= 1
