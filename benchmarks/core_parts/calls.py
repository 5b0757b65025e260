"""Time per call: a lease of what is ready, calls in small and large stores, a thousand who wait at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.core_parts.measure import PAGE, Plan, Row, timed
from tierstore import AsyncTierStore, TierStore


def use(plan: Plan) -> list[Row]:
    """`use()` of a block that is ready on the device, and what some of the calls take that it cannot do without."""
    repetitions, rounds = plan.scaled(9, 2), plan.scaled(120, 3)
    target = "<= 60" if plan.device.type == "cuda" else "<= 20"
    rows: list[Row] = []
    with plan.empty() as directory, TierStore("64MB", "256MB", directory, device=plan.device, nvme_limit="1GB") as store:
        for count in (1, 8):
            names = [f"{count}/{number}" for number in range(16)]
            for name in names:
                tensors = {f"t{index}": torch.zeros(64, 64) for index in range(count)}
                store.put(name, tensors if count > 1 else tensors["t0"])
            for write in (False, True):
                medians, slowest = [], []
                for _ in range(1 + repetitions):  # the first brings the blocks to the device
                    times = sorted(lap for _ in range(rounds) for lap in _leases_us(store, names, write))
                    medians.append(statistics.median(times))
                    slowest.append(times[len(times) * 99 // 100])
                    plan.settle()
                what = f"use() of {count} tensor{'s' * (count > 1)}, {'write' if write else 'read'}"
                rows.append(Row(what, "us", medians[1:], target, {"p99_us": slowest[1:], "leases": rounds * len(names)}))
    views = [torch.zeros(64, 64, device=plan.device) for _ in range(8)]
    rows.append(_call("8 x detach()", lambda: [view.detach() for view in views], repetitions, plan))
    if plan.device.type == "cuda":
        rows.append(_call("an event made and recorded", lambda: torch.cuda.Event(blocking=True).record(), repetitions, plan))
        rows.append(_call("torch.cuda.current_stream()", lambda: torch.cuda.current_stream(plan.device), repetitions, plan))
    return rows


def _leases_us(store: TierStore, names: list[str], write: bool) -> Iterator[float]:
    for name in names:
        start = time.perf_counter_ns()
        with store.use(name, write=write):
            pass
        yield (time.perf_counter_ns() - start) / 1000


def _call(what: str, call: Callable[[], object], repetitions: int, plan: Plan) -> Row:
    laps = []
    for _ in range(repetitions):
        laps.append(timed(lambda: [call() for _ in range(200)]) * 1e6 / 200)
        plan.settle()
    return Row(f"of which: {what}", "us", laps)


def scale(plan: Plan) -> list[Row]:
    """`put`, `use` and `evict` in a store of 10,000 blocks beside one of 1,000, in turns."""
    sizes = (plan.scaled(1_000, 20), plan.scaled(10_000, 200))
    rows: list[Row] = []
    for mixed in (False, True):
        with contextlib.ExitStack() as stack:
            stores = []
            for num_blocks in sizes:
                directory = stack.enter_context(plan.empty())
                pages = num_blocks * (3 if mixed else 1)
                budgets = {"gpu": pages // 4 * PAGE, "ram": 2 * pages * PAGE + (64 << 20), "nvme_limit": 64 * pages * PAGE + (64 << 20)}
                store = stack.enter_context(TierStore(nvme=directory, device=plan.device, **budgets))  # type: ignore[arg-type]
                for number in range(num_blocks):
                    store.put(f"b{number}", _content(number, mixed))
                stores.append(store)
            rows += _compare(plan, stores, sizes, mixed)
    return rows


def _content(number: int, mixed: bool) -> torch.Tensor:
    return torch.zeros(PAGE * (1 + number * 7 % 5 if mixed else 1) // 4)


def _compare(plan: Plan, stores: list[TierStore], sizes: tuple[int, int], mixed: bool) -> list[Row]:
    """Microseconds per call in each store, call after call in turns."""
    batch = plan.scaled(200, 5)
    chance = random.Random(1)  # no order that a policy could learn in one store sooner than in the other

    def any_of(index: int) -> str:
        return f"b{chance.randrange(sizes[index])}"

    def put(index: int, turn: int) -> None:
        stores[index].put(f"new{turn}", _content(turn, mixed))

    def delete(index: int, turn: int) -> None:
        stores[index].delete(f"new{turn}")

    def hit(index: int, turn: int) -> None:
        with stores[index].use(f"b{turn % 8}"):
            pass

    def miss(index: int, turn: int) -> None:
        with stores[index].use(any_of(index)):
            pass

    def miss_writing(index: int, turn: int) -> None:
        with stores[index].use(any_of(index), write=True):
            pass

    def evict(index: int, turn: int) -> None:  # the same few blocks in both, as a file is made at the first time
        stores[index].evict(f"b{turn % 50}")

    calls = {
        "put": put,
        "delete": delete,
        "use, mostly misses": miss,
        "use of misses, write": miss_writing,
        "evict": evict,
        "use of hits": hit,
    }
    found: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in calls}
    for _ in range(plan.scaled(9, 2)):
        for what, call in calls.items():
            laps: tuple[list[float], list[float]] = ([], [])
            for turn in range(batch):
                for index in (0, 1):
                    if call is evict:
                        with stores[index].use(f"b{turn % 50}", write=True):
                            pass
                    laps[index].append(timed(lambda call=call, index=index, turn=turn: call(index, turn)) * 1e6)  # type: ignore[misc]
            for index in (0, 1):
                found[what][index].append(statistics.median(laps[index]))
    rows = []
    for what, (small, large) in found.items():
        ratios = [one / other for one, other in zip(large, small, strict=True)]
        words = f"{what}, {sizes[1]:,} blocks{' of mixed sizes' if mixed else ''}"
        rows.append(Row(words, f"x {sizes[0]:,}", ratios, "<= 1.2", {"small_us": small, "large_us": large}))
    return rows


def waiters(plan: Plan) -> list[Row]:
    """Tasks that ask for leases all at once: seconds until the last has had its own."""
    rows = []
    for num_tasks in plan.scaled(250, 10), plan.scaled(1_000, 40):
        for what, num_blocks in (("one block to write", 1), ("a block each to write, a sixteenth of them fit", num_tasks)):
            seconds = [asyncio.run(_wait(plan, num_tasks, num_blocks)) for _ in range(plan.scaled(3, 1))]
            detail = {"us_per_task": [lap * 1e6 / num_tasks for lap in seconds]}
            rows.append(Row(f"{num_tasks:,} tasks want {what}", "s", seconds, "", detail))
    return rows


async def _wait(plan: Plan, num_tasks: int, num_blocks: int) -> float:
    granted = 0

    async def one(number: int) -> None:
        nonlocal granted
        async with store.use(f"b{number % num_blocks}", write=True):
            granted += 1
            await asyncio.sleep(0)

    with plan.empty() as directory:
        async with AsyncTierStore(max(2, num_tasks // 16) * PAGE, "256MB", directory, device=plan.device, nvme_limit="1GB") as store:
            for number in range(num_blocks):
                await store.put(f"b{number}", torch.zeros(PAGE // 4))
            start = time.perf_counter()
            await asyncio.gather(*(one(number) for number in range(num_tasks)))
            seconds = time.perf_counter() - start
            assert granted == num_tasks
            await store.commit()
    return seconds
