"""Nothing grows: what the process holds after many accesses, misses, commits and blocks that come and go."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from tests.quiet import assert_quiet
from tierstore import TierStore
from tierstore.residency import Tier
from tierstore.trace import Timeline, Trace


def test_nothing_grows_with_the_number_of_accesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The million accesses of `benchmarks/core.py`, with rings and memories that fill within the first of four laps."""
    monkeypatch.setattr("tierstore.policies.forecast.KEEP", 512)
    held = []
    with TierStore("32KiB", "8MiB", tmp_path / "swap", device="cpu", nvme_limit="64MB") as store:
        store.engine.scheduler.trace = Trace(keep=500)
        store.engine.timeline = Timeline(100)
        for number in range(12):
            store.put(f"b{number}", torch.zeros(1024))
        period = [*range(6)] * 20 + [*range(6, 12)]
        for lap in range(4):
            for position in range(6 * len(period)):
                number = period[position % len(period)]
                with store.use(f"b{number}", write=position % 7 == 0):
                    pass
                if position % 100 == 99:
                    store.put(f"passing {lap} {position}", torch.zeros(1024))
                    store.commit({"position": position})
                    store.delete(f"passing {lap} {position}")
            store.commit()
            gc.collect()
            held.append(sys.getallocatedblocks())
        assert store.stats().accesses == 4 * 6 * len(period)
        assert_quiet(store)
    assert held[3] - held[1] < 500, f"Python holds ever more objects: {held}"


def test_an_access_leaves_nothing_to_the_garbage_collector() -> None:
    """Rows of the trace are plain: the collector stops tracking them, and its full passes stay as short as they were."""
    trace = Trace(keep=1000)
    for number in range(1000):
        trace.append(f"b{number}", number % 2 == 0, Tier.GPU)
    gc.collect()
    assert not any(gc.is_tracked(row) for row in trace._rows)
