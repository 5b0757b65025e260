"""Never over budget: counted inside at every moment, and measured outside with resident memory, `du` and tracemalloc."""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.quiet import assert_quiet, disk_bytes, tensor_of, values
from tierstore import TierStore
from tierstore.counters import Stats
from tierstore.errors import TierFullError

PAGE = 4096
MB = 1 << 20


@contextmanager
def sampled(store: TierStore, path: Path | None = None) -> Iterator[list[str]]:
    """Have another thread look at the counters, the arenas and the drive all the time; collects what is over."""
    stop, over = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            stats: Stats = store.stats()
            for name, tier in stats.tiers.items():
                if not 0 <= tier.used_bytes <= tier.peak_bytes <= tier.capacity_bytes:
                    over.append(f"{name}: {tier}")
            if path is not None:
                on_drive, limit = disk_bytes(path), stats.tiers["nvme"].capacity_bytes
                if on_drive > limit:
                    over.append(f"{on_drive} bytes on the drive, more than {limit}")
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield over
    finally:
        stop.set()
        thread.join()
    assert not over, over[:3]


def train(store: TierStore, num_layers: int, steps: int, between: Callable[[int], object] = lambda step: None) -> None:
    """Forward, backward, update: parameters read twice and written, moments read and written."""
    for step in range(steps):
        for layer in range(num_layers):
            with store.use(f"p{layer}") as parameters:
                assert parameters["w"][0] == step
        for layer in reversed(range(num_layers)):
            with store.use(f"p{layer}", f"g{layer}", write=f"g{layer}") as (_, gradient):
                gradient.fill_(1)
        for layer in range(num_layers):
            with store.use(f"p{layer}", f"g{layer}", f"m{layer}", write=[f"p{layer}", f"m{layer}"]) as (parameters, gradient, moments):
                parameters["w"].add_(gradient[: parameters["w"].numel()])
                moments["one"].add_(1)
                moments["two"].add_(1)
        between(step)


def fill(store: TierStore, num_layers: int, unit: int) -> None:
    """A layer is four units of float32: parameters, gradients, two moments."""
    count = unit // 4
    for layer in range(num_layers):
        store.put(f"p{layer}", {"w": torch.zeros(count)})
        store.put(f"g{layer}", torch.zeros(count))
        store.put(f"m{layer}", {"one": torch.zeros(count), "two": torch.zeros(count)})


@pytest.mark.parametrize("policy", ["lru", "lookahead", "static"])
def test_the_counters_never_exceed_the_budgets(tmp_path: Path, policy: str) -> None:
    unit, layers = 16 * PAGE, 6
    gpu, ram = 6 * unit, 14 * unit
    with TierStore(gpu=gpu, ram=ram, nvme=tmp_path / "swap", nvme_limit=80 * unit, device="cpu", policy=policy) as store:
        with sampled(store, tmp_path / "swap"):
            fill(store, layers, unit)
            train(store, layers, 6, between=lambda step: store.commit(step) if step % 2 else store.prefetch("p0", "p1", "m0"))
        assert_quiet(store)
        stats = store.stats()
        assert [stats.tiers[tier].capacity_bytes for tier in ("gpu", "ram", "nvme")] == [gpu, ram, 80 * unit]
        assert stats.tiers["gpu"].evictions > 0
        assert stats.tiers["ram"].evictions > 0
        assert stats.links["nvme_write"].bytes > 0
        assert stats.links["nvme_read"].bytes > 0


def test_two_tiers_within_budget() -> None:
    unit, layers = 16 * PAGE, 4
    with TierStore(gpu=6 * unit, ram=20 * unit, device="cpu") as store:
        with sampled(store):
            fill(store, layers, unit)
            train(store, layers, 6)
        stats = store.stats()
        assert stats.tiers["ram"].capacity_bytes == 20 * unit
        assert stats.direct_io is None
        assert_quiet(store)


def resident_bytes() -> int:
    """Private and shared pages in memory; the arenas are anonymous shared mappings."""
    gc.collect()
    rss: int = psutil.Process().memory_info().rss
    return rss


