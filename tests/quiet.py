"""What a store looks like when nobody uses it: nothing leased, waiting or in flight, and every byte accounted for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from tierstore import AsyncTierStore, TierStore
from tierstore.mover.engine import Engine
from tierstore.residency import State, Tier

AnyStore = TierStore | AsyncTierStore


def busy_with(store: AnyStore) -> str:
    """What is still going on; empty when nothing is."""
    engine = store.engine
    with engine.lock:
        scheduler, placement = engine.scheduler, engine.placement
        going_on = {
            "orders": len(placement.flying) + len(placement.orders),
            "requests": len(scheduler.waiting) + len(scheduler.resolved),
            "futures": len(engine._futures),
            "tasks": len(engine.tasks) + len(engine.calls),
            "captures": len(engine.captures),
            "slots": engine.slots.in_use,
            "leased": len(placement.leased) + len(scheduler._owned) + len(scheduler._writes_of),
            "locked": len(scheduler._locked) + scheduler._hosts,
            "readers": sum(record.copy(tier).readers for record in placement.records.values() for tier in (Tier.GPU, Tier.RAM)),
            "commit_pending": sum(record.commit_pending for record in placement.records.values()),
            "unborn": sum(record.born is None for record in placement.records.values()),
        }
    return ", ".join(f"{what}={number}" for what, number in going_on.items() if number)


def assert_quiet(store: AnyStore, *, within_s: float = 10.0) -> None:
    """Nothing is out or under way (prefetches may take a moment to land), and the extents are exactly those of blocks."""
    deadline = time.monotonic() + within_s
    while (left := busy_with(store)) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not left, left
    engine = store.engine
    with engine.lock:
        check_rest(engine)
        directory = engine.directory
        if directory is not None:
            placed = (record.copy(tier).state for record in engine.placement.records.values() for tier in (Tier.GPU, Tier.RAM))
            assert State.RESERVED not in placed
            assert disk_bytes(directory.path) <= directory.used_bytes <= directory.limit_bytes


def check_rest(engine: Engine) -> None:
    """The extents, shards and bytes of a store at rest are those of its blocks. Under the lock."""
    records = list(engine.placement.records.values())
    assert sorted(record.block.name for record in records) == sorted(engine.scheduler.names)
    assert engine.total_bytes == sum(record.nbytes for record in records), "total_bytes"
    for tier in (Tier.GPU, Tier.RAM):
        held = [(copy.offset, record.nbytes) for record in records if (copy := record.copy(tier)).state is not State.ABSENT]
        held += engine.placement.quarantined.items() if tier is Tier.RAM else ()
        assert sorted(held) == list(engine.placement.arenas[tier].extents()), f"extents of {tier} that belong to nobody"
        assert not any(record.copy(tier).state is State.LOADING for record in records)
    for record in records:
        assert record.tiers or record.blank, f"nobody has the newest values of {record.block.name!r}"
    directory = engine.directory
    if directory is not None:
        kept = [shard for shards in directory._generations.values() for shard in shards]
        current = [engine.shards[record] for record in records if record in engine.shards]
        own = {shard for shard in (*kept, *current) if shard.adopted is None}
        assert set(directory._shards.values()) == own, "shards that belong to nobody"
        for shard in {*kept, *current}:
            assert shard.references == kept.count(shard), f"{shard.file} is retained {shard.references} times"


def disk_bytes(path: str | Path) -> int:
    """What `du` shows."""
    total = os.stat(path).st_blocks * 512
    for entry in os.scandir(path):
        try:
            total += entry.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def tensor_of(store: TierStore, name: str) -> torch.Tensor:
    """A copy of a block that was put as one tensor."""
    value = store.read(name)
    assert isinstance(value, torch.Tensor)
    return value


def values(store: TierStore) -> dict[str, dict[str, torch.Tensor]]:
    """A copy of everything in the store."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in store:
        value = store.read(name)
        found[name] = {"": value} if isinstance(value, torch.Tensor) else value
    return found


def assert_same(one: dict[str, dict[str, torch.Tensor]], other: dict[str, dict[str, torch.Tensor]]) -> None:
    assert one.keys() == other.keys()
    for name, tensors in one.items():
        assert tensors.keys() == other[name].keys()
        for key, tensor in tensors.items():
            assert (tensor.dtype, tensor.shape) == (other[name][key].dtype, other[name][key].shape)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name][key].reshape(-1).view(torch.uint8)), (name, key)
