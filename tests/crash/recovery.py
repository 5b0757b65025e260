"""What must hold when a directory is opened on what a crash left."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.crash import model
from tests.crash.disk import NOTHING, CrashDisk
from tests.crash.door import Door
from tests.crash.ledger import Ledger, State
from tests.crash.life import PATH, Life, Plan, open_door
from tests.simulation.files import name_of
from tests.simulation.world import BrokenPromiseError
from tierstore.errors import DirectoryError, ModelFileError, ShardError, TierstoreError
from tierstore.nvme import names
from tierstore.nvme.directory import Directory
from tierstore.nvme.files import aligned_buffer
from tierstore.nvme.shards import Shard
from tierstore.nvme.space import FIXED_BYTES, footprint


async def read(directory: Directory, shard: Shard) -> bytes:
    if shard.adopted is not None:
        return await model.read(directory.files, shard)
    into = aligned_buffer(shard.payload_bytes)
    await directory.read(shard, into)
    return bytes(into)


async def check_contents(directory: Directory, state: State, what: str) -> None:
    """Every byte of every block is what was committed."""
    if directory.entries.keys() != state.keys():
        raise BrokenPromiseError(f"{what} has blocks {sorted(directory.entries)}, and was committed with {sorted(state)}")
    for name, entry in directory.entries.items():
        try:
            content = await read(directory, entry.shard)
        except TierstoreError as error:
            raise BrokenPromiseError(f"block {name} of {what} cannot be read: {error}") from error
        if content != state[name].payload(name):
            raise BrokenPromiseError(f"block {name} of {what} is not what was committed")
        if (entry.shard.adopted is not None) != state[name].adopted:
            raise BrokenPromiseError(f"block {name} of {what} lies {'in' if entry.shard.adopted else 'out of'} the model, and did not")


class Checker:
    """Opens what a crash left, again and again.

    Attributes:
        num_openings: How often.
        num_generations: Generations that were read in full.
    """

    def __init__(self) -> None:
        self.num_openings = 0
        self.num_generations = 0

    async def check(self, disk: CrashDisk, ledger: Ledger, plan: Plan, *, killed: bool, goes_on: bool = True) -> None:
        """Everything that must hold.

        Args:
            disk: What is left.
            ledger: What may be there.
            plan: How the directory was used.
            killed: The process was, and the machine runs on: what is found may not be durable yet.
            goes_on: Whether the next life is tried, too.
        """
        model.check_untouched(disk)
        number = await self._check_newest(disk.kill(NOTHING), ledger, plan)
        if killed:
            await self._check_durable(disk.kill(NOTHING), ledger, plan, number)
        if goes_on and any(value.adopted for value in ledger.asked[number].values()):
            await self._check_without_model(disk.kill(NOTHING), ledger.asked[number], plan)
        if goes_on:
            await self._check_next_life(disk, ledger.found(number, plan.keep), replace(plan, limit=None), number)

    async def check_damaged(self, disk: CrashDisk, ledger: Ledger, plan: Plan, path: str) -> None:
        """A bit of a file was flipped. Whatever is served is what was committed; the rest is refused.

        Args:
            disk, ledger, plan: As for `check`.
            path: The file: a manifest, `CURRENT`, the model, or a shard of a directory with checksums.
        """
        self.num_openings += 1
        what = f"a bit of {name_of(path)} was flipped, and"
        try:
            directory = await open_door(Door(disk), plan)
        except (ShardError, DirectoryError):
            if name_of(path) in (names.CURRENT, name_of(model.MODEL)):
                raise BrokenPromiseError(f"{what} the directory cannot be opened") from None
            return
        committed = directory.committed
        state = ledger.asked.get(0 if committed is None else committed.metadata.get("commit", 0))
        if state is None or directory.entries.keys() != state.keys():
            raise BrokenPromiseError(f"{what} {committed} with {sorted(directory.entries)} was found, which nobody committed")
        for name, entry in directory.entries.items():
            try:
                content = await read(directory, entry.shard)
            except ShardError:
                continue
            if content != state[name].payload(name) and entry.shard.chunks is not None:  # else it was written without checksums
                raise BrokenPromiseError(f"{what} other bytes were read of block {name}")

    async def _open(self, disk: CrashDisk, plan: Plan, generation: int | None = None) -> Directory:
        self.num_openings += 1
        try:
            return await open_door(Door(disk), plan, generation=generation)
        except TierstoreError as error:
            which = "the directory" if generation is None else f"generation {generation}, which is listed,"
            raise BrokenPromiseError(f"{which} cannot be opened: {error}") from error

    async def _check_newest(self, disk: CrashDisk, ledger: Ledger, plan: Plan) -> int:
        """The newest generation and all others that recovery lists. Returns the number of the newest commit."""
        others = disk.kill(NOTHING)
        directory = await self._open(disk, plan)
        committed = directory.committed
        number = 0 if committed is None else committed.metadata["commit"]
        if number not in ledger.asked:
            raise BrokenPromiseError(f"commit {number} was found, which can no longer be there; asked were {sorted(ledger.asked)}")
        if number < ledger.least:
            raise BrokenPromiseError(f"commit {number} was found, and {ledger.least} is durable")
        await check_contents(directory, ledger.asked[number], f"commit {number}")
        self._check_space(directory, disk)
        found = {number} - {0}
        for generation in directory.generations:
            if committed is not None and generation != committed.generation:
                found.add(await self._check_older(others.kill(NOTHING), ledger, plan, generation))
        missing = ledger.must_have(number) - found
        if missing:
            raise BrokenPromiseError(f"commits {sorted(missing)} are gone: {sorted(found)} are there, and keep is {ledger.keep}")
        return number

    async def _check_older(self, disk: CrashDisk, ledger: Ledger, plan: Plan, generation: int) -> int:
        directory = await self._open(disk, plan, generation)
        assert directory.committed is not None
        number: int = directory.committed.metadata["commit"]
        if number not in ledger.asked:
            raise BrokenPromiseError(f"generation {generation} is commit {number}, which can no longer be there")
        await check_contents(directory, ledger.asked[number], f"commit {number}, an older one,")
        self.num_generations += 1
        return number

    async def _check_durable(self, disk: CrashDisk, ledger: Ledger, plan: Plan, number: int) -> None:
        """A commit that a store was opened at is durable from then on, whatever the killed process had left to be done."""
        await self._open(disk, plan)
        directory = await self._open(disk.cut(NOTHING), plan)
        again = 0 if directory.committed is None else directory.committed.metadata["commit"]
        if again != number:
            raise BrokenPromiseError(f"a store was opened at commit {number}, and after a power cut commit {again} was found")
        await check_contents(directory, ledger.asked[again], f"commit {again}, opened before and after a power cut,")

    async def _check_without_model(self, disk: CrashDisk, state: State, plan: Plan) -> None:
        """The model is gone: what lies in it is refused by its name, and everything else is served; until it is there again."""
        disk.unlink(model.MODEL)
        directory = await self._open(disk, plan)
        for name, entry in directory.entries.items():
            try:
                content = await read(directory, entry.shard)
            except ModelFileError as error:
                if not state[name].adopted or error.path != model.MODEL or not entry.shard.header_unverified:
                    raise
            else:
                if state[name].adopted or content != state[name].payload(name):
                    raise BrokenPromiseError(f"without the model, block {name} is not what was committed")
        model.place(disk)
        await check_contents(directory, state, "the commit after the model came back")

    async def _check_next_life(self, disk: CrashDisk, ledger: Ledger, plan: Plan, number: int) -> None:
        """One more commit, and nothing is left but what it and the other kept ones need; and it stays."""
        life = Life(disk, plan, "next", ledger)
        life.door = Door(disk)
        await life.open()
        self.num_openings += 1
        life.rng = random.Random(number)
        name = "abcde"[number % 5]
        if name in life.values and number % 3 == 0:
            life.drop(name)
            del life.values[name]
        else:
            await life.write(name)
        if not await life.commit():
            raise BrokenPromiseError(f"the next life cannot commit: {life.failed[-1]}")
        directory = life.directory
        self._check_space(directory, disk)
        last = life.ledger.acknowledged
        after = await self._open(disk.cut(NOTHING), plan)
        if after.committed is None or after.committed.metadata["commit"] != last:
            raise BrokenPromiseError(f"the next life has committed {last}, and after a power cut {after.committed} was found")
        await check_contents(after, life.values, f"commit {last} of the next life")
        await directory.close()
        self.check_left_over(disk, directory, plan)

    def _check_space(self, directory: Directory, disk: CrashDisk) -> None:
        """All files are counted, nothing else is, and all that within the limit."""
        files = [path for path in disk.files if path.startswith(PATH + "/") and _counts(name_of(path))]
        held = FIXED_BYTES + sum(footprint(len(disk.get(path))) for path in files)
        if not held == directory.used_bytes <= directory.limit_bytes:
            counted = f"{directory.used_bytes} are counted, of {directory.limit_bytes}"
            raise BrokenPromiseError(f"the files take {held} bytes, and {counted}: {sorted(map(name_of, files))}")

    def check_left_over(self, disk: CrashDisk, directory: Directory, plan: Plan, *, fails: bool = False) -> None:
        """A closed directory holds what its kept generations need, and no more of those than it should.

        Args:
            disk, directory, plan: Where, and how it was used.
            fails: Removals have failed, so that their files may still be there: the next opening is to remove them.
        """
        present = {name_of(path) for path in disk.files if path.startswith(PATH + "/")}
        generations = directory.generations
        if len(generations) > plan.keep + disk.journaled:
            raise BrokenPromiseError(f"generations {generations} are there, and keep is {plan.keep}")
        wanted = {names.manifest_name(generation) for generation in generations}
        for generation in generations:
            wanted |= {shard.file for shard in directory._generations[generation]}
        left = present - wanted - {names.CURRENT, names.LOCK}
        if left and not fails:
            raise BrokenPromiseError(f"left over: {sorted(left)}")


def _counts(name: str) -> bool:
    return name not in names.FIXED
