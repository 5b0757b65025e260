"""What the store must answer: a register per tensor, leases per block, and the states that a commit may hold.

[Note: Which values may be seen]
Calls overlap, so a read may see any value that was current at some moment between its beginning and its end. A write takes effect at some
moment between its own beginning and end; one that failed or was cancelled takes effect then or never. A value may not be seen
any more once a later one certainly took its place, or once a read that began after it was complete has seen another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tests.simulation.links import POISON
from tests.simulation.world import BrokenPromiseError

ABSENT = 0
"""The stamp of what is not there."""

SHIFT = 20
_POISONED = int.from_bytes(bytes([POISON]) * 8, "little", signed=True)


@dataclass(eq=False)
class Value:
    """One value that somebody gave a tensor.

    Attributes:
        stamp: Its number, unique in the run.
        start, end: Ticks between which it took effect, if it did.
        certain: It did.
        gone: The tick at which it was seen to be no longer there.
    """

    stamp: int
    start: float
    end: float = math.inf
    certain: bool = False
    gone: float = math.inf


class Register:
    """The values of one tensor."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = {ABSENT: Value(ABSENT, -1, -1, certain=True)}

    def last_moment(self, value: Value) -> float:
        """The tick after which it cannot have been the current one."""
        later = (other.end for other in self.values.values() if other.certain and other.start > value.end)
        return min(value.gone, min(later, default=math.inf))


class Model:
    """Every tensor's register, and who leases what.

    Attributes:
        leases: (owner, whether for writing, extent), by block.
        last_crowded: The tick at which more than one user was last seen to lease something.
    """

    def __init__(self) -> None:
        self._ticks = itertools.count(1)
        self._stamps = itertools.count(1)
        self._registers: dict[tuple[str, str], Register] = {}
        self._named: dict[int, str] = {}
        self.leases: dict[str, list[tuple[object, bool, int]]] = {}
        self.last_crowded = 0

    def tick(self) -> int:
        return next(self._ticks)

    def register(self, block: str, tensor: str) -> Register:
        key = (block, tensor)
        if key not in self._registers:
            self._registers[key] = Register(f"{block}/{tensor}")
        return self._registers[key]

    # -- values ----------------------------------------------------------------------------------------------------------------

    def begin(self, block: str, tensors: Iterable[str]) -> dict[str, Value]:
        """Somebody begins to write these tensors."""
        started = {}
        for tensor in tensors:
            stamp = next(self._stamps)
            register = self.register(block, tensor)
            self._named[stamp] = register.name
            started[tensor] = register.values[stamp] = Value(stamp, self.tick())
        return started

    def begin_delete(self, block: str, tensors: Iterable[str]) -> dict[str, Value]:
        started = {}
        for tensor in tensors:
            register = self.register(block, tensor)
            value = Value(ABSENT, self.tick())
            register.values[-self.tick()] = started[tensor] = value
        return started

    def end(self, values: Mapping[str, Value], *, certain: bool) -> None:
        for value in values.values():
            value.end, value.certain = self.tick(), certain

    def never(self, values: Mapping[str, Value], block: str) -> None:
        """What might have happened did not."""
        for tensor, value in values.items():
            register = self.register(block, tensor)
            register.values = {stamp: other for stamp, other in register.values.items() if other is not value}

    def observe(self, block: str, tensor: str, stamp: int, since: int, until: int | None = None) -> None:
        """A call that began at tick `since` saw this value, not after tick `until`; None: just now.

        Raises:
            BrokenPromiseError: It cannot have been the current one then.
        """
        register = self.register(block, tensor)
        seen = [value for value in register.values.values() if value.stamp == stamp]
        if not seen:
            raise BrokenPromiseError(f"{register.name} holds value {stamp}, which belongs to {self._named.get(stamp, 'nobody')}")
        possible = [value for value in seen if register.last_moment(value) >= since and (until is None or value.start <= until)]
        if not possible:
            newest = max((value for value in register.values.values() if value.certain), key=lambda value: value.start)
            raise BrokenPromiseError(f"{register.name} holds the stale value {stamp or 'absent'}; {newest.stamp or 'absent'} is newer")
        now = self.tick() if until is None else until
        for value in register.values.values():
            if value.stamp != stamp and value.end < since:
                value.gone = min(value.gone, now)

    def check_snapshot(self, state: Mapping[tuple[str, str], int], start: int, end: int, what: str) -> None:
        """Some moment from `start` to `end` must have had just these values."""
        low, high, since = float(start), float(end), "its call"
        for (block, tensor), register in self._registers.items():
            stamp = state.get((block, tensor), ABSENT)
            options = [value for value in register.values.values() if value.stamp == stamp]
            if not options:
                raise BrokenPromiseError(f"{what} has value {stamp} of {register.name}, which is {self._named.get(stamp, 'nobody')}'s")
            spans = [(value.start, register.last_moment(value)) for value in options]
            fitting = [span for span in spans if span[0] <= high and span[1] >= low]
            if not fitting:
                raise BrokenPromiseError(f"{what} has value {stamp} of {register.name}, true in {spans}, and {since} at {low} to {high}")
            if len(fitting) == 1 and fitting[0][0] > low:
                low, since = fitting[0][0], register.name
            if len(fitting) == 1:
                high = min(high, fitting[0][1])

    # -- leases ----------------------------------------------------------------------------------------------------------------

    def lease(self, owner: object, names: Mapping[str, bool], places: Mapping[str, int]) -> None:
        """Somebody was granted a lease: names and whether each is for writing, and where they lie."""
        for name, write in names.items():
            others = [held for held in self.leases.get(name, []) if held[0] != owner]
            if any(write or theirs for _, theirs, _ in others):
                raise BrokenPromiseError(f"{owner} leases {name} (write={write}) beside {others}")
            self.leases.setdefault(name, []).append((owner, write, places[name]))
        self._note_holders()

    def _note_holders(self) -> None:
        if len({owner for leases in self.leases.values() for owner, _, _ in leases}) > 1:
            self.last_crowded = self.tick()

    def release(self, owner: object, names: Mapping[str, bool], places: Mapping[str, int]) -> None:
        self._note_holders()
        for name, write in names.items():
            self.leases[name].remove((owner, write, places[name]))


_INDEX = torch.arange(1 << 14, dtype=torch.int64)


def pattern(stamp: int, numel: int) -> torch.Tensor:
    """The contents of a tensor of int64 that has this value."""
    return _INDEX[:numel] + (stamp << SHIFT)


def stamp_of(tensor: torch.Tensor, what: str) -> int:
    """The value that a tensor holds, all of it.

    Raises:
        BrokenPromiseError: It holds poison, or pieces of several.
    """
    numbers = tensor.reshape(-1)
    stamp = int(numbers[0]) >> SHIFT
    if torch.equal(numbers, pattern(stamp, len(numbers))):
        return stamp
    found = ["poison" if int(number) == _POISONED else str(int(number) >> SHIFT) for number in numbers]
    runs = [f"{key} x {len(list(group))}" for key, group in itertools.groupby(found)]
    raise BrokenPromiseError(f"{what} holds pieces of several values: {', '.join(runs[:8])}")
