"""The same leases through a real store on the CPU device, to see whether the simulation tells the truth.

The store is given the same trace: one thread leases, sleeps for as long as the computing takes, and releases. The simulation is then given
the size of the store's arenas, and the rates that its links turned out to have. Synthetic workloads are scaled down to what a drive and a
few seconds bear.

How near they must be: policies that fetch on demand alone decide by the order of accesses, so that their misses and bytes come out
alike but for victims chosen while other transfers are under way (`TOLERANCE`). What looks ahead decides by the clock too, which for a real
drive and threads is never the simulated one (`TOLERANCE_AHEAD`).
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import sources
from benchmarks.workloads import SYNTHETIC, Workload, pages
from tierstore import TierStore
from tierstore.planner.simulate import LinkModel, Step, simulate
from tierstore.residency import Tier
from tierstore.trace import Link

POINTS = (("demo", "lru", 30), ("full", "sieve", 50), ("lora", "lookahead", 30))
"""(workload, policy, budget in percent)."""

SCALED_BYTES = 48_000_000
"""All blocks of a scaled workload together."""

PERIODS = 4
"""Run of each workload."""

TOLERANCE, TOLERANCE_AHEAD = 0.02, 0.15
"""Relative difference of misses, and of bytes on any link to all bytes, that is put down to timing."""


@dataclass(frozen=True)
class Point:
    """What was counted over all periods of one run: in the store, and in the simulation.

    Attributes:
        misses_real, misses_simulated: On the device, with what was on its way counted as there.
        bytes_real, bytes_simulated: By link.
        tolerance: What the greatest difference may be.
    """

    workload: str
    policy: str
    budget: int
    gpu_bytes: int
    ram_bytes: int
    accesses: int
    misses_real: int
    misses_simulated: int
    bytes_real: dict[str, int]
    bytes_simulated: dict[str, int]
    seconds_real: float
    seconds_simulated: float
    tolerance: float

    @property
    def difference(self) -> float:
        """The greatest, of misses to accesses and of each link's bytes to those of all links."""
        total = max(1, sum(self.bytes_real.values()))
        bytes_off = max(abs(self.bytes_real[link] - self.bytes_simulated[link]) for link in self.bytes_real) / total
        return max(bytes_off, abs(self.misses_real - self.misses_simulated) / self.accesses)

    @property
    def agrees(self) -> bool:
        return self.difference <= self.tolerance


def confirm(quick: bool = False) -> list[Point]:
    """Run every point, or with `quick` the one that takes least."""
    logging.getLogger("tierstore").setLevel(logging.ERROR)  # these stores are not meant to be kept, and need not say so
    found = []
    for name, policy, budget in POINTS[2:] if quick else POINTS:
        workload = sources.load(sources.DEMO) if name == "demo" else scaled(SYNTHETIC[name](True))
        workload = dataclasses.replace(workload, periods=workload.periods[:PERIODS])
        with tempfile.TemporaryDirectory() as directory:
            found.append(compare(dataclasses.replace(workload, name=name), policy, budget, Path(directory)))
    return found


def scaled(workload: Workload) -> Workload:
    """The same leases with smaller blocks, and times shorter by as much as slower links allow."""
    factor = SCALED_BYTES / workload.nbytes
    periods = tuple(
        tuple(dataclasses.replace(step, compute_ns=round(step.compute_ns * factor * 4)) for step in period) for period in workload.periods
    )
    blocks = {name: pages(nbytes * factor) for name, nbytes in workload.blocks.items()}
    return dataclasses.replace(workload, blocks=blocks, periods=periods)


