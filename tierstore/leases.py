"""Who holds what: the leases of all owners. Pure bookkeeping; the scheduler decides who gets one."""

from __future__ import annotations

from collections.abc import Collection

from tierstore.catalog import BlockId
from tierstore.errors import FrozenError, LeaseError
from tierstore.placement import Placement
from tierstore.requests import Lease, Owner, Record
from tierstore.residency import Event, Tier


class Leases:
    """Leases by owner. See [Note: Leases of one owner] in `scheduler`."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self._owned: dict[Owner, dict[Record, int]] = {}
        self._writes_of: dict[Owner, int] = {}

    def check_use(self, owner: Owner, records: tuple[Record, ...], writes: frozenset[int], fresh: frozenset[int] = frozenset()) -> None:
        for record in records:
            if record.blank and record.id not in fresh:
                raise no_content(record)
            if record.id not in writes:
                continue
            if record.block.frozen:
                remedy = "use it without write=, or put it without frozen="
                raise FrozenError(f"block {record.block.name!r} is frozen", remedy=remedy, block=record.block.name)
            if owner in record.readers and record.writer != owner:
                raise LeaseError(
                    f"block {record.block.name!r} is to be written inside a read lease of the same thread or task",
                    remedy="take the outer lease with write=True",
                    block=record.block.name,
                )

    def holds_write(self, owner: Owner) -> bool:
        return owner in self._writes_of

    def _owns(self, owner: Owner, numbers: Collection[int]) -> bool:
        owned = self._owned.get(owner)
        return owned is not None and all(self.placement.records[BlockId(number)] in owned for number in numbers)

    def _begin_lease(self, owner: Owner, records: tuple[Record, ...], writes: frozenset[int]) -> Lease:
        owned = self._owned.setdefault(owner, {})
        for record in records:
            if record.id in writes:
                record.writer = owner
                record.writer_depth += 1
                self._writes_of[owner] = self._writes_of.get(owner, 0) + 1
            else:
                record.readers[owner] = record.readers.get(owner, 0) + 1
            self.placement.leased[record.id] = record
            owned[record] = owned.get(record, 0) + 1
        return Lease(owner, records, writes)

    def _end_lease(self, lease: Lease) -> list[Record]:
        """End a lease. Returns the records that nobody leases any more."""
        owned = self._owned[lease.owner]
        free: list[Record] = []
        for record in lease.records:
            if record.id in lease.writes:
                record.writer_depth -= 1
                self._writes_of[lease.owner] -= 1
                if record.writer_depth == 0:
                    record.writer = None
                self._written(record)
            else:
                record.readers[lease.owner] -= 1
                if record.readers[lease.owner] == 0:
                    del record.readers[lease.owner]
            if not record.leased:
                del self.placement.leased[record.id]
                free.append(record)
                if record.id in lease.spent:
                    self.placement.note_spent(record.used_at)
                    self.placement.make_blank(record)
                else:
                    self.placement.over(record, Tier.GPU)
            owned[record] -= 1
            if owned[record] == 0:
                del owned[record]
        if not owned:
            del self._owned[lease.owner]
        if not self._writes_of.get(lease.owner, 1):
            del self._writes_of[lease.owner]
        return free

    def _written(self, record: Record) -> None:
        record.version += 1
        record.gpu.apply(Event.WRITE)
        self.placement.supersede_ram(record)


def no_content(record: Record) -> LeaseError:
    name = record.block.name
    remedy = "it is a buffer of the training: it has content from when it is written until it is used up"
    return LeaseError(f"block {name!r} has no content", remedy=remedy, block=name)
