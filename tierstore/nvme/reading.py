"""A directory looked at without opening it as a store: nothing in it is changed, whatever is found.

[Note: Looking beside a running store]
A store at work makes, renames and deletes files while somebody lists them, and listing is not one moment. But a manifest is there
only while every shard that it names is. So the directory is listed before and after its manifests are read: for a generation
that stands in both listings, each of its shards stood in at least one. Where that does not come out, the store was quicker, and
one looks again. `CURRENT` is read before the second listing, so that what it names is not missing because it is newer than that.

[Note: Reading what a store wrote]
Payloads are read chunk by chunk, as many as `IN_FLIGHT` at once, each into a buffer of its own and summed in the thread that read
it. Page-aligned reads past the page cache are tried on the first shard, which needs no trial file: what is then checked is what the
drive holds, and other programs keep what they have cached.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tierstore.catalog import PAGE, TensorSpec
from tierstore.errors import DirectoryError, ShardError
from tierstore.nvme import names
from tierstore.nvme.adopted import Adopted, ModelFile, ranges
from tierstore.nvme.checksums import CHUNK_BYTES, checksum, num_chunks, shard_checksum
from tierstore.nvme.directory import busy
from tierstore.nvme.files import File, Files, FileStat, Lock, Request, aligned_buffer, move_all
from tierstore.nvme.manifest import Hint, Record
from tierstore.nvme.model_files import difference
from tierstore.nvme.recovery import Found, contradictions, doubts, load_manifest, read_hint, scan, settle_store, unusable
from tierstore.nvme.safetensors import parse_header
from tierstore.nvme.shards import io_error
from tierstore.threads import StalledError

IN_FLIGHT = 4
"""Chunks of 16 MiB that are read, checked and passed on at once: the memory that reading takes."""

LOOKS = 8
"""How often one looks again before what is missing counts as missing."""

_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass
class View(Found):
    """What is found in a directory; see `recovery.Found` for the rest. Not changed any more once `look` has returned it.

    Attributes:
        path: Absolute.
        newer: Manifests that a newer version wrote.
        models: The model files that adopted blocks lie in, by path; None: there is none.
    """

    path: str = ""
    models: dict[str, FileStat | None] = field(default_factory=dict)
    newer: dict[int, DirectoryError] = field(default_factory=dict)

    @property
    def opens(self) -> int | None:
        """The generation that a store goes on from, as far as manifests tell; None if it has none, or refuses."""
        return None if self.newer else max(self.manifests, default=None)

    @property
    def warns(self) -> bool:
        """A store that goes on from there says that something newer is damaged or missing; see `recovery.choose`."""
        return self.opens is not None and (self.hint_damaged or max([*self.damaged, self.hint or 0]) > self.opens)

    @property
    def missing(self) -> int | None:
        """The generation that `CURRENT` names, and of which there is no manifest."""
        return self.hint if self.conflict is None and (self.hint or 0) > max(self.manifest_bytes, default=0) else None

    @cached_property
    def doubt(self) -> str | None:
        """Which generation, that cannot be read now, shards may belong to that no other claims; None if there is none.

        By the rule of who opens the directory: see [Note: What is not thrown away] in `recovery`.
        """
        if self.newer:
            return f"generation {max(self.newer)}, which a newer version of tierstore wrote"
        chosen = self.manifests.get(max(self.manifests, default=0))
        contradicting = contradictions(self, chosen)
        if not (doubts(self, chosen) or contradicting):
            return None
        if self.missing is not None:
            return f"generation {self.missing}, whose manifest is missing"
        if self.damaged or contradicting:
            return f"generation {max([*self.damaged, *contradicting])}, whose manifest cannot be used"
        return f"a generation that {names.CURRENT} named before it was damaged"

    @cached_property
    def unclaimed(self) -> list[str]:
        """Shards that no manifest names."""
        claimed = {file for manifest in self.manifests.values() for file in manifest.files}
        shards = (name for name, status in self.files.items() if status.regular and names.shard_number(name) is not None)
        return sorted(name for name in shards if name not in claimed)

    @property
    def orphans(self) -> list[str]:
        """Shards that no manifest names, and that stay all the same until the next commit: see `doubt`."""
        return self.unclaimed if self.doubt is not None else []

    @property
    def leftovers(self) -> list[str]:
        """Files of the store's that no generation needs: what a killed process left, or a running one is at work on."""
        temporary = (name for name, status in self.files.items() if status.regular and names.is_temporary(name))
        return sorted([*temporary, *(self.unclaimed if self.doubt is None else [])])

    def bytes_of(self, listed: Iterable[str]) -> int:
        """Lengths together."""
        return sum(self.files[name].nbytes for name in listed)

    @property
    def touched(self) -> list[str]:
        """Model files of the length that they had, written to since they were adopted."""
        records = [record for manifest in self.manifests.values() for record in manifest.records]
        listed = dict.fromkeys(file for record in records if record.adopted is not None for file in record.adopted.files)
        found = [(file, self.models.get(file.path)) for file in listed]
        touched = [file.path for file, status in found if difference(file, status) and not difference(file, status, time=False)]
        return sorted(set(touched))

    @property
    def foreign(self) -> list[str]:
        """What is no store's: by its name, or as no plain file. A store refuses to open the directory while it is there."""
        return sorted(name for name, status in self.files.items() if not (names.is_ours(name) and status.regular))


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as a store would take it."""
    return os.path.realpath(os.path.expanduser(os.fspath(path)))


async def look(files: Files, path: str) -> View:
    """List a directory (see `absolute`) and read its manifests, also beside a running store. See [Note: Looking beside a running store].

    Raises:
        DirectoryError: It is not a store's directory, or cannot be read.
    """
    try:
        before = await _scan(files, path)
        known = View(path=path)
        for _ in range(LOOKS):
            await _read_manifests(files, before, known)
            hint = await read_hint(files, path, before)
            after = await scan(files, path)
            view = _agree(before, after, known, hint)
            claimed = {file for manifest in view.manifests.values() for file in manifest.files}
            whole = view.missing is None and not view.hint_damaged and claimed <= view.files.keys()
            if whole and view.manifest_bytes.keys() == _manifests(after).keys():
                break
            before = after
        for record in [record for manifest in view.manifests.values() for record in manifest.records if record.adopted is not None]:
            for file in record.adopted.files if record.adopted is not None else ():
                if file.path not in view.models:
                    view.models[file.path] = await _stat_if_possible(files, file.path)
        return view
    except OSError as error:
        raise unusable(path, error) from error


async def _scan(files: Files, path: str) -> dict[str, FileStat]:
    try:
        status = await files.stat(path)
    except FileNotFoundError:
        raise DirectoryError(f"{path} is not there", remedy="name the directory that the store was given as nvme=", path=path) from None
    if not status.directory:
        raise DirectoryError(f"{path} is not a directory", remedy="name the directory that the store was given as nvme=", path=path)
    present = await scan(files, path)
    if _looks_like_a_store(present):
        return present
    inside = [os.path.join(path, name) for name, status in sorted(present.items())[:1000] if status.directory]
    stores = [name for name in inside if _looks_like_a_store(await _list_if_possible(files, name))]
    raise DirectoryError(
        f"{path} is not a store's directory",
        need="a manifest in it, or a store's lock",
        have=f"{len(present)} other files" if present else "an empty directory",
        remedy=f"did you mean {stores[0]}?" if stores else "name the directory that the store was given as nvme=",
        path=path,
    )


async def _stat_if_possible(files: Files, path: str) -> FileStat | None:
    try:
        return await files.stat(path)
    except OSError:
        return None


async def _list_if_possible(files: Files, path: str) -> list[str]:
    try:
        return await files.listdir(path)
    except OSError:
        return []


def _looks_like_a_store(present: Iterable[str]) -> bool:
    return any(name in (names.LOCK, names.CURRENT) or names.manifest_generation(name) is not None for name in present)


def _manifests(present: dict[str, FileStat]) -> dict[int, FileStat]:
    return {number: status for name, status in present.items() if (number := names.manifest_generation(name)) is not None}


async def _read_manifests(files: Files, present: dict[str, FileStat], known: View) -> None:
    """Add to `known` what those say that are not in it yet: a manifest that is there never changes."""
    for generation, status in sorted(_manifests(present).items()):
        if generation in known.manifest_bytes:
            continue
        where = os.path.join(known.path, names.manifest_name(generation))
        try:
            if not status.regular:
                raise ShardError("the manifest is not a plain file")
            known.manifests[generation] = await load_manifest(files, where, generation, status.nbytes)
        except DirectoryError as error:
            known.newer[generation] = error
        except ShardError as error:
            known.damaged[generation] = error
        except OSError as error:  # if a store at work has dropped it, the next listing is without it, and this is forgotten
            known.damaged[generation] = ShardError(f"the manifest cannot be read ({error.strerror or error})")
        known.manifest_bytes[generation] = status.nbytes


def _agree(before: dict[str, FileStat], after: dict[str, FileStat], known: View, hint: Hint | None) -> View:
    """The generations that stand in both listings, and the files they need."""
    there = _manifests(before).keys() & _manifests(after).keys() & known.manifest_bytes.keys()
    view = View(path=known.path)
    view.manifest_bytes = {number: known.manifest_bytes[number] for number in sorted(there)}
    view.manifests = {number: known.manifests[number] for number in sorted(there & known.manifests.keys())}
    view.damaged = {number: known.damaged[number] for number in sorted(there & known.damaged.keys())}
    view.newer = {number: known.newer[number] for number in sorted(there & known.newer.keys())}
    view.hint_damaged = names.CURRENT in before and hint is None
    view.damaged |= settle_store(view, known.path, hint)
    claimed = {file for manifest in view.manifests.values() for file in manifest.files}
    view.files = {**{name: status for name, status in before.items() if name in claimed}, **after}
    return view


async def lock(files: Files, path: str) -> tuple[Lock | None, str | None]:
    """Keep stores out while one reads, without making a lock file where there is none: then nobody has the directory open.

    Returns:
        The lock, or None and why there is none if that matters.

    Raises:
        BusyError: A store has it open.
        DirectoryError: The lock file cannot be used.
    """
    where = os.path.join(path, names.LOCK)
    try:
        if not (await files.stat(where)).regular:  # what a link leads to, or a device, is not opened
            raise DirectoryError(f"the lock of {path} is not a plain file", remedy=f"remove {names.LOCK}", path=path, foreign=(names.LOCK,))
        held = files.lock(where)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise unusable(path, error) from error
        return None, f"the lock could not be taken ({error.strerror}): no store must work in the directory meanwhile"
    if held is None:
        raise await busy(files, path)
    return held, None


# -- payloads -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a shard.

    Attributes:
        what: One clause about the file.
        chunk: The chunk that it concerns; None: the file or its header.
        harms: Tensors that cannot be trusted, in payload order.
    """

    what: str
    chunk: int | None
    harms: tuple[str, ...]


