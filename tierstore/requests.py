"""What callers ask of the scheduler, what the scheduler asks of the engine, and what it keeps about each block. Pure data."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from tierstore.catalog import Block, BlockId
from tierstore.residency import VALID, Event, State, Tier, step
from tierstore.trace import Kind, Link

Owner = Hashable
"""Who holds a lease: a thread, or an asyncio task."""


class Copy:
    """One tier's copy of one block.

    Attributes:
        state: Where it stands in `residency.NEXT`.
        valid: The state is one of `residency.VALID`: kept beside it, as every lease asks.
        loading: The state is `LOADING`; likewise.
        offset: Its extent in the tier's arena, -1 without one.
        readers: Transfers and host reads under way that read the extent. It is not overwritten, moved or freed meanwhile.
        moving: The bytes are being moved to `offset` by a compaction.
    """

    __slots__ = ("loading", "moving", "offset", "readers", "state", "valid")

    def __init__(self) -> None:
        self.state = State.ABSENT
        self.valid = False
        self.loading = False
        self.offset = -1
        self.readers = 0
        self.moving = False

    def apply(self, event: Event) -> None:
        self.state = state = step(self.state, event)
        self.valid = state in VALID
        self.loading = state is State.LOADING

    @property
    def settled(self) -> bool:
        """No transfer touches it."""
        return not (self.readers or self.moving or self.loading)


class Record:
    """All the scheduler knows of one block.

    Attributes:
        version: Counts the times the block was written; the newest content has this number.
        nvme_version: Version of the content of the shard, or of the model file that the block was adopted from; -1 without one.
        nvme_writing: A write of this block to NVMe is under way.
        loads: Orders under way that load the extent that it has on the device now.
        readers: Read leases per owner. writer, writer_depth: the write lease.
        born: When its `put` finished, in the sequence of requests; None before.
        blank: It has no content: declared and not written yet, or given up by its last lease. No tier holds bytes that anybody wants, and
            a commit passes it by. See [Note: Blank blocks] in `scheduler`.
        locked: A `put`, `write` or `delete` works on the bytes from the host; no transfer may start.
        hold: The tier it was ordered to stay on.
        commit_pending: Must reach NVMe for a commit before it may be written again.
        used_at: Position in the trace of its last access, -1 before the first.
        load_error, save_error: Why the last transfer failed; cleared when somebody asks again.
        asked: Orders given before somebody last asked for the block; those that fail are tried again.
    """

    __slots__ = (
        "asked",
        "blank",
        "block",
        "born",
        "commit_pending",
        "gpu",
        "hold",
        "id",
        "load_error",
        "loads",
        "locked",
        "nvme_version",
        "nvme_writing",
        "ram",
        "read_for_load",
        "readers",
        "save_error",
        "used_at",
        "vacating",
        "version",
        "writer",
        "writer_depth",
    )

    def __init__(self, number: BlockId, block: Block) -> None:
        self.id = number
        self.block = block
        self.version = 0
        self.nvme_version = -1
        self.nvme_writing = False
        self.gpu = Copy()
        self.ram = Copy()
        self.readers: dict[Owner, int] = {}
        self.writer: Owner | None = None
        self.writer_depth = 0
        self.born: int | None = None
        self.blank = False
        self.locked = False
        self.hold: Tier | None = None
        self.commit_pending = 0
        self.asked = 0
        self.load_error: BaseException | None = None
        self.save_error: BaseException | None = None
        self.read_for_load = False
        self.loads: set[int] = set()
        self.vacating = False
        self.used_at = -1

    def copy(self, tier: Tier) -> Copy:
        return self.gpu if tier is Tier.GPU else self.ram

    @property
    def nbytes(self) -> int:
        return self.block.nbytes

    @property
    def leased(self) -> bool:
        return bool(self.readers) or self.writer is not None

    @property
    def coming_down(self) -> bool:
        """Whether its content is on the way from the device to RAM, and in RAM only once it has landed."""
        return self.ram.loading and not self.read_for_load

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that hold the newest content."""
        found = [tier for tier in (Tier.GPU, Tier.RAM) if self.copy(tier).valid]
        if self.nvme_version == self.version:
            found.append(Tier.NVME)
        return tuple(found)


class Action(Enum):
    """What an order has the engine do."""

    H2D = "h2d"
    D2H = "d2h"
    READ = "nvme_read"
    WRITE = "nvme_write"
    COMPACT = "compact"


LINK_OF = {Action.H2D: Link.H2D, Action.D2H: Link.D2H, Action.READ: Link.NVME_READ, Action.WRITE: Link.NVME_WRITE}


@dataclass(eq=False, slots=True)
class Order:
    """One thing for the engine to carry out.

    Attributes:
        offset_gpu, offset_ram: Extents concerned, -1 where none.
        version: Content that moves.
        moves: For COMPACT: (record, source, target) in the order to carry them out.
        hole: For COMPACT: the extent that becomes free at the end.
    """

    number: int
    action: Action
    kind: Kind
    nbytes: int
    queued_ns: int
    record: Record | None = None
    offset_gpu: int = -1
    offset_ram: int = -1
    version: int = -1
    tier: Tier | None = None
    moves: tuple[tuple[Record, int, int], ...] = ()
    hole: int = -1


