"""A drive that forgets what was not synced.

[Note: What a power cut leaves]
Data. A file's bytes are durable once a sync of that file, issued after they were written, has succeeded. Of each write since then all
survives, nothing, or any part: its beginning or end up to any byte, its middle, or some of its sectors; one write without an earlier one,
too. Where two overlap, the later one lies above what survives of the earlier one. The length is one of those that the file has had since
its last sync, or one in between; bytes that were never written are zeros or rubbish.

Names. Making, renaming and removing a name is durable once a sync of the directory, issued after it, has succeeded. Of the others any
subset survives in which those that share a name keep their order: nothing is assumed of the order of names that have nothing to do with
one another, so a removal may outlive the renaming before it. A renaming happens or does not. What is synced belongs to the file, under
whatever name it is found; a name whose removal is lost names the file that it named.

Where directories cannot be synced (`journaled`, what Windows gets), a file system with one journal for all names is assumed, as NTFS and
ext4 have: when a sync of any file succeeds, every change of names issued before it is durable, and nothing else makes one so.

A failed sync drops the data that it should have written, and the next one claims success. Either the cache still shows what was dropped
(as ext4 does until the page is evicted) or it does not. A failed sync of a directory drops nothing: a file system that cannot write its
journal takes no more changes at all, which is a power cut.

[Note: What a killed process leaves]
Everything that it had ordered, as the cache has it; of what was under way at that moment, all, nothing or a part. None of it is more
durable than before.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from tests.simulation.files import Change, Disk

SECTOR = 512
RUBBISH = 0x5C


class Survival:
    """Decides what outlives a crash.

    Args:
        rng: Draws; not needed where all or nothing survives.
        names, data: How often a change of a name, or a write, survives.
    """

    def __init__(self, rng: random.Random, names: float, data: float) -> None:
        self._rng = rng
        self._names = names
        self._data = data

    @classmethod
    def drawn(cls, rng: random.Random) -> Survival:
        """Names and data each anywhere between all and nothing: what is lost together shows which order was relied on."""
        return cls(rng, rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)), rng.choice((0.0, 0.1, 0.5, 0.9, 1.0)))

    def keeps_name(self) -> bool:
        return self._rng.random() < self._names

    def length(self, lengths: list[int]) -> int:
        """Of a file that has had these lengths, the durable one first."""
        if self._data == 0.0 or len(lengths) == 1:
            return lengths[0]
        if self._rng.random() < self._data:
            return lengths[-1]
        return self._rng.choice((*lengths, self._rng.randint(min(lengths), max(lengths))))

    def filling(self) -> int:
        """Of bytes nobody wrote."""
        return RUBBISH if 0.0 < self._data < 1.0 and self._rng.random() < 0.3 else 0

    def pieces(self, nbytes: int) -> list[tuple[int, int]]:
        """The parts of a write of so many bytes that survive, as (start, stop)."""
        if self._rng.random() < self._data:
            return [(0, nbytes)]
        if self._data == 0.0 or self._rng.random() < 0.4:
            return []
        first, second = sorted((self._rng.randint(0, nbytes), self._rng.randint(0, nbytes)))
        torn = self._rng.randrange(4)
        if torn == 3:
            return [(at, min(at + SECTOR, nbytes)) for at in range(0, nbytes, SECTOR) if self._rng.random() < 0.5]
        return [((0, first), (second, nbytes), (first, second))[torn]]


NOTHING = Survival(random.Random(0), 0.0, 0.0)
"""All that was not synced is lost."""

EVERYTHING = Survival(random.Random(0), 1.0, 1.0)
"""Nothing is lost, and what was under way is done."""


class Inode(bytearray):
    """A file, whatever its names: its bytes as the cache shows them.

    Attributes:
        durable: Its bytes as of the last sync.
        writes: Since then, as (offset, bytes).
        lengths: Since then, that of the last sync first.
    """

    def __init__(self, durable: bytes = b"") -> None:
        super().__init__(durable)
        self.durable = durable
        self.writes: list[tuple[int, bytes]] = []
        self.lengths = [len(durable)]

    def settle(self) -> None:
        """A sync: what changed since the last one is durable. Not what one that failed has dropped, though the cache may show it."""
        if not self.writes and len(self.lengths) == 1:
            return
        image = bytearray(self.kept())
        for offset, data in self.writes:
            image[offset : offset + len(data)] = data
        self.durable = bytes(image[: len(self)])
        self.writes = []
        self.lengths = [len(self)]

    def kept(self) -> bytes:
        """What the last sync left, of the present length: what was cut off since comes back as zeros."""
        return self.durable[: min(self.lengths)].ljust(len(self), b"\0")[: len(self)]

    def copy(self) -> Inode:
        twin = Inode(self.durable)
        twin[:] = self
        twin.writes, twin.lengths = list(self.writes), list(self.lengths)
        return twin

    def after(self, survival: Survival) -> bytes:
        """What the drive holds after a power cut."""
        if not self.writes and len(self.lengths) == 1:
            return self.durable
        image = bytearray(self.durable)
        room = max(self.lengths)
        image.extend(bytes([survival.filling()]) * (room - len(image)))
        for offset, data in self.writes:
            for start, stop in survival.pieces(len(data)):
                image[offset + start : offset + stop] = data[start:stop]
        return bytes(image[: survival.length(self.lengths)])


@dataclass(frozen=True, eq=False)
class Naming:
    """A change of a directory: this name goes, that one comes."""

    gone: str | None
    name: str | None
    inode: Inode | None

    @property
    def names(self) -> set[str]:
        return {name for name in (self.gone, self.name) if name is not None}


class CrashDisk(Disk):
    """See [Note: What a power cut leaves].

    Args:
        journaled: Directories cannot be synced; see there.
        capacity: Bytes that all files together may have; None: any number.
        rng: Draws what a failed operation leaves.

    Attributes:
        durable_names: The directory as of its last sync.
        namings: What has changed since.
        cache_keeps: What a failed sync dropped is still to be read; None: at times.
    """

    def __init__(self, *, journaled: bool = False, capacity: int | None = None, rng: random.Random | None = None) -> None:
        super().__init__(journaled=journaled)
        self.capacity = capacity
        self.durable_names: dict[str, Inode] = {}
        self.namings: list[Naming] = []
        self.cache_keeps: bool | None = None
        self.rng = rng or random.Random(0)

    # -- operations --------------------------------------------------------------------------------------------------------------

    def inode(self, path: str) -> Inode:
        found = self.get(path)
        assert isinstance(found, Inode)
        return found

    def create(self, path: str, nbytes: int) -> None:
        if path in self.files:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        inode = self._name(path, Inode())
        self._resize(inode, nbytes)

    def write(self, path: str, offset: int, data: bytes) -> None:
        inode = self.inode(path)
        if offset + len(data) > len(inode):
            self._resize(inode, offset + len(data))
        inode[offset : offset + len(data)] = data
        inode.writes.append((offset, data))

    def save(self, path: str, data: bytes) -> None:
        """As opening it for writing does: emptied first, if it is there; written then."""
        inode = self.inode(path) if path in self.files else self._name(path, Inode())
        self._resize(inode, 0)
        self.write(path, 0, data)

    def replace(self, source: str, target: str) -> None:
        inode = self.inode(source)
        del self.files[source]
        self.files[target] = inode
        self.namings.append(Naming(source, target, inode))
        self.on_replace(self, target)

    def unlink(self, path: str) -> None:
        self.get(path)
        del self.files[path]
        self.namings.append(Naming(path, None, None))

    def link(self, path: str, other: str) -> None:
        """Give a file another name."""
        self._name(other, self.inode(path))

    def touch(self, path: str) -> None:
        if path not in self.files:
            self._name(path, Inode())

    def links(self, path: str) -> int:
        inode = self.inode(path)
        return sum(other is inode for other in self.files.values())

    def used_bytes(self) -> int:
        """Of all files; one that a name anywhere leads to counts once."""
        return sum(map(len, {id(file): file for file in self.files.values()}.values()))

    def sync(self, path: str) -> None:
        self.inode(path).settle()
        if self.journaled:
            self._settle_names()

    def sync_directory(self, path: str) -> None:
        if not self.journaled:
            self._settle_names()

    # -- failures ----------------------------------------------------------------------------------------------------------------

    def fail(self, change: Change) -> None:
        """A change is about to fail: what it leaves all the same. A renaming or a removal that failed may have happened."""
        if change.doing == "sync":
            self.lose(change.path)
        elif change.doing != "sync_directory":
            self.tear(change, Survival.drawn(self.rng))

    def lose(self, path: str) -> None:
        """A sync of this file fails, and forgets what it should have written."""
        if path not in self.files:
            return
        inode = self.inode(path)
        kept = self.rng.random() < 0.5 if self.cache_keeps is None else self.cache_keeps
        if not kept:
            inode[:] = inode.kept()
        inode.writes = []

    def flip(self, path: str, bit: int) -> None:
        """A bit of a durable file is not what was written."""
        inode = self.inode(path)
        inode[bit // 8] ^= 1 << bit % 8
        inode.durable = bytes(inode)
        inode.writes, inode.lengths = [], [len(inode)]

    # -- crashes -----------------------------------------------------------------------------------------------------------------

    def cut(self, survival: Survival, under_way: Iterable[Change] = ()) -> CrashDisk:
        """The drive after a power cut now; this one goes on as if nothing had happened.

        Args:
            survival: Decides what is left of what is not durable.
            under_way: Changes that have begun.
        """
        fallen = self.kill(survival, under_way)
        return fallen._restart(fallen._surviving_names(survival), survival)

    def kill(self, survival: Survival, under_way: Iterable[Change] = ()) -> CrashDisk:
        """The drive after the process was killed now; see [Note: What a killed process leaves]."""
        twins = {number: inode.copy() for number, inode in self._inodes().items()}
        twin = self._empty()
        twin.files = {path: twins[id(inode)] for path, inode in self.files.items()}
        twin.durable_names = {path: twins[id(inode)] for path, inode in self.durable_names.items()}
        twin.namings = [Naming(old.gone, old.name, old.inode and twins[id(old.inode)]) for old in self.namings]
        for change in under_way:
            twin.tear(change, survival)
        return twin

    def tear(self, change: Change, survival: Survival) -> None:
        """A change was under way."""
        with suppress(FileNotFoundError, FileExistsError, OSError):
            if change.doing == "write":
                self._tear_write(*change.args, survival)
            elif change.doing == "save":
                if survival.keeps_name():
                    self.save(change.path, b"")
                    self._tear_write(change.path, 0, change.args[1], survival)
            elif change.doing == "create":
                if survival.keeps_name():
                    self.create(change.path, survival.length([0, change.args[1]]))
            elif survival.keeps_name():
                change.carry_out(self)

    def signature(self) -> int:
        """The same for drives that hold the same, and could lose the same."""
        names = frozenset((path, hash(bytes(content))) for path, content in self.files.items())
        durable = frozenset((path, hash(inode.durable), len(inode.writes)) for path, inode in self.durable_names.items())
        return hash((names, durable, len(self.namings)))

    # -- inside ------------------------------------------------------------------------------------------------------------------

    def _name(self, path: str, inode: Inode) -> Inode:
        self.files[path] = inode
        self.namings.append(Naming(None, path, inode))
        return inode

    def _resize(self, inode: Inode, nbytes: int) -> None:
        if self.capacity is not None and nbytes > len(inode) and self.used_bytes() + nbytes - len(inode) > self.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if nbytes < len(inode):
            del inode[nbytes:]
        else:
            inode.extend(bytes(nbytes - len(inode)))
        inode.lengths.append(nbytes)

    def _settle_names(self) -> None:
        if self.namings:
            self.durable_names = {path: self.inode(path) for path in self.files}
            self.namings = []

    def _tear_write(self, path: str, offset: int, data: bytes, survival: Survival) -> None:
        for start, stop in survival.pieces(len(data)):
            if stop > start:
                self.write(path, offset + start, data[start:stop])

    def _surviving_names(self, survival: Survival) -> dict[str, Inode]:
        names = dict(self.durable_names)
        lost: set[str] = set()
        for naming in self.namings:
            if not lost.isdisjoint(naming.names) or not survival.keeps_name():
                lost |= naming.names
                continue
            if naming.gone is not None:
                names.pop(naming.gone, None)
            if naming.name is not None:
                assert naming.inode is not None
                names[naming.name] = naming.inode
        return names

    def _restart(self, names: dict[str, Inode], survival: Survival) -> CrashDisk:
        after = self._empty()
        images = {id(inode): Inode(inode.after(survival)) for inode in names.values()}
        after.files = {path: images[id(inode)] for path, inode in names.items()}
        after.durable_names = {path: images[id(inode)] for path, inode in names.items()}
        return after

    def _inodes(self) -> dict[int, Inode]:
        """All that a name leads to, or may lead to after a power cut."""
        present = [self.inode(path) for path in self.files]
        named = [naming.inode for naming in self.namings if naming.inode is not None]
        return {id(inode): inode for inode in (*present, *self.durable_names.values(), *named)}

    def _empty(self) -> CrashDisk:
        """Another one of the same kind, with nobody's lock on it."""
        twin = CrashDisk(journaled=self.journaled, capacity=self.capacity, rng=random.Random(self.rng.random()))
        twin.directories = set(self.directories)
        twin.num_identities = self.num_identities
        twin.cache_keeps = self.cache_keeps
        twin.on_replace = self.on_replace
        return twin
