"""What a commit costs beside a step of training, beyond the bytes that were not yet on the drive."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.core_parts.measure import MIB, PAGE, Plan, Row, timed
from tierstore import CommitHandle, TierStore
from tierstore.catalog import round_up

KEEP = 1
TARGET = "<= 1"
"""Per cent of a step."""


@dataclass(frozen=True)
class Load:
    """A model, and what one step does to it.

    Attributes:
        num_blocks, block_bytes: What there is.
        every: Of so many blocks, one is written in a step; 0: none.
        step_s: How long a step computes, in all.
    """

    what: str
    num_blocks: int
    block_bytes: int
    every: int
    step_s: float

    @property
    def written_bytes(self) -> int:
        return sum(map(self.is_written, range(self.num_blocks))) * round_up(self.block_bytes, PAGE)

    def is_written(self, number: int) -> bool:
        return self.every > 0 and number % self.every == 0

    def names(self) -> list[str]:
        return [f"layers.{number}" for number in range(self.num_blocks)]


class Loop:
    """Steps over a store: each block is leased once, and computed with for its share of the step.

    The computing is a pause: as with a GPU, the host has nothing to do meanwhile.
    """

    def __init__(self, store: TierStore, load: Load) -> None:
        self.store = store
        self.load = load
        for name in load.names():
            store.put(name, torch.zeros(load.block_bytes // 4))

    def step(self) -> None:
        start, share = time.perf_counter(), self.load.step_s / self.load.num_blocks
        for number, name in enumerate(self.load.names()):
            write = self.load.is_written(number)
            with self.store.use(name, write=write) as tensor:
                if write:
                    tensor[:1024].add_(1)
                time.sleep(max(0.0, start + (number + 1) * share - time.perf_counter()))

    @property
    def written_bytes(self) -> int:
        return self.store.stats().links["nvme_write"].bytes


def _loads(plan: Plan) -> list[Load]:
    step_s = 5.0 if not plan.quick else 0.05
    large, many = plan.scaled(96, 6), plan.scaled(2000, 20)
    size = plan.scaled(16 * MIB, 4 * PAGE)
    return [
        Load(f"{large} blocks of {size / MIB:.3g} MiB, all written", large, size, 1, step_s),
        Load(f"{large} blocks of {size / MIB:.3g} MiB, one of 8 written", large, size, 8, step_s),
        Load(f"{large} blocks of {size / MIB:.3g} MiB, none written", large, size, 0, step_s),
        Load(f"{many} blocks of 64 KiB, all written", many, 16 * PAGE, 1, step_s),
    ]


def _bound(load: Load) -> int:
    """The limit that is stated to be enough for one commit at a time: `keep` generations, one in flight, and the newest state."""
    return (KEEP + 2) * (load.num_blocks * (round_up(load.block_bytes, PAGE) + 2 * PAGE) + MIB * (1 + load.num_blocks // 1000)) + MIB


def _with_loop(plan: Plan, load: Load, measure: Callable[[Loop], list[Row]]) -> list[Row]:
    """On a store whose RAM holds all blocks and whose device holds a few."""
    whole = load.num_blocks * (round_up(load.block_bytes, PAGE) + PAGE)
    gpu = max(4 * load.block_bytes, whole // 16)
    with (
        plan.empty() as where,
        TierStore(gpu, whole + (192 << 20), where, device=plan.device, nvme_limit=_bound(load), keep=KEEP) as store,
    ):
        loop = Loop(store, load)
        for _ in range(2):  # files are made, and the order of accesses is learnt
            loop.step()
            store.commit()
        rows = measure(loop)
        peak = store.stats().tiers["nvme"].peak_bytes
        assert peak <= _bound(load), f"{peak} bytes on the drive, more than stated"
        return [*rows, Row(f"most of the drive ever used, of what is stated: {load.what}", "x", [peak / _bound(load)], "<= 1")]


def waiting(plan: Plan) -> list[Row]:
    """`commit()` when all bytes are on the drive already: syncs, the manifest and letting go of the generation before."""

    def measure(load: Load) -> Callable[[Loop], list[Row]]:
        def on(loop: Loop) -> list[Row]:
            steps, commits, flushes, counted = [], [], [], []
            for _ in range(plan.scaled(5, 2)):
                before = loop.written_bytes
                steps.append(timed(loop.step))
                flushes.append(timed(loop.store.flush))
                commits.append(timed(loop.store.commit))
                counted.append(loop.written_bytes - before)
            detail = {"step_s": steps, "flush_s": flushes, "commit_s": commits}
            share = [100 * commit / step for commit, step in zip(commits, steps, strict=True)]
            excess = [bytes_written - load.written_bytes for bytes_written in counted]
            return [
                Row(f"commit(), of a step: {load.what}", "%", share, TARGET, detail),
                Row(f"bytes written beyond those that changed: {load.what}", "bytes", excess, "<= 0"),
            ]

        return on

    return [row for load in _loads(plan) for row in _with_loop(plan, load, measure(load))]


def going_on(plan: Plan) -> list[Row]:
    """`commit(wait=False)`: how much longer the next step takes than one beside which nothing is committed, in turns."""

    def measure(load: Load, flushed: bool) -> Callable[[Loop], list[Row]]:
        def on(loop: Loop) -> list[Row]:
            plain, beside, calls = [], [], []
            for _ in range(plan.scaled(4, 2)):
                loop.store.flush()
                plain.append(timed(loop.step))
                if flushed:
                    loop.store.flush()
                handle: list[CommitHandle] = []

                def commit(handle: list[CommitHandle] = handle) -> None:
                    started = loop.store.commit(wait=False)
                    assert isinstance(started, CommitHandle)
                    handle.append(started)

                calls.append(timed(commit))
                beside.append(calls[-1] + timed(loop.step))
                handle[0].result()
            detail = {"plain_s": plain, "beside_s": beside, "call_s": calls}
            longer = [100 * (other / step - 1) for other, step in zip(beside, plain, strict=True)]
            name = "all bytes on the drive before" if flushed else "bytes still to be written"
            return [Row(f"commit(wait=False), {name}: {load.what}", "%", longer, TARGET if flushed else "", detail)]

        return on

    large, *_, many = _loads(plan)
    return [
        *_with_loop(plan, large, measure(large, True)),
        *_with_loop(plan, many, measure(many, True)),
        *_with_loop(plan, large, measure(large, False)),
    ]


def unchanged(plan: Plan) -> list[Row]:
    """Bytes written by steps and commits in which nothing changes, though everything passes through the device."""
    load = _loads(plan)[2]

    def measure(loop: Loop) -> list[Row]:
        before = loop.written_bytes
        for _ in range(2):
            loop.step()
            loop.store.commit()
        return [Row("bytes of payload written by two commits of what did not change", "bytes", [loop.written_bytes - before], "<= 0")]

    return _with_loop(plan, load, measure)
