"""Bytes per second: between drive and RAM, and between RAM and the device, beside bare loops."""

from __future__ import annotations

import asyncio
import contextlib
import time

import torch

from benchmarks.core_parts.bare import Copier, Drive
from benchmarks.core_parts.measure import MIB, Plan, Row, timed
from tierstore import AsyncTierStore


def drive(plan: Plan) -> list[Row]:
    """Blocks read from the drive into RAM and written from RAM to the drive, with checksums and without."""
    rows: list[Row] = []
    for nbytes in plan.scaled(16, 1) * MIB, plan.scaled(64, 2) * MIB:
        for checksum in (False, True):
            rows += asyncio.run(_drive(plan, nbytes, checksum))
    return rows


async def _drive(plan: Plan, nbytes: int, checksum: bool) -> list[Row]:
    total = plan.scaled(1024, 8) * MIB
    count = total // nbytes
    names = [f"b{number}" for number in range(count)]
    content = torch.randint(0, 255, (nbytes,), dtype=torch.uint8)
    rates: dict[str, list[float]] = {"read": [], "write": [], "bare read": [], "bare write": []}
    with plan.empty() as directory:
        ram = total + nbytes + max(128 * MIB, total // 8)
        options = {"nvme_limit": 2 * total + 64 * MIB, "checksum": checksum, "policy": "lru"}  # which fetches nothing by itself
        async with AsyncTierStore(nbytes, ram, directory, device=plan.device, **options) as store:  # type: ignore[arg-type]
            for name in names:
                await store.put(name, content)
            await store.flush()
            direct = bool(store.stats().direct_io)
            with contextlib.closing(Drive(directory.with_name("bare"), count, content, direct=direct)) as bare:

                async def flush() -> None:
                    start = time.perf_counter()
                    await store.flush()
                    rates["write"].append(total / (time.perf_counter() - start))

                async def fetch() -> None:
                    start = time.perf_counter()
                    await asyncio.gather(*(store.hold(name, "ram") for name in names))
                    rates["read"].append(total / (time.perf_counter() - start))

                async def alone(way: str) -> None:
                    rates[f"bare {way}"].append(total / timed(bare.read if way == "read" else bare.write))

                for turn in range(plan.scaled(8, 2)):
                    for name in names:
                        await store.write(name, content)
                    for step in (flush(), alone("write")) if turn % 2 else (alone("write"), flush()):
                        await step
                    for name in names:
                        await store.evict(name)
                    for step in (fetch(), alone("read")) if turn % 2 else (alone("read"), fetch()):
                        await step
                    for name in names:
                        await store.unhold(name)
    rows = []
    for way in ("read", "write"):
        mine, theirs = rates[way], rates[f"bare {way}"]
        what = f"drive {way}, blocks of {nbytes // MIB} MiB, checksums {'on' if checksum else 'off'}"
        detail = {"store_bytes_per_s": mine, "bare_bytes_per_s": theirs, "direct_io": direct, "blocks": count}
        rows.append(Row(what, "x bare", [one / other for one, other in zip(mine, theirs, strict=True)], ">= 0.9", detail))
    return rows


def copies(plan: Plan) -> list[Row]:
    """Blocks copied from RAM to the device, back, and both ways at once."""
    rows: list[Row] = []
    for nbytes in plan.scaled(16, 1) * MIB, plan.scaled(64, 2) * MIB:
        rows += asyncio.run(_one_way(plan, nbytes))
        rows.append(asyncio.run(_both_ways(plan, nbytes)))
    return rows


async def _one_way(plan: Plan, nbytes: int) -> list[Row]:
    total = plan.scaled(1024, 8) * MIB
    names = [f"b{number}" for number in range(total // nbytes)]
    rates: dict[str, list[float]] = {"in": [], "out": [], "bare in": [], "bare out": []}
    with contextlib.closing(Copier(plan.device, nbytes, len(names))) as bare:
        async with AsyncTierStore(total, total + max(128 * MIB, total // 8), device=plan.device, policy="lru") as store:
            for name in names:
                await store.put(name, torch.ones(nbytes, dtype=torch.uint8))
            for _ in range(plan.scaled(7, 2)):
                rates["bare in"].append(total / bare.seconds(into=True, out=False))
                start = time.perf_counter()
                await asyncio.gather(*(store.hold(name, "gpu") for name in names))
                plan.settle()
                rates["in"].append(total / (time.perf_counter() - start))
                for name in names:
                    async with store.use(name, write=True):
                        pass
                    await store.unhold(name)
                rates["bare out"].append(total / bare.seconds(into=False, out=True))
                start = time.perf_counter()
                await store.flush()
                plan.settle()
                rates["out"].append(total / (time.perf_counter() - start))
                for name in names:
                    await store.evict(name)
    rows = []
    for way, words in (("in", "RAM to device"), ("out", "device to RAM")):
        mine, theirs = rates[way], rates[f"bare {way}"]
        detail = {"store_bytes_per_s": mine, "bare_bytes_per_s": theirs, "blocks": len(names)}
        ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
        rows.append(Row(f"{words}, blocks of {nbytes // MIB} MiB", "x bare", ratios, ">= 0.9", detail))
    return rows


async def _both_ways(plan: Plan, nbytes: int) -> Row:
    """A cycle over four times as many blocks as the device holds, all written: each lease takes one copy in and one out."""
    total = plan.scaled(2048, 16) * MIB
    names = [f"b{number}" for number in range(total // nbytes)]
    mine, theirs = [], []
    with contextlib.closing(Copier(plan.device, nbytes, min(len(names), 16))) as bare:
        copied = nbytes * min(len(names), 16)
        async with AsyncTierStore(total // 4, total + max(128 * MIB, total // 8), device=plan.device) as store:
            for name in names:
                await store.put(name, torch.ones(nbytes, dtype=torch.uint8))
            turns = plan.scaled(40, 4)
            for turn in range(turns):
                before, start = store.stats().links, time.perf_counter()
                for name in names:
                    async with store.use(name, write=True):
                        pass
                plan.settle()
                seconds, after = time.perf_counter() - start, store.stats().links
                moved = sum(after[link].bytes - before[link].bytes for link in ("h2d", "d2h"))
                if turn >= turns - plan.scaled(7, 2):  # by then the policy has planned for the cycle
                    mine.append(moved / seconds)
                    theirs.append(copied / bare.seconds(into=True, out=True))
    detail = {"store_bytes_per_s": mine, "bare_bytes_per_s": theirs, "blocks": len(names)}
    target = ">= 0.9" if plan.device.type == "cuda" else ""
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    return Row(f"both ways at once, blocks of {nbytes // MIB} MiB", "x bare", ratios, target, detail)
