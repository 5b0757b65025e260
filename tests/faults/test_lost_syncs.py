"""A sync that fails, drops what it should have made durable, and claims success the next time: what memory has too is not lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from tests.quiet import assert_quiet
from tierstore import TierStore
from tierstore.catalog import PAGE
from tierstore.errors import ShardError, TransferError
from tierstore.nvme import local

BLOCK_BYTES = 8 * PAGE


class Losing:
    """Stands in for `os.fsync`. While `block` is named, the sync of its shard fails, and the payload is gone afterwards.

    Attributes:
        synced: Every file that was synced, in order.
    """

    def __init__(self) -> None:
        self.block: str | None = None
        self.synced: list[str] = []
        self._fsync = os.fsync

    def __call__(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self.synced.append(os.path.basename(path))
        if self.block is not None and f"block-{self.block}-" in path:
            self.block = None
            with open(path, "r+b") as file:
                file.seek(PAGE)
                file.write(bytes(BLOCK_BYTES))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> Losing:
    losing = Losing()
    monkeypatch.setattr(local.os, "fsync", losing)
    return losing


def opened(path: Path) -> TierStore:
    return TierStore(gpu=2 * BLOCK_BYTES, ram=6 * BLOCK_BYTES, nvme=path / "swap", device="cpu")


def filled(value: float) -> torch.Tensor:
    return torch.full((BLOCK_BYTES // 4,), float(value))


@pytest.mark.parametrize("where", ["ram", "device"])
def test_what_memory_has_is_saved_anew(tmp_path: Path, losing: Losing, where: str) -> None:
    with opened(tmp_path) as store:
        for name in ("a", "b", "c", "d"):
            store.put(name, filled(1))
        store.commit()
        with store.use("a", write=True) as tensor:
            tensor.fill_(2)
        if where == "device":
            store.hold("a", "gpu")
        losing.block = "a"
        with pytest.raises(TransferError, match="syncing block 'a'") as caught:
            store.commit()
        assert store.info("a").dirty, "it counts as saved, though nobody knows what the drive has"
        bad = os.path.basename(caught.value.path)
        for _ in range(3):  # everybody else comes by; nothing may drop the only good copy
            for name in ("b", "c", "d"):
                with store.use(name) as tensor:
                    assert torch.equal(tensor, filled(1))
        assert store.commit() == 2
        assert losing.synced.count(bad) == 1, "a failed sync was tried again on the same file"
        assert not store.info("a").dirty
        assert torch.equal(store.read("a"), filled(2))
        assert_quiet(store)
        assert bad not in os.listdir(tmp_path / "swap")
    with opened(tmp_path) as store:
        assert torch.equal(store.read("a"), filled(2))


def test_what_only_the_drive_had_is_reported(tmp_path: Path, losing: Losing) -> None:
    with opened(tmp_path) as store:
        store.put("a", filled(1))
        store.put("b", filled(1))
        store.commit()
        store.write("a", filled(2))
        store.evict("a")
        losing.block = "a"
        with pytest.raises(TransferError, match="syncing block 'a'"):
            store.commit()
        for _ in range(2):
            with pytest.raises(ShardError, match="what can be read back is not what was written") as caught:
                store.commit()
            assert caught.value.block == "a"
        with pytest.raises(ShardError, match="'a' is damaged"):
            store.read("a")
        with pytest.raises(ShardError, match="'a' is damaged"), store.use("a"):
            pass
        store.write("a", filled(3))
        assert store.commit() == 2
        assert torch.equal(store.read("a"), filled(3))
        assert_quiet(store)
    with opened(tmp_path) as store:
        assert torch.equal(store.read("a"), filled(3))
        assert torch.equal(store.read("b"), filled(1))
