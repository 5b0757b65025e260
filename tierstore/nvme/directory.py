"""A store's directory: opening and locking it, shards and the space they take, and commits.

[Note: The order of a commit]
New shards are synced; the manifest is written under a temporary name and synced; the directory is synced, so that all these
names are durable; the manifest gets its name and the directory is synced again. From here on the commit has happened. Then
`CURRENT` follows, generations beyond `keep` lose their manifests, the directory is synced once more, and only then are shards
that nobody refers to any more let go to be rewritten. Where directories cannot be synced, one more generation is kept instead.

[Note: A commit in doubt]
Once the manifest may have got its name, a crash may find it there, whatever error came back. Such a generation keeps its
references until its manifest is durably gone, so that recovery never meets rewritten shards. The next commit sees to that first.

[Note: What is found is durable]
A process may have been killed between naming a manifest and syncing the directory. Who opens it then sees a commit that a power
cut could still take away, so the directory is synced before anything is looked at. That also makes the lock file's name durable
before there are shards, which would be foreign files without it. Where directories cannot be synced, the file that names the holder
is synced instead: a journal that holds every change of a directory then reaches the drive up to there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from tierstore.errors import BusyError, OptionError, TierFullError
from tierstore.nvme import names, recovery, windows
from tierstore.nvme.adopted import ModelFile
from tierstore.nvme.files import FULL, Files, Lock, land
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.locks import describe_holder
from tierstore.nvme.manifest import Hint, encode_hint, encode_manifest, encode_metadata
from tierstore.nvme.shards import Entry, Shard, io_error
from tierstore.nvme.shelf import Shelf
from tierstore.nvme.space import FIXED_BYTES, Space, footprint, no_relief
from tierstore.threads import StalledError

log = logging.getLogger(__name__)

FREE_SHARE = 0.95
"""Of the free space that a directory takes without a limit of its own."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A durable consistent state of all blocks, and the user's metadata (a JSON value)."""

    generation: int
    metadata: Any


