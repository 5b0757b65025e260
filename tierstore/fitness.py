"""What can be granted: now, once others have let go, or never; and the errors that say so. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Set

from tierstore.arena import pack
from tierstore.errors import CapacityError, DeadlockError
from tierstore.placement import Placement
from tierstore.requests import HostAccess, Make, Owner, Place, Record, Request, Save, Use, claim, names_of
from tierstore.residency import State, Tier


def check_fits(placement: Placement, request: Request, owned: Collection[Record]) -> None:
    """Refuse at once what can never be granted, with the caller's own leases and all held blocks as they are."""
    for record in request.records:
        if record.nbytes > placement.arenas[Tier.RAM].capacity_bytes:
            raise CapacityError(
                f"block {record.block.name!r} is larger than tier 'ram', through which it has to pass",
                need=f"{record.nbytes} bytes",
                have=f"{placement.arenas[Tier.RAM].capacity_bytes} bytes for blocks",
                remedy="raise ram=",
                block=record.block.name,
                tier="ram",
            )
    capacity = placement.arenas[Tier.GPU].capacity_bytes
    if isinstance(request, Place | Make) and request.tier is not Tier.GPU:
        return
    need = sum(record.nbytes for record in request.records if record not in owned)
    own_bytes = sum(record.nbytes for record in owned)
    others = (record for record in placement.held.values() if record.hold is Tier.GPU)
    held = sum(record.nbytes for record in others if record not in request.records and record not in owned)
    if need + held <= capacity and not owned:
        return
    if Beside(placement, lambda record: record in owned).fits(request.records):
        return
    have = capacity - held - own_bytes
    raise CapacityError(
        f"tier 'gpu' can never give room to {names_of(request.records)}",
        need=f"{need} bytes" + (" in one piece each" if need <= have else ""),
        have=f"{have} bytes beside held blocks ({held}) and the caller's own leases ({own_bytes})",
        remedy="release a lease, unhold() blocks, use smaller blocks or raise gpu=",
        tier="gpu",
    )


def takes_passage(placement: Placement, request: Request) -> CapacityError | None:
    """The error for a request after which blocks that lie in model files could not pass through RAM any more. Without NVMe only.

    Judged when nothing stands against the request any more: whoever waits has no room yet. Of several blocks in one request each gets
    its home by itself, so another request may come in between.
    """
    if placement.has_nvme or not placement.has_models:
        return None
    if isinstance(request, Make):
        homeless = {record for record in request.records if record.ram.state is State.ABSENT}
    elif not isinstance(request, Use | HostAccess) or (isinstance(request, HostAccess) and request.removing):
        return None
    else:
        _, writes = claim(request)
        homeless = {record for record in request.records if record.id in writes and placement.backed(record)}
    if not homeless:
        return None
    need = sum(record.nbytes for record in homeless)
    passing, homes = placement.passing_bytes(homeless), placement.homes_bytes(homeless)
    capacity = placement.arenas[Tier.RAM].capacity_bytes
    if not passing or homes + need + passing <= capacity:
        return None
    names = names_of(request.records)
    return CapacityError(
        f"{names} would take the last room in RAM, which blocks in model files pass through"
        if isinstance(request, Make)
        else f"to write {names} would take the last room in RAM, which blocks in model files pass through",
        need=f"{need} bytes to stay there, and {passing} for the largest other block to pass through",
        have=f"{capacity - homes} bytes beside what is there for good",
        remedy="raise ram=, delete() or unhold() blocks, or name a directory with nvme=",
        tier="ram",
        block=next(iter(homeless)).block.name,
    )


def scattered(placement: Placement, request: Request) -> CapacityError:
    arenas = placement.arenas.items()
    hung = sum(placement.quarantined.values())
    free = "; ".join(f"{arena.free_bytes} free bytes on {tier.value}, at most {arena.largest_hole} in one piece" for tier, arena in arenas)
    return CapacityError(
        f"no place for {names_of(request.records)}: what cannot leave leaves no hole that is large enough",
        need=f"{max((record.nbytes for record in request.records), default=0)} bytes in one piece",
        have=free + (f", and {hung} bytes kept for reads that do not return" if hung else ""),
        remedy="check the drive"
        if hung
        else "unhold() blocks, use smaller blocks or raise the budget"
        if placement.has_nvme
        else "raise ram= or delete() blocks: without nvme= every block has its home in RAM",
    )


