"""Copies between simulated tiers: bytes land when the copy completes, and nobody may touch either side before that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tests.simulation.world import BrokenPromiseError, World
from tierstore.errors import TransferError
from tierstore.mover.streams import OnCpu, Report
from tierstore.requests import Action, Order
from tierstore.residency import Tier
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena

POISON = 0xA5
"""Every byte of a destination from the order until the copy has landed."""


@dataclass
class Pace:
    """How fast simulated links are, and how often they fail.

    Attributes:
        bytes_per_s: Of one copy; those of one direction follow one another.
        latency_ns: Of each.
        jitter_ns: The longest delay on top.
        faults: The chance that an operation fails.
        stuck: What always fails, and of which block; see `Scenario`.
    """

    bytes_per_s: float = 4e9
    latency_ns: int = 2_000
    jitter_ns: int = 30_000
    faults: float = 0.0
    stuck: tuple[str, str] | None = None

    def fails(self, world: World, doing: str, block: str) -> bool:
        """Whether a transfer of a block is to fail."""
        if self.stuck == (doing, block):
            return True
        return self.faults > 0 and world.decisions.chance(self.faults)

    def duration_ns(self, world: World, nbytes: int) -> int:
        return self.latency_ns + int(nbytes / self.bytes_per_s * 1e9) + world.jitter(self.jitter_ns)


def poison(target: torch.Tensor) -> None:
    target.fill_(POISON)


def is_poison(target: torch.Tensor) -> bool:
    return bool((target == POISON).all())


class SimulatedCopies(OnCpu):
    """As `ThreadCopies`: a copy is ordered and done at once, when its bytes have landed.

    Attributes:
        under_way: Orders that have not landed.
        num_faults: Copies that were made to fail.
    """

    def __init__(self, world: World, device: DeviceArena, host: HostArena, pace: Pace) -> None:
        super().__init__(device)
        self.loop: asyncio.AbstractEventLoop
        self.under_way: dict[int, Order] = {}
        self.num_faults = 0
        self._world = world
        self._host = host
        self._pace = pace
        self._free_ns = {Action.H2D: 0, Action.D2H: 0}

    def start(self, order: Order, ordered: Report, done: Report) -> None:
        world = self._world
        direction = Action.D2H if order.action is Action.D2H else Action.H2D
        begin = max(world.clock.now_ns(), self._free_ns[direction])
        behind_move = any(other.action is Action.COMPACT for other in self.under_way.values())
        self.under_way[order.number] = order
        landing: list[Callable[[], None]] = []
        if behind_move and begin > world.clock.now_ns():  # one thread per direction: what the move leaves is what this one finds
            world.at(begin, "", lambda: landing.append(self._begin(order)))
        else:
            landing.append(self._begin(order))
        end = self._free_ns[direction] = begin + self._pace.duration_ns(world, order.nbytes)
        fails = order.record is not None and self._pace.fails(world, order.action.value, order.record.block.name)
        world.note(f"begins {label(order)}")

        def complete() -> None:
            del self.under_way[order.number]
            error: BaseException | None = None
            if fails:
                self.num_faults += 1
                error = TransferError(f"simulated failure of {label(order)}", remedy="again")
            else:
                landing[0]()
                self.loop.call_soon_threadsafe(ordered, order, None)
            self.loop.call_soon_threadsafe(done, order, error)

        world.at(end, f"{'fails' if fails else 'lands'} {label(order)}", complete)

    def _begin(self, order: Order) -> Callable[[], None]:
        return self._begin_moves(order) if order.action is Action.COMPACT else self._begin_copy(order)

    def _begin_copy(self, order: Order) -> Callable[[], None]:
        gpu = self._device.tensor[order.offset_gpu : order.offset_gpu + order.nbytes]
        ram = self._host.tensor[order.offset_ram : order.offset_ram + order.nbytes]
        if order.offset_gpu < 0 or order.offset_ram < 0 or len(gpu) != order.nbytes or len(ram) != order.nbytes:
            raise BrokenPromiseError(f"{label(order)} has no extents: {order}")
        source, target = (ram, gpu) if order.action is Action.H2D else (gpu, ram)
        before = source.clone()
        poison(target)

        def land() -> None:
            if not torch.equal(source, before):
                raise BrokenPromiseError(f"the source of {label(order)} changed before the copy had landed")
            if not is_poison(target):
                raise BrokenPromiseError(f"the destination of {label(order)} was written before the copy had landed")
            target.copy_(source)

        return land

    def _begin_moves(self, order: Order) -> Callable[[], None]:
        arena = self._device.tensor if order.tier is Tier.GPU else self._host.tensor
        sources = [(arena[source : source + record.nbytes].clone(), target) for record, source, target in order.moves]
        touched = [arena[start : start + record.nbytes] for record, *starts in order.moves for start in starts]
        for piece in touched:
            poison(piece)

        def land() -> None:
            if not all(map(is_poison, touched)):
                raise BrokenPromiseError(f"what {label(order)} moves was written before it had landed")
            for moved, target in sources:
                arena[target : target + len(moved)].copy_(moved)

        return land

    def close(self) -> None:
        if self.under_way:
            raise BrokenPromiseError(f"closed with copies under way: {list(self.under_way.values())}")


def label(order: Order) -> str:
    """An order in the history."""
    if order.record is None:
        moves = ", ".join(f"{record.block.name} {source}->{target}" for record, source, target in order.moves)
        return f"#{order.number} compact {order.tier}: {moves}"
    where = f"gpu {order.offset_gpu}, ram {order.offset_ram}"
    return f"#{order.number} {order.kind} {order.action.value} {order.record.block.name} v{order.version} ({where})"