def tensors_of(record: Record, chunk: int) -> tuple[TensorSpec, ...]:
    """Those of which some bytes lie in a chunk."""
    start, stop = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
    return tuple(spec for spec in record.block.tensors if spec.nbytes and spec.offset < stop and spec.offset + spec.nbytes > start)


def chunk_bytes(record: Record, chunk: int) -> int:
    start, stop = _range(record, chunk)
    return stop - start


def all_tensors(record: Record) -> tuple[str, ...]:
    return tuple(spec.name for spec in record.block.tensors)


def file_of(record: Record) -> str:
    """A block's shard, or the first of the model files that it lies in."""
    return record.shard.file if record.adopted is None else record.adopted.files[0].path


def check_file(view: View, record: Record) -> Problem | None:
    """What a look at the name alone tells."""
    if record.adopted is not None:
        return _check_models(view, record, record.adopted)
    status = view.files.get(record.shard.file)
    if status is None:
        return Problem("is missing", None, all_tensors(record))
    if not status.regular:
        return Problem("is not a plain file", None, all_tensors(record))
    if status.nbytes != record.shard.file_bytes:
        problem = f"has {status.nbytes:,} bytes instead of {record.shard.file_bytes:,}"
        if status.nbytes < record.shard.data_start:
            return Problem(problem, None, all_tensors(record))
        there = set(_whole_chunks(record, status.nbytes))
        lost = {spec.name for chunk in range(num_chunks(record.block.nbytes)) if chunk not in there for spec in tensors_of(record, chunk)}
        return Problem(problem, None, tuple(name for name in all_tensors(record) if name in lost))
    return None


