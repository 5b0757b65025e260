"""One life of a directory: it is opened, blocks come, change and go, some of it is committed, and it is closed, or not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from tests.crash import model
from tests.crash.disk import CrashDisk
from tests.crash.door import Door, Fault
from tests.crash.ledger import Ledger, Value, block_of
from tests.simulation.world import BrokenPromiseError
from tierstore.catalog import PAGE, Block
from tierstore.errors import ShardError, TierFullError, TierstoreError, TransferError
from tierstore.nvme.checksums import checksum
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import aligned_buffer
from tierstore.nvme.names import CURRENT
from tierstore.nvme.shards import Entry, Shard

PATH = "/swap"
ELSEWHERE = "/elsewhere"


@dataclass(frozen=True)
class Plan:
    """What a life is like, drawn from its seed.

    Attributes:
        keep: Generations that stay.
        checksum: As in `TierStore`.
        limit: Bytes of the directory at most; None: any number.
        actions: How many.
        closes: At the end.
    """

    keep: int
    checksum: bool
    limit: int | None
    actions: int
    closes: bool

    @classmethod
    def drawn(cls, rng: random.Random, actions: int, limit: int | None) -> Plan:
        return cls(rng.choice((1, 1, 2, 3)), rng.random() < 0.8, limit, actions, rng.random() < 0.3)


async def open_door(door: Door, plan: Plan, *, generation: int | None = None) -> Directory:
    """Open the directory behind a door on this loop, where `Directory.open` would take a thread and a loop of its own."""
    return await Directory._open(PATH, plan.limit, plan.checksum, plan.keep, generation, False, door)


class Life:
    """Carries out a plan, and keeps the ledger.

    Args:
        disk: Where.
        plan, seed: What it does, and in which order it happens.
        ledger: What is there.
        faults: Changes that fail, by number.
        watch: Called before each change with the life.

    Attributes:
        door: The file system as it sees it.
        values: What each block holds, as its user wrote it last.
        shards: Where that is on the drive; a block that is missing here is still to be written.
        ended: Nothing is going on any more.
        failed: Errors that calls have ended with.
    """

    def __init__(
        self,
        disk: CrashDisk,
        plan: Plan,
        seed: str,
        ledger: Ledger,
        *,
        faults: Mapping[int, Fault] | None = None,
        watch: Callable[[Life], None] = lambda _: None,
    ) -> None:
        self.disk = disk
        self.plan = plan
        self.ledger = ledger
        self.rng = random.Random(f"life {seed}")
        self.door = Door(disk, random.Random(f"turns {seed}"), faults=faults, on_change=lambda: watch(self))
        self.values: dict[str, Value] = {}
        self.shards: dict[str, Shard] = {}
        self.linked: dict[str, bytes] = {}
        self.failed: list[TierstoreError] = []
        self.directory: Directory
        self._watch = watch
        self._numbers = random.Random(f"values {seed}")

    async def run(self) -> None:
        """The whole of it."""
        await self.open()
        for _ in range(self.plan.actions):
            await self.act()
        self.check_links()
        self._watch(self)
        if self.plan.closes:
            await self.directory.close()
            self._watch(self)

    async def open(self) -> None:
        """Find what is there, and go on from it."""
        self.directory = await open_door(self.door, self.plan)
        committed = self.directory.committed
        self.ledger = self.ledger.found(0 if committed is None else committed.metadata["commit"], self.plan.keep)
        self.values = dict(self.ledger.asked[self.ledger.acknowledged])
        self.shards = {name: entry.shard for name, entry in self.directory.entries.items()}

    async def act(self) -> None:
        """Anything that its user may do."""
        actions: list[Callable[[], Awaitable[None]]] = [self.write, self.write_many, self.delete, self.commit, self.commit_beside_writes]
        actions += [self.link, self.give_up, self.adopt, self.learn]
        await self.rng.choices(actions, (5, 3, 1, 3, 4, 1, 1, 3, 1))[0]()

    # -- actions -----------------------------------------------------------------------------------------------------------------

    async def write(self, name: str | None = None) -> None:
        """A new value for a block, which may be a new one, or one of another size under the same name."""
        name = name or self.rng.choice(self.known)
        pages = self.values[name].pages if name in self.values and self.rng.random() < 0.9 else self.rng.randint(1, 3)
        if name in self.values and self.values[name].pages != pages:
            self.drop(name)
        self.values[name] = Value(self._numbers.getrandbits(60), pages)
        await self.store(name)

    async def store(self, name: str) -> None:
        """Write what a block holds to the drive. If that fails, only its user has it."""
        old, value = self.shards.get(name), self.values[name]
        source = aligned_buffer(value.pages * PAGE)
        source[:] = value.payload(name)
        try:
            shard = await self.directory.write(self.block(name), source, old)
        except (TierFullError, TransferError) as error:
            self.failed.append(error)
            self.drop(name)  # whether broken or only old
            return
        if old is not None and old is not shard:
            self.directory.discard(old)
        self.shards[name] = shard

    async def write_many(self) -> None:
        await asyncio.gather(*(self.write(name) for name in self.rng.sample(self.known, self.rng.randint(2, 4))))

    async def delete(self) -> None:
        if self.values:
            name = self.rng.choice(sorted(self.values))
            self.drop(name)
            del self.values[name]

    async def commit(self, beside: Callable[[], Awaitable[None]] | None = None) -> bool:
        """Commit everything; meanwhile, perhaps, something else. Whether it succeeded."""
        for name in self.values:
            if name not in self.shards:
                await self.store(name)
        if self.values.keys() != self.shards.keys():
            return False
        self.ledger = self.ledger.ask(self.values)
        number = self.ledger.newest
        entries = [Entry(self.block(name), shard) for name, shard in self.shards.items()]
        before = len(self.door.struck)
        committing = asyncio.ensure_future(self.directory.commit(entries, {"commit": number}))
        await asyncio.sleep(0)
        if beside is not None:
            await beside()
        try:
            await committing
        except (TierFullError, TransferError) as error:
            self.failed.append(error)
            return False
        except ShardError as error:  # a sync failed, and the bytes are gone from the cache as well: their user has them
            self.failed.append(error)
            for name in [name for name, shard in self.shards.items() if shard.suspect]:
                self.drop(name)
            return False
        hinted = not any(CURRENT in change.path for change in self.door.struck[before:])
        self.ledger = self.ledger.acknowledge(number, certain=hinted or not self.disk.journaled)
        return True

    async def commit_beside_writes(self) -> None:
        names = self.rng.sample(self.known, self.rng.randint(1, 3))

        async def writes() -> None:
            await asyncio.gather(*map(self.write, names))

        await self.commit(writes)

    async def link(self) -> None:
        """Somebody gives a shard another name elsewhere, as an export does, and relies on its bytes."""
        own = [name for name in sorted(self.shards) if self.shards[name].adopted is None]
        if own:
            shard = self.shards[self.rng.choice(own)]
            path = f"{ELSEWHERE}/{shard.file}"
            if path not in self.disk.files:
                self.disk.link(self.directory.path_of(shard), path)
                self.linked[path] = bytes(self.disk.get(path))

    async def give_up(self) -> None:
        """Begin a block piece by piece, and think better of it."""
        try:
            writer = await self.directory.create(block_of("given up", 2))
        except (TierFullError, TransferError) as error:
            self.failed.append(error)
            return
        await writer.abort()

    async def adopt(self) -> None:
        """Blocks that are not there come from the model file; the next write to one makes it the store's own."""
        for name in self.rng.sample(sorted(model.VALUES), self.rng.randint(1, 3)):
            if name not in self.values:
                self.shards[name] = await model.adopt(self.door, name)
                self.values[name] = model.VALUES[name]

    async def learn(self) -> None:
        """A first read of an adopted block gives its checksums, which the next commit records."""
        for shard in self.shards.values():
            if shard.adopted is not None and self.plan.checksum:
                shard.chunks = (checksum(await model.read(self.door, shard)),)

    # -- small things ------------------------------------------------------------------------------------------------------------

    @property
    def known(self) -> list[str]:
        """Blocks that are written to: those of the store's own, and what came from the model."""
        return [*"abcde", *sorted(self.values.keys() & model.VALUES.keys())]

    def block(self, name: str) -> Block:
        return block_of(name, self.values[name].pages)

    def drop(self, name: str) -> None:
        shard = self.shards.pop(name, None)
        if shard is not None:
            self.directory.discard(shard)

    def check_links(self) -> None:
        """What has a name elsewhere was never written to, nor was the model."""
        model.check_untouched(self.disk)
        for path, content in self.linked.items():
            if self.disk.get(path) != content:
                raise BrokenPromiseError(f"{path} has a name elsewhere, and was changed")