def test_resident_memory_stays_within_the_budgets_and_flat(tmp_path: Path) -> None:
    """Three times as much state as both memory tiers hold; the process grows by the budgets and little else."""
    unit, layers = 1 * MB, 24  # 96 MB
    gpu, ram = 10 * MB, 24 * MB
    before = resident_bytes()
    with TierStore(gpu=gpu, ram=ram, nvme=tmp_path / "swap", device="cpu", policy="lru") as store:
        fill(store, layers, unit)
        train(store, layers, 2)
        warm = resident_bytes()
        assert warm - before <= gpu + ram + 24 * MB
        seen = []

        def look(step: int) -> None:
            seen.append(resident_bytes())

        for _ in range(2):
            for layer in range(layers):
                with store.use(f"p{layer}", write=True) as parameters:
                    parameters["w"].zero_()
            train(store, layers, 3, between=look)
            store.commit()
        assert max(seen) - warm <= 8 * MB, [value - warm for value in seen]
        assert store.stats().tiers["ram"].evictions > 0


def test_nothing_of_size_is_allocated_after_warm_up(tmp_path: Path) -> None:
    """For 300 steps: Python's heap and the process stay flat, and no call allocates as much as a block."""
    unit, layers = 1 << 20, 2  # well above what Python leaves lying between two garbage collections
    with TierStore(gpu=5 * unit, ram=7 * unit, nvme=tmp_path / "swap", device="cpu", policy="lookahead") as store:
        fill(store, layers, unit)

        def reset(step: int) -> None:
            if step % 100 == 50:
                store.commit(step)

        train(store, layers, 30)
        tracemalloc.start(1)
        try:
            train_from(store, layers, 30, 60, reset)
            gc.collect()
            start_heap, start_rss = tracemalloc.get_traced_memory()[0], resident_bytes()
            tracemalloc.reset_peak()
            train_from(store, layers, 90, 240, reset)
            gc.collect()
            end_heap, peak_heap = tracemalloc.get_traced_memory()
            end_rss = resident_bytes()
        finally:
            tracemalloc.stop()
        accesses = 240 * layers * 6
        kept = 1500 * accesses  # the trace and the timeline keep a record of each, up to a bound
        assert end_heap - start_heap < kept, (end_heap - start_heap) / accesses
        assert peak_heap - end_heap < unit, "something as large as a tensor was allocated"
        assert end_rss - start_rss < kept + 6 * MB


def train_from(store: TierStore, num_layers: int, first: int, steps: int, between: Callable[[int], object]) -> None:
    for layer in range(num_layers):
        with store.use(f"p{layer}", write=True) as parameters:
            parameters["w"].zero_()
    train(store, num_layers, steps, between=lambda step: between(first + step))


# -- a drive that is full -------------------------------------------------------------------------------------------------------


