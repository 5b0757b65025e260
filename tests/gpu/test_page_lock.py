"""A driver that locks only so much host memory: what stays pageable is copied through the ring, and every bit is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_cuda import MIB, assert_equal, assert_streamed, make_blocks, train
from tierstore import TierStore
from tierstore.errors import OptionError
from tierstore.tiers import ram

pytestmark = pytest.mark.cuda

RAM = 14 * MIB


@dataclass
class Capped:
    """The driver, which refuses after so many ranges."""

    real: Any
    allowed: int
    locked: dict[int, int] = field(default_factory=dict)
    num_asked: int = 0

    def __getattr__(self, name: str) -> Any:
        """All else is the driver's."""
        return getattr(self.real, name)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.num_asked += 1
        if self.num_asked > self.allowed:
            return 2
        code = int(self.real.cudaHostRegister(address, nbytes, flags))
        if not code:
            self.locked[address] = nbytes
        return code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return int(self.real.cudaHostUnregister(address))


@pytest.fixture
def capped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Capped:
    driver = Capped(torch.cuda.cudart(), request.param)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(ram, "SEGMENT_BYTES", 2 * MIB)  # a block straddles the end of what is locked; transfer space does not
    return driver


@pytest.mark.parametrize("capped", [0, 1, 2, 3, 7], ids=lambda allowed: f"{allowed} ranges", indirect=True)
@pytest.mark.parametrize("policy", ["lru", "lookahead"])
def test_streamed_updates_equal_resident_ones(tmp_path: Path, capped: Capped, policy: str) -> None:
    with TierStore(gpu=5 * MIB, ram=RAM, nvme=tmp_path / "swap", device="cuda", policy=policy) as store:
        locked_bytes = store.stats().page_locked_bytes
        assert locked_bytes == sum(capped.locked.values()) < RAM
        assert (store.engine.transfer.page_locked_bytes > 0) == (capped.allowed > 0), "transfer space comes first: it is the ring"
        reference = make_blocks(store, 24)
        train(store, reference, 3)
        assert_equal(store, reference)
        assert_streamed(store)
    assert not capped.locked


@pytest.mark.parametrize("capped", [0, 1, 3], ids=lambda allowed: f"{allowed} ranges", indirect=True)
def test_page_locking_that_was_demanded_is_refused_in_words(tmp_path: Path, capped: Capped) -> None:
    with pytest.raises(OptionError, match="cannot be page-locked"):
        TierStore(gpu=5 * MIB, ram=RAM, nvme=tmp_path / "swap", device="cuda", page_locked=True)
    assert not capped.locked, "memory is locked that nobody has"
    assert torch.zeros(1, device="cuda").add_(1).item() == 1, "the refusal is remembered, and raised at somebody's kernel"
    TierStore(gpu=5 * MIB, ram=RAM, nvme=tmp_path / "swap", device="cuda", page_locked=False).close()