def _check_models(view: View, record: Record, adopted: Adopted) -> Problem | None:
    for index, file in enumerate(adopted.files):
        if (what := difference(file, view.models.get(file.path), time=False)) is not None:
            harmed = {spec.name for spec, place in zip(record.block.tensors, adopted.places, strict=True) if place[0] == index}
            problem = what if index == 0 else f"is not all: {file.path} {what}"
            return Problem(problem, None, tuple(name for name in all_tensors(record) if name in harmed))
    return None


def _whole_chunks(record: Record, file_bytes: int) -> list[int]:
    """Those that a file of this length holds all of."""
    reached = file_bytes - record.shard.data_start
    return [chunk for chunk in range(num_chunks(record.block.nbytes)) if _range(record, chunk)[1] <= reached]


Report = Callable[[Record, Problem], None]
"""Told of each problem as it is found; may raise, which ends the reading."""
Use = Callable[[Record, int, memoryview], Awaitable[None]]
"""Given each chunk that is right, or that has no checksum; the buffer is its own until it returns."""


class Reading:
    """Reads shards in full. See [Note: Reading what a store wrote]. For one loop; nothing is in flight once `run` has ended.

    Args:
        files: The file system.
        view: The directory.
        report: Told of problems.
        use: Given the bytes.
        progress: Told of payload bytes as they are done with, whether they were right or not.
    """

    def __init__(
        self, files: Files, view: View, report: Report, *, use: Use | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        self.read_bytes = 0
        self._files = files
        self._view = view
        self._report = report
        self._use = use
        self._progress = progress or (lambda nbytes: None)
        self._open: dict[int, list[File]] = {}  # by the shard's place in the list
        self._headers: dict[ModelFile, str | None] = {}  # of model files: what is wrong with them
        self._left: dict[int, int] = {}  # headers and chunks still to be read, likewise

    async def run(self, records: Iterable[Record]) -> None:
        """Check every header and every chunk of these shards.

        Raises:
            TransferError: The drive does not answer.
            Exception: Whatever `report` and `use` raise.
        """
        listed = list(records)
        for record in listed:
            if (problem := check_file(self._view, record)) is not None:
                self._report(record, problem)
        await self._try_direct(listed)
        jobs = self._jobs(listed)
        largest = max((min(record.block.nbytes, CHUNK_BYTES) for record in listed), default=0)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(self._work(jobs, largest))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for index in list(self._open):
                await self._close(index)

    def _jobs(self, records: Sequence[Record]) -> Iterator[tuple[int, Record, int | None]]:
        """Each shard's header (None) and chunks, as far as its file reaches."""
        for index, record in enumerate(records):
            if record.adopted is not None:
                yield from self._jobs_in_models(index, record, record.adopted)
                continue
            status = self._view.files.get(record.shard.file)
            if status is None or not status.regular:
                self._progress(record.block.nbytes)
                continue
            whole = _whole_chunks(record, status.nbytes)
            self._progress(record.block.nbytes - sum(stop - start for start, stop in (_range(record, chunk) for chunk in whole)))
            header = [None] if status.nbytes >= record.shard.data_start else []
            if jobs := [*header, *whole]:
                self._open[index] = [self._files.file(os.path.join(self._view.path, record.shard.file))]
                self._left[index] = len(jobs)
            yield from ((index, record, job) for job in jobs)

    def _jobs_in_models(self, index: int, record: Record, adopted: Adopted) -> Iterator[tuple[int, Record, int | None]]:
        """Likewise, of a block that lies in model files; none where these are others by now."""
        if check_file(self._view, record) is not None:
            self._progress(record.block.nbytes)
            return
        jobs = [None, *range(num_chunks(record.block.nbytes))]
        self._open[index] = [self._files.file(file.path) for file in adopted.files]
        self._left[index] = len(jobs)
        yield from ((index, record, job) for job in jobs)

    async def _close(self, index: int) -> None:
        for file in self._open.pop(index):
            await file.close()

    async def _work(self, jobs: Iterator[tuple[int, Record, int | None]], nbytes: int) -> None:
        buffer = aligned_buffer(nbytes)
        for index, record, chunk in jobs:
            if chunk is None:
                await self._check_header(record)
            else:
                await self._read_chunk(record, self._open[index], chunk, buffer)
            self._left[index] -= 1
            if not self._left[index]:
                await self._close(index)

    async def _check_header(self, record: Record) -> None:
        if record.adopted is not None:
            await self._check_headers_of_models(record, record.adopted)
            return
        shard = record.shard
        path = os.path.join(self._view.path, shard.file)
        try:
            header = await self._files.load(path, shard.data_start)
        except StalledError as error:
            raise io_error(error, f"reading block {record.block.name!r}", path=path, block=record.block.name) from error
        except OSError as error:
            self._report(record, Problem(f"has a header that cannot be read ({error.strerror or error})", None, all_tensors(record)))
            return
        sums = await self._files.work(checksum, header)
        if len(header) != shard.data_start or shard_checksum(sums, shard.chunks or ()) != shard.digest:
            self._report(record, Problem("has a header that does not match its checksum", None, all_tensors(record)))
        elif not _describes(header, record):
            self._report(record, Problem("has a header that describes other tensors than the manifest", None, all_tensors(record)))

    async def _check_headers_of_models(self, record: Record, adopted: Adopted) -> None:
        for file in adopted.files:
            if file not in self._headers:
                try:
                    same = await self._files.work(checksum, await self._files.load(file.path, file.header_bytes)) == file.header_sum
                except StalledError as error:
                    raise io_error(error, f"reading block {record.block.name!r}", path=file.path, block=record.block.name) from error
                except OSError as error:
                    self._headers[file] = f"has a header that cannot be read ({error.strerror or error})"
                else:
                    self._headers[file] = None if same else "has another header than it had when it was adopted"
            if (problem := self._headers[file]) is not None:
                self._report(record, Problem(problem, None, all_tensors(record)))

    async def _read_from_models(self, record: Record, adopted: Adopted, files: Sequence[File], start: int, piece: memoryview) -> None:
        """Fill a piece of the payload, with zeros between tensors."""
        piece[:] = bytes(len(piece))
        requests: dict[int, list[Request]] = {}
        for one in ranges(record.block, adopted, start, start + len(piece)):
            target = one.target - start
            requests.setdefault(one.file, []).append(Request(one.begin, piece[target : target + one.nbytes]))
        for index, listed in requests.items():
            await move_all(self._files, files[index].read, listed)

    async def _read_chunk(self, record: Record, files: Sequence[File], chunk: int, buffer: memoryview) -> None:
        shard = record.shard
        start, stop = _range(record, chunk)
        piece = buffer[: stop - start]
        found: list[int] = []
        then = None if shard.chunks is None else lambda data: found.append(checksum(data))
        problem: str | None = None
        try:
            if record.adopted is not None:
                await self._read_from_models(record, record.adopted, files, start, piece)
                if then is not None:
                    await self._files.work(then, piece)
            else:
                await move_all(self._files, files[0].read, [Request(shard.data_start + start, piece, then)])
        except StalledError as error:  # its buffer may still be filled
            path = os.path.join(self._view.path, file_of(record))
            raise io_error(error, f"reading block {record.block.name!r}", path=path, block=record.block.name) from error
        except OSError as error:
            problem = f"cannot be read ({error.strerror or error})"
        else:
            self.read_bytes += len(piece)
            if shard.chunks is not None and found[-1] != shard.chunks[chunk]:
                problem = "does not match its checksum"
        if problem is not None:
            what = "bytes" if record.adopted is None else "payload bytes"
            where = f"chunk {chunk} ({what} {shard.data_start + start} to {shard.data_start + stop})"
            self._report(record, Problem(f"{where} {problem}", chunk, tuple(spec.name for spec in tensors_of(record, chunk))))
        elif self._use is not None:
            await self._use(record, chunk, piece)
        self._progress(len(piece))

    async def _try_direct(self, records: Iterable[Record]) -> None:
        """Read past the page cache where the file system lets the first shard be read so."""
        for record in records:
            if record.adopted is None and check_file(self._view, record) is None:
                file = self._files.file(os.path.join(self._view.path, record.shard.file))
                self._files.direct = True
                outcomes = await file.read([Request(0, aligned_buffer(PAGE))])
                self._files.direct = outcomes == [PAGE]
                await file.close()
                return


def _range(record: Record, chunk: int) -> tuple[int, int]:
    return chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, record.block.nbytes)


def _describes(header: bytes, record: Record) -> bool:
    """Whether a header places exactly the manifest's tensors where the manifest does; what lies between them is its own."""
    try:
        parsed = parse_header(header, record.shard.file_bytes)
    except ShardError:
        return False
    placed = {tensor.name: (tensor.dtype, tensor.shape, tensor.begin) for tensor in parsed.tensors}
    return all(placed.get(spec.name) == (spec.dtype, spec.shape, spec.offset) for spec in record.block.tensors)