def compare(workload: Workload, policy: str, budget: int, directory: Path) -> Point:
    """One workload through a store, and through the simulation of that store."""
    gpu_bytes = pages(max(workload.nbytes * budget // 400, 3 * workload.largest_lease))
    ram_bytes = pages(max(workload.nbytes * budget // 100, 3 * workload.largest_lease))
    steps = [step for period in workload.periods for step in period]
    with TierStore(gpu_bytes, ram_bytes, directory / "swap", device="cpu", policy=policy) as store:
        arenas = {tier: store._engine.scheduler.placement.capacity_bytes(tier) for tier in (Tier.GPU, Tier.RAM)}  # type: ignore[union-attr]
        _put(store, workload, arenas[Tier.RAM])
        before = store.stats()
        start_s = time.perf_counter()
        _run(store, steps)
        seconds_real = time.perf_counter() - start_s
        _settle(store)
        after = store.stats()
    bytes_real = {link.value: after.links[link.value].bytes - before.links[link.value].bytes for link in Link}
    links = {}
    for link in Link:
        moved, busy_ns = bytes_real[link.value], after.links[link.value].busy_ns - before.links[link.value].busy_ns
        links[link] = LinkModel(moved / busy_ns * 1e9) if moved and busy_ns else LinkModel(1e9)
    total = simulate(
        steps,
        workload.blocks,
        gpu_bytes=arenas[Tier.GPU],
        ram_bytes=arenas[Tier.RAM],
        policy=policy,
        links=links,
        frozen=workload.frozen,
        device_ordered=False,
    ).total
    return Point(
        workload=workload.name,
        policy=policy,
        budget=budget,
        gpu_bytes=arenas[Tier.GPU],
        ram_bytes=arenas[Tier.RAM],
        accesses=total.accesses,
        misses_real=after.tiers["gpu"].misses - before.tiers["gpu"].misses,
        misses_simulated=total.misses[Tier.GPU],
        bytes_real=bytes_real,
        bytes_simulated={link.value: total.on(link).bytes for link in Link},
        seconds_real=seconds_real,
        seconds_simulated=total.ns / 1e9,
        tolerance=TOLERANCE_AHEAD if policy in ("lookahead", "static") else TOLERANCE,
    )


def _put(store: TierStore, workload: Workload, ram_bytes: int) -> None:
    """Into RAM in the order given while there is room, the others onto the drive; as the simulation does."""
    free = ram_bytes
    for name, nbytes in workload.blocks.items():
        tier = "ram" if nbytes <= free else "nvme"
        free -= nbytes if tier == "ram" else 0
        store.put(name, torch.zeros(nbytes, dtype=torch.uint8), tier=tier, frozen=name in workload.frozen)


def _run(store: TierStore, steps: Sequence[Step]) -> None:
    for step in steps:
        with store.use(*step.blocks, write=[name for name in step.blocks if name in step.writes]):
            time.sleep(step.compute_ns / 1e9)


def _settle(store: TierStore, *, quiet_s: float = 0.2, timeout_s: float = 20.0) -> None:
    """Wait until no link has moved anything for a while."""
    end_s = time.monotonic() + timeout_s
    last, since_s = -1, time.monotonic()
    while time.monotonic() < end_s:
        moved = sum(link.transfers for link in store.stats().links.values())
        if moved != last:
            last, since_s = moved, time.monotonic()
        elif time.monotonic() - since_s > quiet_s:
            return
        time.sleep(quiet_s / 10)


def table(points: Sequence[Point]) -> Table:
    found = Table(title="Confirmed by real runs on the CPU device: counted in the store / in the simulation", title_justify="left")
    found.add_column("run")
    for name in ("device misses", "h2d", "d2h", "NVMe read", "NVMe write", "difference", "allowed"):
        found.add_column(name, justify="right")
    for point in points:
        moved = (f"{point.bytes_real[link.value] / 1e6:.1f} / {point.bytes_simulated[link.value] / 1e6:.1f} MB" for link in Link)
        verdict = f"{point.difference:.1%}" + ("" if point.agrees else " [bold red]too far[/]")
        run = f"{point.workload}, {point.policy}, {point.budget} %"
        found.add_row(run, f"{point.misses_real} / {point.misses_simulated}", *moved, verdict, f"{point.tolerance:.0%}")
    return found