def lacks_room(request: Request) -> bool:
    """Whether a request, when nothing is under way, waits for space and not for a lease."""
    if isinstance(request, Save):
        return request.started and any(record.writer is None for record in request.pending)
    return request.cause not in ("lease", "commit")


def room_in_ram(placement: Placement) -> int:
    """Bytes that are free in RAM without NVMe, or will be once copies of adopted blocks have been dropped."""
    dropped = (
        record.nbytes
        for record in placement.records.values()
        if record.ram.state is not State.ABSENT and placement.backed(record) and record.hold is not Tier.RAM
    )
    return placement.arenas[Tier.RAM].free_bytes + sum(dropped)


class Beside:
    """The room on the device beside those leased records that are `fixed`. All else may move or be evicted, but held blocks stay."""

    def __init__(self, placement: Placement, fixed: Callable[[Record], bool]) -> None:
        staying = [record for record in placement.leased.values() if record.gpu.offset >= 0 and fixed(record)]
        self._inside = {record.id for record in staying}
        self._gaps: list[int] = []
        position = 0
        for offset, nbytes in sorted((record.gpu.offset, record.nbytes) for record in staying):
            self._gaps.append(offset - position)
            position = offset + nbytes
        self._gaps.append(placement.arenas[Tier.GPU].capacity_bytes - position)
        self._held = {record.id: record.nbytes for record in placement.held.values() if record.hold is Tier.GPU}

    def fits(self, records: Iterable[Record]) -> bool:
        """Whether they fit there, however everything else is moved."""
        wanted = self._held | {record.id: record.nbytes for record in records}
        return pack(self._gaps, [nbytes for number, nbytes in wanted.items() if number not in self._inside])


class Prospect:
    """What could be granted once the owners in `released` hold nothing, and while `others` wait.

    Good for one look at any number of requests, as long as nothing changes.
    """

    def __init__(self, placement: Placement, released: Set[Owner], others: Iterable[Request] = ()) -> None:
        self._placement = placement
        self._released = released
        self._made = {record for other in others if isinstance(other, Make) for record in other.records}
        self._beside: Beside | None = None

    def grantable(self, request: Request) -> bool:
        """Whether the request could be served then."""
        placement, released = self._placement, self._released
        if isinstance(request, Save):
            blocking = request.pending if request.started else placement.leased.values()
            return not any(record.writer is not None and record.writer not in released for record in blocking)
        if isinstance(request, Make):
            (record,) = request.records
            if not placement.has_nvme and record.ram.state is State.ABSENT and room_in_ram(placement) < record.nbytes:
                return False  # without NVMe nothing else ever leaves RAM
            return request.tier is not Tier.GPU or self._fits(request.records)
        _, writes = claim(request)
        for record in request.records:
            if record in self._made:
                return False
            if record.writer is not None and record.writer not in released and record.writer != request.owner:
                return False
            if record.id in writes and any(owner not in released and owner != request.owner for owner in record.readers):
                return False
        return not isinstance(request, Use | Place) or self._fits(request.records)

    def _fits(self, records: Collection[Record]) -> bool:
        if self._beside is None:
            self._beside = Beside(self._placement, self._fixed)
        return self._beside.fits(records)

    def _fixed(self, record: Record) -> bool:
        released = self._released
        return (record.writer is not None and record.writer not in released) or any(owner not in released for owner in record.readers)


def deadlock(victim: Request, num_requests: int) -> DeadlockError:
    return DeadlockError(
        f"holders of leases wait for one another; the request for {names_of(victim.records)} came last",
        have=f"{num_requests} requests in the circle",
        remedy="take all blocks in one use(), or release one lease before asking for the next",
    )