@dataclass(eq=False)
class Request:
    """Something a caller waits for. The scheduler resolves it once: `error` is None for success.

    Attributes:
        sequence: Order of arrival.
        owner: Who asked; the leases it already holds are fixed while it waits.
        records: The blocks concerned.
        cause: What it waited for last, as in `WaitEvent.cause`.
        claimed: What `claim` found.
    """

    owner: Owner
    records: tuple[Record, ...]
    sequence: int = 0
    cause: str = "copy"
    resolved: bool = False
    error: BaseException | None = None
    queued_ns: int = 0
    claimed: tuple[frozenset[int], frozenset[int]] | None = field(default=None, repr=False)


@dataclass(eq=False)
class Use(Request):
    """Lease blocks on the device, all or none.

    Attributes:
        writes: Ids of those that may be written.
        fresh: Of these, those whose content does not matter: it is not loaded.
        spent: Of these, those whose content nobody wants once the lease has ended.
    """

    writes: frozenset[int] = frozenset()
    fresh: frozenset[int] = frozenset()
    spent: frozenset[int] = frozenset()
    lease: Lease | None = None


@dataclass(eq=False)
class Place(Request):
    """Bring a block to a tier to be held there."""

    tier: Tier = Tier.GPU


@dataclass(eq=False)
class Vacate(Request):
    """Take a block off the device and out of RAM. In the background: given up as soon as somebody wants the block."""

    background: bool = False


@dataclass(eq=False)
class Make(Request):
    """An extent for a new block on `tier`; the caller fills it."""

    cause: str = "space"
    tier: Tier = Tier.RAM


@dataclass(eq=False)
class HostAccess(Request):
    """Read or replace a block's bytes from the host, where they are; or remove it.

    Attributes:
        tier: Once a read is granted: where to read. That copy is neither moved nor dropped meanwhile.
        removing: The bytes are not replaced, but the block with them.
    """

    write: bool = False
    removing: bool = False
    lease: Lease | None = None
    tier: Tier | None = None


@dataclass(eq=False)
class Save(Request):
    """Bring every dirty block to the lowest tier.

    Attributes:
        commit: It is a commit: the blocks are those of one instant at which nobody held a write lease.
        waited: The owner does nothing else until it has ended.
        started: That instant has come.
        versions: Of a commit: every block it covers, and its version at that instant. Who is granted a fresh lease right behind it has
            another.
        pending: Blocks still to be saved, and the version of each.
    """

    commit: bool = False
    waited: bool = True
    started: bool = False
    versions: dict[Record, int] = field(default_factory=dict)
    pending: dict[Record, int] = field(default_factory=dict)

    def covers(self, record: Record) -> bool:
        """Whether it is about this block. Asked when it starts.

        A flush is about what was there when it was asked for. A commit holds the state of the instant at which it starts: writes
        of that moment may rest on blocks that came while it waited for writers.
        """
        return record.born is not None and not record.blank and (self.commit or record.born < self.sequence)


@dataclass(eq=False, slots=True)
class Lease:
    """What a granted `Use` gave.

    Attributes:
        begun: Blocks that are to be written whole, since nothing was loaded, and the version that is.
    """

    owner: Owner
    records: tuple[Record, ...]
    writes: frozenset[int]
    spent: frozenset[int] = frozenset()
    begun: tuple[tuple[Record, int], ...] = ()


def names_of(records: tuple[Record, ...]) -> str:
    return ", ".join(repr(record.block.name) for record in records[:3]) + (" and more" if len(records) > 3 else "")


def alone(request: Request) -> tuple[Record, ...]:
    """The blocks of which no transfer may start ahead of need: it waits until none touches them, or writes all of them."""
    if isinstance(request, Use):
        return tuple(record for record in request.records if record.id in request.fresh) if request.fresh else ()
    return request.records if isinstance(request, Vacate) or (isinstance(request, HostAccess) and request.write) else ()


def claim(request: Request) -> tuple[frozenset[int], frozenset[int]]:
    """(block ids it reads, block ids it writes or takes exclusively): the same for as long as it waits."""
    if request.claimed is None:
        request.claimed = _claim(request)
    return request.claimed


def _claim(request: Request) -> tuple[frozenset[int], frozenset[int]]:
    numbers = frozenset(record.id for record in request.records)
    if isinstance(request, Use):
        return numbers - request.writes, request.writes
    if isinstance(request, HostAccess):
        return (frozenset(), numbers) if request.write else (numbers, frozenset())
    if isinstance(request, Vacate) and not request.background:
        return frozenset(), numbers
    if isinstance(request, Place):
        return numbers, frozenset()
    return frozenset(), frozenset()
