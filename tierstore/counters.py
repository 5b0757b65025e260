"""What the store counts, as typed values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TierStats:
    """One tier.

    Attributes:
        capacity_bytes: Its budget.
        used_bytes: Held now, transfer space included.
        peak_bytes: The most ever held at once.
        num_blocks: Blocks whose newest content it has.
        held_bytes: Of blocks ordered to stay.
        hits, misses: On the GPU, blocks of leases that were found there (or on their way) when asked for, and those that were
            not. In RAM, loads to the device that RAM served by itself, and those that had to read NVMe first.
        evictions: Copies that left for others to have room.
        quarantined_bytes: Of those used, kept out of use because a call that hangs may still write into them.
    """

    capacity_bytes: int
    used_bytes: int
    peak_bytes: int
    num_blocks: int
    held_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    quarantined_bytes: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Hits over all; None before the first access."""
        total = self.hits + self.misses
        return self.hits / total if total else None


@dataclass(slots=True)
class LinkStats:
    """One link, since the store was opened. Failed transfers count only as `failures`."""

    bytes: int = 0
    transfers: int = 0
    failures: int = 0
    bytes_by_kind: dict[str, int] = field(default_factory=dict)
    busy_ns: int = 0

    def add(self, nbytes: int, kind: str, duration_ns: int) -> None:
        self.bytes += nbytes
        self.transfers += 1
        self.bytes_by_kind[kind] = self.bytes_by_kind.get(kind, 0) + nbytes
        self.busy_ns += duration_ns

    def copy(self) -> LinkStats:
        return LinkStats(self.bytes, self.transfers, self.failures, dict(self.bytes_by_kind), self.busy_ns)


@dataclass(slots=True)
class ModelStats:
    """Reads of model files, which count under the link `nvme_read` too, with the bytes of the blocks they are for.

    Attributes:
        requests: Reads that were asked for.
        read_bytes: What they brought: more than the blocks have, where whole pages were read for the sake of direct I/O.
        shifted_bytes: Moved in memory from where they were read to where they belong; 0 where they were read straight there.
        shift_ns: What that took, on all threads together.
    """

    requests: int = 0
    read_bytes: int = 0
    shifted_bytes: int = 0
    shift_ns: int = 0

    def copy(self) -> ModelStats:
        return ModelStats(self.requests, self.read_bytes, self.shifted_bytes, self.shift_ns)


@dataclass(slots=True)
class WaitStats:
    """Waits of one cause."""

    count: int = 0
    ns: int = 0

    def add(self, duration_ns: int) -> None:
        self.count += 1
        self.ns += duration_ns


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of all counters.

    Attributes:
        tiers: By "gpu", "ram" and, with a directory, "nvme".
        links: By "h2d", "d2h", "nvme_read", "nvme_write".
        waits: By cause, as in `WaitEvent.cause`.
        accesses: Blocks leased.
        compactions: Times extents were moved together to make a hole.
        direct_io: Whether the drive is read and written past the page cache; None without a directory.
        page_locked_bytes: Of the RAM tier.
        commits: Generations made.
        models: Reads of model files, for adopted blocks.
    """

    tiers: Mapping[str, TierStats]
    links: Mapping[str, LinkStats]
    waits: Mapping[str, WaitStats]
    accesses: int
    compactions: int
    direct_io: bool | None
    page_locked_bytes: int
    commits: int
    models: ModelStats = field(default_factory=ModelStats)
