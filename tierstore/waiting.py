"""Who waits: the requests not served yet, in order of arrival, and found by block and by owner. Pure bookkeeping.

[Note: Many who wait]
Every event of the engine has the scheduler look at those who wait, so with a thousand of them whatever is done per pair of
requests is done a million times per event. What a request needs to know of the others is therefore kept here as it changes,
and one look at all costs about a microsecond each.
"""

from __future__ import annotations

from collections.abc import Collection

from tierstore.catalog import BlockId
from tierstore.requests import Owner, Record, Request, Save


class Waiting(dict[int, Request]):
    """Requests by the number of their arrival. Changed only through `add`, `remove` and `begin`.

    Attributes:
        unbegun_commits: Commits among them whose instant has not come: until it has, nobody begins to write.
        saving_commits: Those whose instant has come, and whose blocks are not all saved.
        unproven: Requests of which it is not known that the release of every lease would let them be served.
    """

    def __init__(self) -> None:
        super().__init__()
        self._by_block: dict[BlockId, dict[int, Request]] = {}
        self._by_owner: dict[Owner, int] = {}
        self.unbegun_commits = 0
        self.saving_commits = 0
        self.unproven: dict[int, Request] = {}

    def add(self, request: Request) -> None:
        """Take in a request; its `sequence` is later than that of all others."""
        number = request.sequence
        self[number] = self.unproven[number] = request
        self._by_owner[request.owner] = self._by_owner.get(request.owner, 0) + 1
        for record in request.records:
            self._by_block.setdefault(record.id, {})[number] = request
        self.unbegun_commits += _is_unbegun_commit(request)

    def remove(self, request: Request) -> bool:
        """Whether it was there."""
        number = request.sequence
        if self.pop(number, None) is None:
            return False
        self.unproven.pop(number, None)
        self._by_owner[request.owner] -= 1
        if not self._by_owner[request.owner]:
            del self._by_owner[request.owner]
        for record in request.records:
            alike = self._by_block[record.id]
            del alike[number]
            if not alike:
                del self._by_block[record.id]
        self.unbegun_commits -= _is_unbegun_commit(request)
        self.saving_commits -= _is_saving_commit(request)
        return True

    def begin(self, save: Save) -> None:
        """The instant that the commit or flush saves has come."""
        self.unbegun_commits -= _is_unbegun_commit(save)
        save.started = True
        self.saving_commits += _is_saving_commit(save)

    def doubt(self) -> None:
        """What is held changed: whatever was found out about those who wait may not hold any more."""
        self.unproven = dict(self)

    def wanting(self, record: Record) -> Collection[Request]:
        """Those that name the block, in order of arrival."""
        alike = self._by_block.get(record.id)
        return alike.values() if alike is not None else ()

    def asks(self, owner: Owner) -> bool:
        """Whether the owner waits for anything."""
        return owner in self._by_owner

    def in_order(self, owned: Collection[Owner], favourite: int) -> list[Request]:
        """Most urgent first: the favourite, then holders of leases, then the others, each in order of arrival.

        Args:
            owned: The owners who hold leases.
            favourite: The number of the request whose turn was brought forward; any other for none.
        """
        requests = list(self.values())
        if any(owner in self._by_owner for owner in owned):
            holders = [request for request in requests if request.owner in owned]
            requests = holders + [request for request in requests if request.owner not in owned]
        first = self.get(favourite)
        if first is not None:
            requests.remove(first)
            requests.insert(0, first)
        return requests


def _is_unbegun_commit(request: Request) -> bool:
    return isinstance(request, Save) and request.commit and not request.started


def _is_saving_commit(request: Request) -> bool:
    return isinstance(request, Save) and request.commit and request.started


class Claims:
    """What the requests looked at so far want of each block. An earlier claim is not overtaken."""

    def __init__(self) -> None:
        self._readers: dict[int, object] = {}  # block -> the one owner who claims it, or _SEVERAL
        self._writers: dict[int, object] = {}

    def contended(self, owner: Owner, reads: Collection[int], writes: Collection[int]) -> list[int]:
        """The blocks that somebody else claimed before, in a way that excludes this."""
        found = [number for number in reads if self._writers.get(number, owner) != owner]
        found += [number for number in writes if self._writers.get(number, owner) != owner or self._readers.get(number, owner) != owner]
        return found

    def add(self, owner: Owner, reads: Collection[int], writes: Collection[int]) -> None:
        for number in reads:
            if self._readers.setdefault(number, owner) != owner:
                self._readers[number] = _SEVERAL
        for number in writes:
            if self._writers.setdefault(number, owner) != owner:
                self._writers[number] = _SEVERAL


_SEVERAL = object()
"""In place of an owner: equal to none."""
