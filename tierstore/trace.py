"""Typed events and the recorder that keeps them, bounded. The core emits; monitors and policies only read."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from tierstore.monitor.perfetto import write_perfetto
from tierstore.residency import Tier


class Link(StrEnum):
    """A path bytes take."""

    H2D = "h2d"
    D2H = "d2h"
    NVME_READ = "nvme_read"
    NVME_WRITE = "nvme_write"


_PLAIN = {tier: tier.value for tier in Tier}


class Kind(StrEnum):
    """Why a transfer happens: somebody waits, space is needed or a commit, or ahead of need."""

    DEMAND = "demand"
    WRITE_BACK = "write-back"
    PREFETCH = "prefetch"


@dataclass(frozen=True, slots=True)
class Access:
    """One block of one lease.

    Attributes:
        index: Position in the trace, from 0.
        block: The block's name.
        write: Whether the lease may write it.
        found: The fastest tier that had it ready.
    """

    index: int
    block: str
    write: bool
    found: Tier


@dataclass(frozen=True, slots=True)
class TransferEvent:
    """One finished transfer. Times are nanoseconds of the store's clock."""

    link: Link
    block: str
    kind: Kind
    nbytes: int
    queued_ns: int
    start_ns: int
    end_ns: int
    failed: bool = False


@dataclass(frozen=True, slots=True)
class WaitEvent:
    """A caller that waited.

    Attributes:
        blocks: What it wanted.
        cause: "nvme" (bytes from the drive), "space" (room on the device), "lease" (somebody else's), "copy" (a copy on
            its way, CPU device only), "run-ahead" (the cap on leases in flight), "commit".
        thread: Name of the waiting thread or task.
    """

    blocks: tuple[str, ...]
    cause: str
    start_ns: int
    end_ns: int
    thread: str


class Trace:
    """The most recent accesses, in order. Reading it from any thread gives a snapshot.

    [Note: Plain rows]
    Accesses are kept as tuples of plain values: quick to make, and nothing that the garbage collector has to walk through. As
    objects, 200,000 of them made each of its full passes, which hold up every thread, 100 ms longer.
    """

    def __init__(self, accesses: Iterable[Access] = (), *, keep: int = 200_000) -> None:
        rows = ((access.index, access.block, access.write, access.found.value) for access in accesses)
        self._rows: deque[tuple[int, str, bool, str]] = deque(rows, maxlen=keep)
        self.num_accesses = self._rows[-1][0] + 1 if self._rows else 0

    def append(self, block: str, write: bool, found: Tier) -> None:
        self._rows.append((self.num_accesses, block, write, _PLAIN[found]))
        self.num_accesses += 1

    def __repr__(self) -> str:
        return f"<Trace: {len(self)} of {self.num_accesses} accesses>"

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Access]:
        return (Access(index, block, write, Tier(found)) for index, block, write, found in _snapshot(self._rows))

    def save(self, path: str | Path) -> None:
        """Write one JSON object per line, to be read back by `load`."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(access)) + "\n" for access in self)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        return cls(Access(row["index"], row["block"], row["write"], Tier(row["found"])) for row in rows)


@dataclass
class Timeline:
    """The most recent transfers and waits."""

    keep: int = 100_000
    transfers: deque[TransferEvent] = field(default_factory=deque)
    waits: deque[WaitEvent] = field(default_factory=deque)

    def __repr__(self) -> str:
        return f"<Timeline: {len(self.transfers)} transfers, {len(self.waits)} waits>"

    def __post_init__(self) -> None:
        self.transfers = deque(self.transfers, maxlen=self.keep)
        self.waits = deque(self.waits, maxlen=self.keep)

    def save(self, path: str | Path) -> None:
        """Write the timeline as a trace that https://ui.perfetto.dev opens."""
        transfers, waits = _snapshot(self.transfers), _snapshot(self.waits)
        write_perfetto(path, transfers, waits)

    def events(self) -> list[TransferEvent | WaitEvent]:
        """A snapshot, transfers first, each by time of completion."""
        return [*_snapshot(self.transfers), *_snapshot(self.waits)]


_T = TypeVar("_T")


def _snapshot(source: deque[_T]) -> list[_T]:
    while True:
        try:
            return list(source)
        except RuntimeError:  # another thread appended while we copied
            continue
