"""Many seeds, one after the other or on several processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.simulation.run import run
from tests.simulation.scenario import draw

CHUNK = 25


@dataclass
class Part:
    """What became of some seeds."""

    seeds: int = 0
    steps: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Part) -> None:
        self.seeds += other.seeds
        self.steps += other.steps
        self.failures += other.failures
        self.outcomes += other.outcomes


def run_seeds(first: int, end: int, stop: bool = False) -> Part:
    """Run seeds one after the other.

    Args:
        stop: At the first failure.
    """
    torch.set_num_threads(1)
    part = Part()
    for seed in range(first, end):
        outcome = run(draw(seed), seed)
        part.seeds += 1
        part.steps += outcome.world.steps
        part.outcomes += outcome.outcomes
        if outcome.failure is not None:
            part.failures.append((seed, str(outcome.failure)))
            if stop:
                break
    gc.collect()
    return part


def _pin(cores: multiprocessing.SimpleQueue[int]) -> None:
    """Stay on one core: of a simulation's threads only one runs at a time, and handing over to another core takes far longer."""
    os.sched_setaffinity(0, {cores.get()})


def report(seeds: str, jobs: int, *, stop: bool, work: Callable[[int, int, bool], Part] = run_seeds) -> int:
    """Run seeds by hand, and print what became of them. Returns the exit status.

    Args:
        seeds: "A:B", from A to before B.
        jobs: Processes.
        stop: At the first failure.
        work: Runs some of them one after the other, on a process of its own where there are several.
    """
    first, end = map(int, seeds.split(":"))
    begun = time.monotonic()
    total = work(first, end, stop) if jobs == 1 else many(first, end, jobs, stop=stop, work=work)
    seconds = time.monotonic() - begun
    if jobs == 1:
        for seed, message in total.failures:
            print(f"seed {seed} fails: {message}\n")
    print("; ".join(f"{what}: {count}" for what, count in sorted(total.outcomes.items())))
    failed = [seed for seed, _ in total.failures]
    rate = total.seeds / seconds
    which = f" {failed[:20]}" if failed else ""
    print(f"seeds {first}:{end}: {total.seeds} run, {len(failed)} failed{which}, {total.steps} steps, {rate:.1f} seeds/s")
    return int(bool(failed))


def many(first: int, end: int, jobs: int, *, stop: bool, work: Callable[[int, int, bool], Part] = run_seeds) -> Part:
    """Run seeds on several processes. Failures are printed as they come."""
    total = Part()
    begun = time.monotonic()
    chunks = iter(range(first, end, CHUNK))
    context = multiprocessing.get_context("spawn")
    pin: dict[str, Any] = {}
    if hasattr(os, "sched_setaffinity"):
        cores = context.SimpleQueue()
        available = sorted(os.sched_getaffinity(0))
        for job in range(jobs):
            cores.put(available[job % len(available)])
        pin = {"initializer": _pin, "initargs": (cores,)}
    with ProcessPoolExecutor(jobs, mp_context=context, **pin) as pool:
        running: set[Future[Part]] = set()
        while True:
            while len(running) < 2 * jobs and (start := next(chunks, None)) is not None:
                running.add(pool.submit(work, start, min(end, start + CHUNK), stop))
            if not running:
                return total
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for part in (future.result() for future in done):
                total.add(part)
                for seed, message in part.failures:
                    print(f"seed {seed} fails: {message}\n", flush=True)
            if stop and total.failures:
                for future in running:
                    future.cancel()
                return total
            if total.seeds % (CHUNK * 40) < CHUNK * len(done):
                rate = total.seeds / (time.monotonic() - begun)
                print(f"{total.seeds} seeds, {len(total.failures)} failures, {rate:.1f} seeds/s", flush=True)
