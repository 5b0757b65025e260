"""Memory that the driver will not lock, in part or at all."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

import pytest
import torch

from tierstore.tiers import ram
from tierstore.tiers.ram import HostArena

SEGMENT = 1 << 16
NUM_SEGMENTS = 5
NBYTES = (NUM_SEGMENTS - 1) * SEGMENT + SEGMENT // 2


@dataclass
class Driver:
    """Locks so many ranges, then refuses. Attributes: what was asked, in order, and what is locked."""

    allowed: int
    asked: list[tuple[int, int]] = field(default_factory=list)
    locked: dict[int, int] = field(default_factory=dict)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.asked.append((address, nbytes))
        if len(self.asked) > self.allowed:
            return 2
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]  # a KeyError here is a range that was not locked
        return 0


@pytest.fixture
def cleared(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """How often the driver's memory of an error was cleared."""
    found: list[None] = []
    monkeypatch.setattr(ram, "SEGMENT_BYTES", SEGMENT)
    monkeypatch.setattr(ram, "_clear_cuda_error", lambda: found.append(None))
    return found


@pytest.mark.parametrize("allowed", range(NUM_SEGMENTS + 1))
def test_what_is_refused_stays_pageable(
    monkeypatch: pytest.MonkeyPatch, cleared: list[None], caplog: pytest.LogCaptureFixture, allowed: int
) -> None:
    driver = Driver(allowed)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with caplog.at_level(logging.WARNING, logger="tierstore"):
        arena = HostArena(NBYTES, page_lock=True)
    refused = allowed < NUM_SEGMENTS
    locked_bytes = min(allowed * SEGMENT, NBYTES)
    assert arena.page_locked_bytes == locked_bytes == sum(driver.locked.values())
    assert (arena.page_lock_error is not None) == refused == bool(caplog.records) == bool(cleared)
    assert len(driver.asked) == min(allowed + 1, NUM_SEGMENTS), "after a refusal nothing more is asked: it may poison what follows"
    arena.tensor.fill_(7)
    assert arena.memory[-1] == 7, "pageable or not, it is memory"
    for offset in range(0, NBYTES, SEGMENT // 4):
        for nbytes in (1, SEGMENT // 4, SEGMENT, NBYTES - offset):
            end, position = min(offset + nbytes, NBYTES), offset
            for start, length, locked in arena.pieces(offset, end - offset):
                assert start == position
                assert length > 0
                inside = [
                    at for at, size in driver.locked.items() if at <= arena.address + start and arena.address + start + length <= at + size
                ]
                assert bool(inside) == locked, "a copy may not span two ranges, nor the end of what is locked"
                assert locked or start >= locked_bytes
                position += length
            assert position == end
    arena.close()
    assert not driver.locked


def test_memory_is_reserved_without_threads_to_touch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        arena = HostArena(NBYTES)
    assert not arena.tensor.any()
    arena.close()
