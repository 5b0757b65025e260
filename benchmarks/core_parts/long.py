"""A directory of many blocks, and a million accesses."""

from __future__ import annotations

import gc
import sys
import time

import psutil
import torch

from benchmarks.core_parts.measure import PAGE, Plan, Row, timed
from tierstore import TierStore
from tierstore.trace import Timeline


def directory(plan: Plan) -> list[Row]:
    """Commits of 10,000 blocks, and opening what they left."""
    num_blocks = plan.scaled(10_000, 100)
    first, second, opening = [], [], []
    budgets = {"gpu": 64 * PAGE, "ram": 2 * num_blocks * PAGE + (64 << 20), "nvme_limit": 16 * num_blocks * PAGE + (64 << 20)}
    for _ in range(plan.scaled(3, 1)):
        with plan.empty() as where:
            with TierStore(nvme=where, device=plan.device, **budgets) as store:  # type: ignore[arg-type]
                for number in range(num_blocks):
                    store.put(f"layers.{number}.weight", torch.zeros(PAGE // 4))
                first.append(timed(store.commit))
                for number in range(plan.scaled(5, 1)):
                    with store.use(f"layers.{number}.weight", write=True):
                        pass
                    second.append(timed(store.commit))
            for _ in range(plan.scaled(3, 1)):
                start = time.perf_counter()
                with TierStore(nvme=where, device=plan.device, **budgets) as store:  # type: ignore[arg-type]
                    opening.append(time.perf_counter() - start)
                    assert len(store) == num_blocks
    return [
        Row(f"opening a directory of {num_blocks:,} blocks", "s", opening, "<= 2"),
        Row(f"commit of {num_blocks:,} new blocks", "s", first),
        Row(f"commit of one block among {num_blocks:,}", "s", second),
    ]


def million(plan: Plan) -> list[Row]:
    """A million accesses, a few of a hundred misses, with commits: what the process holds at each tenth of the second half."""
    num_accesses = plan.scaled(1_000_000, 6_000)
    blocks, memory, seconds, worst = [], [], [], 0
    with plan.empty() as where, TierStore(24 * PAGE, "64MB", where, device=plan.device, nvme_limit="1GB") as store:
        store.engine.timeline = Timeline(plan.scaled(500, 50))  # so that it is full within the first half
        for number in range(32):
            store.put(f"b{number}", torch.zeros(PAGE // 4))
        period = [f"b{number}" for number in range(16) for _ in range(20)] + [f"b{number}" for number in range(16, 32)]
        done = 0
        for tenth in range(10):
            seconds.append(timed(lambda: _go_on(store, period, num_accesses // 10, done)))  # noqa: B023 - called at once
            done += num_accesses // 10
            store.put(f"passing{tenth}", torch.zeros(PAGE // 4))
            store.commit({"accesses": done})
            store.delete(f"passing{tenth}")
            gc.collect()
            worst = max(worst, len(gc.garbage))
            blocks.append(sys.getallocatedblocks())
            memory.append(psutil.Process().memory_info().rss)
        accesses = store.stats().accesses
    half = len(blocks) // 2
    detail = {"allocated_blocks": blocks, "rss_bytes": memory, "accesses": accesses, "uncollectable": worst}
    return [
        Row("Python objects gained over the last half", "%", [100 * (blocks[-1] / blocks[half] - 1)], "<= 1", detail),
        Row("resident memory gained over the last half", "%", [100 * (memory[-1] / memory[half] - 1)], "<= 1"),
        Row("time per access, last tenth beside the sixth", "x", [seconds[-1] / seconds[half]]),
        Row("time per access", "us", [lap * 1e7 / num_accesses for lap in seconds]),
    ]


def _go_on(store: TierStore, period: list[str], num_accesses: int, done: int) -> None:
    for position in range(done, done + num_accesses):
        with store.use(period[position % len(period)], write=position % 7 == 0):
            pass