class Directory(Shelf):
    """An open directory. All methods belong to the engine's loop, save `open` (any thread) and `forget_in_child`."""

    def __init__(self, path: str, files: Files, lock: Lock, *, checksum: bool, keep: int) -> None:
        """Use `open`."""
        super().__init__(path, files, checksum=checksum)
        self._lock = lock
        self._keep = keep
        self._store = ""  # which it is; see [Note: Which store this is] in `recovery`
        self._committed: Commit | None = None
        self._entries: dict[str, Entry] = {}
        self._generations: dict[int, list[Shard]] = {}
        self._opened: int | None = None  # perhaps an older one, by choice: stays until another is durable
        self._useless: set[int] = set()  # damaged, or in doubt: the first to go
        self._doubtful: set[int] = set()  # those of them that a commit or a drop of this process has left half-way
        self._manifest_bytes: dict[int, int] = {}
        self._orphans: dict[str, int] = {}  # shards that a damaged manifest may need
        self._next_generation = 1
        self._committing = asyncio.Lock()
        self._num_commits = 0  # that are being made durable, or wait for their turn
        self._commit_ended = asyncio.Event()  # of the next of them that ends

    # -- opening --------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        limit: int | None = None,
        checksum: bool = True,
        keep: int = 1,
        generation: int | None = None,
        direct_io: bool | Literal["auto"] = "auto",
        files: Files | None = None,
    ) -> Directory:
        """Open or make a directory, and recover what was committed. Blocks; any thread, also one that runs a loop.

        Args:
            path: The directory; made with mode 0700 if it is absent.
            limit: Bytes of drive for all files together; None: what it holds, and the free space less 5 %.
            checksum: Compute and verify checksums.
            keep: Generations that stay.
            generation: An older one to go on from; None: the newest.
            direct_io: Bypass the page cache: True, False, or "auto" where the file system allows it.
            files: The file system, closed with the directory; None: the machine's.

        Raises:
            BusyError: Another store has it open; `pid` names the process.
            DirectoryError: Foreign files, not a directory, not accessible, a newer format, no such generation.
            ShardError: The generation is damaged.
            TierFullError: It already holds more than `limit`.
            OptionError: An option that is out of range, or direct I/O that was demanded and refused.
        """
        if keep < 1:
            raise OptionError("keep must be at least 1", need="1 or more generations", have=keep)
        where = os.path.expanduser(os.fspath(path))
        if windows.HERE:
            recovery.check_name(where)
        where = windows.plain(os.path.realpath(where))
        opening = cls._open(where, limit, checksum, keep, generation, direct_io, files if files is not None else LocalFiles())
        with ThreadPoolExecutor(1, thread_name_prefix="tierstore-open") as thread:
            return thread.submit(asyncio.run, opening).result()

    @classmethod
    async def _open(
        cls,
        path: str,
        limit: int | None,
        checksum: bool,
        keep: int,
        generation: int | None,
        direct_io: bool | Literal["auto"],
        files: Files,
    ) -> Directory:
        lock: Lock | None = None
        try:
            await recovery.check_place(files, path)
            try:
                lock = files.lock(os.path.join(path, names.LOCK))
            except OSError as error:
                raise recovery.unusable(path, error) from error
            if lock is None:
                raise await busy(files, path)
            directory = cls(path, files, lock, checksum=checksum, keep=keep)
            await recovery.clear_holder(files, path)
            await directory._name_holder()
            await directory._recover(limit, generation)
            await files.probe(path, direct_io)
            return directory
        except BaseException:
            if lock is not None:
                with contextlib.suppress(OSError):
                    await files.unlink(os.path.join(path, names.HOLDER))
                lock.release()
            files.close()
            raise

    async def _name_holder(self) -> None:
        """Say who has it, and make durable what is there; see [Note: What is found is durable]."""
        try:
            await self._save_holder(sync=not self.files.syncs_directories)
        except OSError as error:
            failure = io_error(error, "writing the process id", path=self._join(names.HOLDER))
            if not isinstance(failure, TierFullError):  # a full drive can still be opened, and space made
                raise recovery.unusable(self.path, error) from error
            log.warning("%s", failure)
        try:
            await self.files.sync_directory(self.path)
        except OSError as error:
            raise recovery.unusable(self.path, error) from error

    async def _save_holder(self, *, sync: bool) -> None:
        await self._save(self._join(names.HOLDER), describe_holder(), sync=sync)

    async def _recover(self, limit: int | None, generation: int | None) -> None:
        try:
            found = await recovery.survey(self.files, self.path)
        except OSError as error:
            raise recovery.unusable(self.path, error) from error
        chosen = recovery.choose(found, self.path, generation)
        models: Mapping[ModelFile, ModelFile | str] = {}
        if chosen is not None:
            recovery.check_shards(found, self.path, chosen)
            models = await recovery.check_models(self.files, self.path, chosen)
        self._store = found.store if found.store is not None else self.files.draw_identity()
        self._next_shard, self._next_generation = recovery.next_numbers(found)
        self._shards, entries = recovery.link_shards(found, self.path, chosen, models)
        self._generations = {number: [entry.shard for entry in listed] for number, listed in entries.items()}
        self._manifest_bytes = found.manifest_bytes
        self._useless = set(found.damaged)
        if chosen is not None:
            self._committed = Commit(chosen.generation, chosen.metadata)
            self._opened = chosen.generation
            self._entries = {entry.block.name: entry for entry in entries[chosen.generation]}
        current = {entry.shard for entry in self._entries.values()}
        for shard in self._shards.values():
            shard.discarded = shard not in current  # of other generations only: let go with the last of them
        await self._clear_leftovers(found, keep_unclaimed=recovery.doubts(found, chosen))
        held = sum(map(footprint, [shard.file_bytes for shard in self._shards.values()]))
        held += sum(map(footprint, [*self._manifest_bytes.values(), *self._orphans.values()]))
        await self._set_limit(limit, held)

    async def _clear_leftovers(self, found: recovery.Found, *, keep_unclaimed: bool) -> None:
        """Delete what a killed process left; see [Note: What is not thrown away] in `recovery`."""
        deleted: list[int] = []
        for name, status in found.files.items():
            unclaimed = names.shard_number(name) is not None and name not in self._shards
            if unclaimed and keep_unclaimed:
                self._orphans[name] = status.nbytes
            elif unclaimed or names.is_temporary(name):
                try:
                    await self.files.unlink(self._join(name))
                except OSError as error:
                    raise recovery.unusable(self.path, error) from error
                deleted += [status.nbytes] if unclaimed else []
        if deleted:
            level = logging.INFO if self._committed is not None else logging.WARNING  # nobody may know any more what they were
            message = "%s: deleted %d shards (%d bytes) that were written and never committed"
            log.log(level, message, self.path, len(deleted), sum(deleted))

    async def _set_limit(self, limit: int | None, held: int) -> None:
        used = FIXED_BYTES + held
        automatic = limit is None
        if limit is None:
            limit = used + int(await self.files.disk_free(self.path) * FREE_SHARE)
        if used > limit:
            raise TierFullError(
                f"{self.path} holds more than nvme_limit allows",
                need=f"{used} bytes",
                have=f"a limit of {limit}",
                remedy="raise nvme_limit=, or name another directory",
                tier="nvme",
                path=self.path,
                block=None,
            )
        self._space = Space(self.files, self.path, limit)
        self._space.used_bytes = self._space.peak_bytes = used
        if automatic:
            self._space.renew_limit = self._renew_limit

    async def _renew_limit(self) -> bool:
        try:
            limit = self.used_bytes + int(await self.files.disk_free(self.path) * FREE_SHARE)
        except OSError as error:
            log.warning("the free space of %s could not be asked for: %s", self.path, error)
            return False
        if limit <= self.limit_bytes:
            return False
        log.info("there is more free space by now: %s may take %d bytes", self.path, limit)
        self._space.limit_bytes = limit
        return True

    # -- what is there --------------------------------------------------------------------------------------------------

    @property
    def store(self) -> str:
        """Tells this directory from every other: see `manifest.is_identity`. Until the first commit only known here."""
        return self._store

    @property
    def committed(self) -> Commit | None:
        """The last commit, or the generation that was opened."""
        return self._committed

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Blocks by name as recovered at opening; not kept up to date. The caller owns these shards as if it had written them."""
        return self._entries

    @property
    def generations(self) -> tuple[int, ...]:
        """Those that can be opened, ascending."""
        return tuple(sorted(set(self._generations) - self._useless))

    # -- commits --------------------------------------------------------------------------------------------------------

    async def commit(self, entries: Sequence[Entry], metadata: object = None) -> int:
        """Make a state durable: these blocks with these shards, whose bytes stay untouched from the call on.

        Commits queue up. A shard still being written must not be among them.

        Returns:
            The new generation.

        Raises:
            OptionError: The metadata is not JSON. Nothing was done.
            TierFullError: No room for the manifest. The last commit stands.
            TransferError: A write or sync failed. The last commit stands; the call may be repeated.
        """
        self._check_open()
        text = encode_metadata(metadata)
        entries = list(entries)
        for entry in entries:
            assert entry.shard.whole, f"{entry.shard.file} cannot be committed now"
            self.retain(entry.shard)
        self._num_commits += 1

        async def guarded() -> int:
            try:
                async with self._committing:
                    return await self._commit(entries, text)
            finally:
                for entry in entries:
                    self.release(entry.shard)
                self._num_commits -= 1
                self._commit_ended.set()
                self._commit_ended = asyncio.Event()

        return await land(guarded())

    async def _relief(self) -> bool:
        if self._num_commits:
            await self._commit_ended.wait()
            return True
        waited = self._committing.locked()  # for another one who lacks space
        async with self._committing:
            surplus = self._surplus
            return (bool(surplus) and await self._drop(surplus)) or waited

    async def _commit(self, entries: Sequence[Entry], metadata: str) -> int:
        self._check_open()
        await self._close_retired()
        await self._drop(self._surplus)
        for entry in entries:
            if entry.shard.suspect:
                await self._relocate(entry.shard)
        await self._sync_all([entry.shard for entry in entries if not entry.shard.synced])
        generation = self._next_generation
        try:
            data = await self.files.work(_manifest_bytes, self._store, generation, self._next_shard, metadata, entries)
        except OSError as error:
            raise io_error(error, "encoding the manifest", path=self.path) from error
        final = self._join(names.manifest_name(generation))
        await self._space.reserve(len(data), no_relief, what="the manifest")
        try:
            await self._save(final + names.TEMPORARY, data, sync=True)
            await self.files.sync_directory(self.path)
        except OSError as error:
            if isinstance(error, StalledError):
                self._next_generation += 1  # it may still be written to: its name is nobody's from now on
            elif await self._unlink_quietly(names.manifest_name(generation) + names.TEMPORARY):
                self._space.give_back(len(data))
            raise io_error(error, "writing the manifest", path=final) from error
        # See [Note: A commit in doubt].
        self._next_generation += 1
        self._manifest_bytes[generation] = len(data)
        self._generations[generation] = [entry.shard for entry in entries]
        self._useless.add(generation)
        self._doubtful.add(generation)
        for entry in entries:
            self.retain(entry.shard)
        try:
            await self.files.replace(final + names.TEMPORARY, final)
            await self.files.sync_directory(self.path)
        except OSError as error:
            raise io_error(error, "naming the manifest", path=final) from error
        self._useless.discard(generation)
        self._doubtful.discard(generation)
        self._committed = Commit(generation, json.loads(metadata))
        await self._point_to(generation)
        await self._reclaim()
        return generation

    async def _save(self, path: str, data: bytes, *, sync: bool) -> None:
        """Write a small file. Where the drive is full, what only waits to be rewritten makes room."""
        try:
            await self.files.save(path, data, sync=sync)
        except OSError as error:
            if error.errno not in FULL or not self._space.pool_bytes:
                raise
            await self._space.trim()
            await self.files.save(path, data, sync=sync)

    async def _point_to(self, generation: int) -> None:
        """Let `CURRENT` follow. Only a hint, so a failure is not the commit's."""
        current = self._join(names.CURRENT)
        try:
            await self._save(current + names.TEMPORARY, encode_hint(Hint(self._store, generation)), sync=True)
            await self.files.replace(current + names.TEMPORARY, current)
        except OSError as error:
            log.warning("generation %d is committed, but %s could not be written: %s", generation, current, error)

    async def _reclaim(self) -> None:
        """Drop generations beyond `keep` and let their shards go. Failures wait for the next commit."""
        if not await self._drop({*self.generations[: -self._kept], *self._useless}):
            return
        for name, file_bytes in self._orphans.items():
            self._space.doom(name, file_bytes)
        self._orphans = {}
        await self._close_retired()
        await self._space.trim(sum(shard.file_bytes for shard in self._shards.values() if not shard.discarded))

    @property
    def _surplus(self) -> set[int]:
        """What must not be added to: of a commit in doubt, or of a process that was killed before it dropped older generations."""
        return self._doubtful | {number for number in self.generations[: -self._kept] if number != self._opened}

    @property
    def _kept(self) -> int:
        return self._keep if self.files.syncs_directories else self._keep + 1

    async def _drop(self, generations: Collection[int]) -> bool:
        """Let generations go: first their manifests, durably, then their shards. False if that failed: then they keep their shards."""
        if not generations:
            return True
        gone = sorted(generations)
        try:
            for number in gone:
                for name in (names.manifest_name(number), names.manifest_name(number) + names.TEMPORARY):
                    with contextlib.suppress(FileNotFoundError):
                        await self.files.unlink(self._join(name))
            await self.files.sync_directory(self.path)
            if not self.files.syncs_directories:
                await self._save_holder(sync=True)  # and with it, the journal: see [Note: What is found is durable]
        except OSError as error:
            log.warning("old generations of %s could not be dropped yet: %s", self.path, error)
            self._useless.update(gone)  # their manifests may be gone
            self._doubtful.update(gone)
            return False
        for number in gone:
            self._space.give_back(self._manifest_bytes.pop(number))
            for shard in self._generations.pop(number, []):
                self.release(shard)
            self._useless.discard(number)
            self._doubtful.discard(number)
        return True

    # -- the end --------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Remove what no kept generation needs, and let other stores in. Nothing may be under way. Repeatable."""
        if not self._closed:
            await land(self._close())

    async def _close(self) -> None:
        self._closed = True
        for shard in list(self._shards.values()):
            self._retire_handle(shard)
            if not shard.references:
                self._space.doom(shard.file, shard.file_bytes)
        try:
            await self._close_retired()
            await self._space.trim()
            await self._unlink_quietly(names.HOLDER)
        finally:
            self._lock.release()
            self.files.close()

    def forget_in_child(self) -> None:
        """In a forked child: drop what was inherited and touch neither lock nor files. Never fails; any thread."""
        self._closed = True
        for shard in self._shards.values():
            if shard.handle is not None:
                shard.handle.forget()
        for file, _ in self._retired:
            file.forget()
        self._lock.forget()


def _manifest_bytes(store: str, generation: int, next_shard: int, metadata: str, entries: Sequence[Entry]) -> bytes:
    lines = [entry.line() for entry in entries]
    version = max((entry.format for entry in entries), default=1)
    return encode_manifest(store, generation, next_shard, metadata, lines, version)


async def busy(files: Files, path: str) -> BusyError:
    """What to raise where somebody else has the lock."""
    holder = await recovery.read_holder(files, path)
    who = f"process {holder}" if holder is not None else "another process"
    if holder == os.getpid():
        who += ", which is this one"
    return BusyError(
        f"{path} is in use by {who}",
        need="a directory no store has open",
        have=f"a lock of {who}",
        remedy="close that store first",
        path=path,
        pid=holder,
    )
