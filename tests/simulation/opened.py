"""A store in a simulated world: the product's own parts, put together as `tierstore.opening` does, on simulated links and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.helpers import Hostile, Watched
from tests.simulation.cuda import SimulatedCuda, Streams
from tests.simulation.files import Disk, SimulatedFiles
from tests.simulation.links import Pace, SimulatedCopies
from tests.simulation.runtime import SimulatedRuntime
from tests.simulation.scenario import Scenario
from tests.simulation.world import World
from tierstore.catalog import PAGE, BlockId
from tierstore.mover.budget import NUM_SLOTS, RING_SLOTS, slot_bytes
from tierstore.mover.engine import Engine
from tierstore.nvme.directory import Directory
from tierstore.opening import recover
from tierstore.placement import Limits, Placement
from tierstore.policies import Lookahead, Policy, resolve
from tierstore.residency import Tier
from tierstore.scheduler import Scheduler
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena
from tierstore.trace import Link

PATH = "/simulated"

LANES = 3
"""A simulated GPU has a lane of fewer pages than that, perhaps none, through which blocks are moved."""


@dataclass
class Opened:
    """An engine and the simulated parts below it."""

    engine: Engine
    copies: SimulatedCopies | SimulatedCuda
    files: SimulatedFiles | None
    paces: tuple[Pace, ...]
    machine: Streams | None

    @property
    def num_faults(self) -> int:
        return self.copies.num_faults + (self.files.num_faults if self.files is not None else 0)

    def set_faults(self, chance: float, stuck: tuple[str, str] | None = None) -> None:
        for pace in self.paces:
            pace.faults, pace.stuck = chance, stuck

    def on_device(self, work: Callable[[], None]) -> None:
        """What a user has the device do under a lease: at once on the CPU, when the current stream comes to it on a GPU."""
        if self.machine is None:
            work()
        else:
            self.machine.kernel(work)


class WatchedLookahead(Watched):
    """Passes the optional question on, too."""

    def victims_for(self, tier: Tier, position: int) -> Iterator[BlockId]:
        assert isinstance(self.policy, Lookahead)
        return self.policy.victims_for(tier, position)


def policy_of(name: str) -> Policy:
    """Every policy but the hostile one is watched: the scheduler must keep to its side of the protocol."""
    policy = resolve("lru" if name == "hostile" else name)
    if isinstance(policy, Lookahead):
        return WatchedLookahead(policy)
    return Hostile(0) if name == "hostile" else Watched(policy)


def open_simulated(world: World, scenario: Scenario, disk: Disk, machine: Streams | None) -> Opened:
    """Open a store on what the disk holds.

    Args:
        machine: The simulated GPU; None: the device is the CPU.
    """
    link_pace, drive_pace = Pace(), Pace(bytes_per_s=1e9, latency_ns=8_000, jitter_ns=100_000)
    directory: Directory | None = None
    files: SimulatedFiles | None = None
    if scenario.nvme:
        files = SimulatedFiles(disk, drive_pace)
        files.syncs_fail = scenario.checksum
        limit = None if scenario.nvme_pages is None else scenario.nvme_pages * PAGE
        directory = Directory.open(PATH, limit=limit, checksum=scenario.checksum, keep=scenario.keep, direct_io=False, files=files)
        files.world = world
    ram_bytes = (scenario.ram_pages + NUM_SLOTS) * PAGE
    slot = slot_bytes(ram_bytes)
    slots = NUM_SLOTS + (RING_SLOTS if machine is not None else 0)
    runtime = SimulatedRuntime(world)
    placement = Placement(
        gpu_bytes=scenario.gpu_pages * PAGE,
        ram_bytes=ram_bytes - NUM_SLOTS * slot,
        has_nvme=directory is not None,
        policy=policy_of(scenario.policy),
        seconds_per_byte={Link.H2D: 2e-10, Link.D2H: 2e-10, Link.NVME_READ: 1e-9, Link.NVME_WRITE: 1e-9},
        limits=dict.fromkeys(Link, Limits(max_orders=scenario.orders)),
        clock=runtime.clock,
    )
    lane = scenario.gpu_pages % LANES * PAGE if machine is not None else 0
    device = DeviceArena(scenario.gpu_pages * PAGE + lane, torch.device("cpu"))
    host = HostArena(scenario.ram_pages * PAGE, threads=1)
    transfer = HostArena(slots * slot, threads=1)
    copies: SimulatedCopies | SimulatedCuda
    if machine is None:
        copies = SimulatedCopies(world, device, host, link_pace)
    else:
        copies = SimulatedCuda(machine, device, host, transfer, (NUM_SLOTS * slot, slot), lane, scenario)
    engine = Engine(
        Scheduler(placement, runtime.clock),
        device=device,
        host=host,
        copies=copies,
        directory=directory,
        transfer=transfer,
        slot_bytes=slot,
        runtime=runtime,
    )
    if isinstance(copies, SimulatedCopies):
        copies.loop = engine.loop
    if directory is not None:
        recover(engine, directory)
    return Opened(engine, copies, files, (link_pace, drive_pace), machine)