def page(value: float) -> torch.Tensor:
    return torch.full((8 * PAGE // 8,), value, dtype=torch.float64)


def test_a_full_drive_is_reported_by_the_call_that_needs_it(tmp_path: Path) -> None:
    """Newest copies stay; and once something is deleted, the same call succeeds."""
    path = tmp_path / "swap"
    limit = 100 * PAGE
    with TierStore(gpu=24 * PAGE, ram=64 * PAGE, nvme=path, nvme_limit=limit, device="cpu") as store, sampled(store, path):
        expected: dict[str, float] = {}
        refused: TierFullError | None = None
        for number in range(40):
            try:
                store.put(f"b{number}", page(number))
            except TierFullError as error:
                refused = error
                break
            expected[f"b{number}"] = number
        assert refused is not None
        assert refused.tier == "nvme"
        assert refused.need is not None
        assert refused.have is not None
        assert "nvme_limit" in str(refused.remedy)
        assert 10 <= len(expected) < 40
        assert set(store) == set(expected)
        assert_quiet(store)
        for name, value in expected.items():
            assert torch.equal(tensor_of(store, name), page(value)), name
        for call in (lambda: store.put("new", page(1)), lambda: store.put("new", page(1), tier="nvme"), store.commit, store.flush):
            with pytest.raises(TierFullError):
                call()
            assert_quiet(store)
        assert store.committed is None
        victims = list(expected)[:6]
        for name in victims:
            store.delete(name)
            del expected[name]
        store.put("new", page(77))
        expected["new"] = 77
        for name in expected:  # everything can be used and changed
            with store.use(name, write=True) as block:
                block.add_(1)
            expected[name] += 1
        store.delete("new")
        del expected["new"]
        for name in list(expected)[:4]:
            store.delete(name)
            del expected[name]
        assert store.commit("fits now") == 1
        for name, value in expected.items():
            assert torch.equal(tensor_of(store, name), page(value)), name
        assert_quiet(store)
        left = values(store)
    with TierStore(gpu=24 * PAGE, ram=64 * PAGE, nvme=path, nvme_limit=limit, device="cpu") as store:
        assert values(store).keys() == left.keys()


def test_a_commit_that_does_not_fit_leaves_the_last_one(tmp_path: Path) -> None:
    """Copy on write needs room for both; without it the commit fails, and what was committed can be opened."""
    path = tmp_path / "swap"
    with TierStore(gpu=24 * PAGE, ram=160 * PAGE, nvme=path, nvme_limit=110 * PAGE, device="cpu") as store:
        for number in range(9):
            store.put(f"b{number}", page(1))
        assert store.commit() == 1
        for number in range(9):
            with store.use(f"b{number}", write=True) as block:
                block.fill_(2)
        for _ in range(2):
            with pytest.raises(TierFullError):
                store.commit()
            assert_quiet(store)
            assert all(torch.equal(tensor_of(store, f"b{number}"), page(2)) for number in range(9))
        assert store.committed is not None
        assert store.committed.generation == 1
    with TierStore(gpu=24 * PAGE, ram=160 * PAGE, nvme=path, nvme_limit=110 * PAGE, device="cpu") as store:
        assert all(torch.equal(tensor_of(store, f"b{number}"), page(1)) for number in range(9))


def test_a_directory_that_holds_more_than_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    with TierStore(gpu=24 * PAGE, ram=160 * PAGE, nvme=path, device="cpu") as store:
        for number in range(9):
            store.put(f"b{number}", page(1))
        store.commit()
    with pytest.raises(TierFullError) as caught:
        TierStore(gpu=24 * PAGE, ram=160 * PAGE, nvme=path, nvme_limit=40 * PAGE, device="cpu")
    assert caught.value.need is not None
    assert caught.value.remedy
    with TierStore(gpu=24 * PAGE, ram=160 * PAGE, nvme=path, device="cpu") as store:
        assert len(store) == 9


def test_random_work_on_a_drive_that_is_nearly_full(tmp_path: Path) -> None:
    path, chance = tmp_path / "swap", random.Random(4)
    with TierStore(gpu=24 * PAGE, ram=64 * PAGE, nvme=path, nvme_limit=140 * PAGE, device="cpu", policy="lru") as store:
        expected: dict[str, float] = {}
        failed = worked = 0
        with sampled(store, path):
            for step in range(400):
                name = f"b{chance.randrange(16)}"
                try:
                    if name not in store:
                        store.put(name, page(step))
                        expected[name] = step
                    elif chance.random() < 0.15:
                        store.delete(name)
                        del expected[name]
                    elif chance.random() < 0.1:
                        store.commit()
                    elif chance.random() < 0.5:
                        with store.use(name, write=True) as block:
                            assert block[0] == expected[name]
                            block.fill_(step)
                            expected[name] = step
                    else:
                        with store.use(name) as block:
                            assert block[0] == block[-1] == expected[name]
                    worked += 1
                except TierFullError:
                    failed += 1
        assert failed > 0
        assert worked > 200
        assert_quiet(store)
        for name, value in expected.items():
            assert torch.equal(tensor_of(store, name), page(value)), name
