"""Takes the weights out of a store's directory: safetensors files and an index, as Hugging Face's libraries write and read them.

See [Note: Nothing half-written] in `naming`, and [Note: Files that are the export already] in `layout`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tierstore.catalog import STATE_PREFIXES
from tierstore.errors import DirectoryError, OptionError, ShardError
from tierstore.export.layout import INDEX, REFUSED, Part, Placed, encode_index, is_export, lay_out, tensor_names, why_no_export
from tierstore.export.naming import Naming
from tierstore.nvme.checksums import CHUNK_BYTES
from tierstore.nvme.files import File, Files, Request, move_all
from tierstore.nvme.manifest import Manifest, Record
from tierstore.nvme.model_files import ADAPTERS
from tierstore.nvme.reading import Problem, Reading, View, check_file, file_of, lock, look, tensors_of
from tierstore.nvme.recovery import some
from tierstore.nvme.shards import io_error
from tierstore.nvme.verify import Begin, no_generation, problems_of

DEFAULT_MAX_SHARD = "5GB"


@dataclass(frozen=True, slots=True)
class Options:
    """What to export, and how.

    Attributes:
        out: Absolute path of the directory to write.
        generation: Which; None: the newest.
        only: Patterns of block names; these and no others, also training state. None given: all but training state.
        exclude: Patterns of block names to leave out.
        max_shard_bytes: Tensor bytes in one file; a tensor that is larger has one to itself.
        link: Give each block whose shard is an export file already a file of its own, and share it by hard link if need be.
        force: Replace an export that is there.
    """

    out: str
    generation: int | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_shard_bytes: int = 5 * 10**9
    link: bool = False
    force: bool = False


@dataclass(slots=True)
class Exported:
    """What was written.

    Attributes:
        files: Names in `out`, without the index.
        copied_bytes: Tensor bytes that were written anew.
        shared: Files by how they share bytes with the store: "reflink", "hard link".
        not_shared: Blocks that `link` was asked for and that were copied all the same, by reason.
        qualified: Tensors carry their block's name before their own, because names occurred twice.
        left_out: Blocks that were not exported.
        unchecked: Blocks that were written with `checksum=False`, or adopted and not read before the commit.
        notes: What else is worth knowing.
    """

    out: str
    generation: int
    num_blocks: int
    num_tensors: int
    total_bytes: int
    files: list[str] = field(default_factory=list)
    copied_bytes: int = 0
    shared: Counter[str] = field(default_factory=Counter)
    not_shared: Counter[str] = field(default_factory=Counter)
    qualified: bool = False
    left_out: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# -- choosing ----------------------------------------------------------------------------------------


def select(manifest: Manifest, only: Sequence[str], exclude: Sequence[str]) -> list[Record]:
    """The blocks to export.

    Raises:
        OptionError: None are left.
    """

    def wanted(block: str) -> bool:
        chosen = _matches(block, only) if only else not block.startswith(STATE_PREFIXES)
        return chosen and not _matches(block, exclude)

    records = [record for record in manifest.records if wanted(record.block.name)]
    if not records:
        raise OptionError(
            f"no block of generation {manifest.generation} is to be exported",
            need="at least one",
            have=some([record.block.name for record in manifest.records], ", ") or "no blocks",
            remedy="choose with --only and --exclude; names that begin with " + ", ".join(STATE_PREFIXES) + " are training state",
        )
    return records


def _matches(block: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(block, pattern) for pattern in patterns)


# -- carrying it out --------------------------------------------------------------------------------------------------------


async def export(files: Files, out_files: Files, path: str, options: Options, *, begin: Begin | None = None) -> Exported:
    """Write an export. Every chunk is checked against its checksum as it is read. See [Note: Nothing half-written].

    Args:
        files: The store's file system.
        out_files: Another one for what is written, as only one of them may read past the page cache.
        path: Of the store; absolute, see `reading.absolute`.
        options: What to export, and how.
        begin: For a display of progress.

    Raises:
        BusyError: A store has the directory open.
        ShardError: Damage; names block and tensors. `out` is as it was.
        DirectoryError, OptionError, TensorError: What was asked for cannot be done. Nothing was written.
        TierFullError, TransferError: Reading or writing failed. `out` is as it was, unless the drive refuses that, too.
    """
    await look(files, path)  # before anything else: what is no store's directory is not locked either
    held, unlocked = await lock(files, path)
    try:
        view = await look(files, path)
        manifest = _choose(view, options.generation)
        records = select(manifest, options.only, options.exclude)
        for record in records:
            if (problem := check_file(view, record)) is not None:
                raise _damaged(view, record, problem)
        called, qualified = tensor_names(records)
        parts = lay_out(records, called, max_bytes=options.max_shard_bytes, apart=options.link)
        made = await _prepare(out_files, view, options)
        chosen = set(records)
        total = sum(part.tensor_bytes for part in parts)
        exported = Exported(options.out, manifest.generation, len(records), len(called), total, qualified=qualified)
        exported.left_out = [record.block.name for record in manifest.records if record not in chosen]
        exported.unchecked = [record.block.name for record in records if record.shard.chunks is None]
        exported.notes = [*([unlocked] if unlocked else []), *_notes(view, manifest, options)]
        exported.files = [part.file for part in parts]
        if options.link:
            exported.not_shared.update(why for record in records if (why := why_no_export(record, called)) is not None)
        writer = Writer(files, out_files, view, options, parts, exported)
        try:
            await writer.run(records, begin)
        except BaseException:
            await writer.undo(made)
            raise
        return exported
    finally:
        if held is not None:
            held.release()


def _choose(view: View, generation: int | None) -> Manifest:
    number = generation if generation is not None else max(view.manifest_bytes, default=None)
    if number is None and (problems := problems_of(view)):
        raise ShardError("; ".join(problems), remedy="restore the manifest from a backup", path=view.path)
    if number is None:
        raise DirectoryError(f"nothing has been committed in {view.path}", need="a commit", remedy="commit first", path=view.path)
    if number not in view.manifest_bytes:
        raise no_generation(view, number)
    if view.newer and (generation is None or generation in view.newer):
        raise next(reversed(view.newer.values()))
    if view.conflict is not None:
        raise view.conflict
    if number in view.damaged:
        others = sorted(view.manifests)
        raise ShardError(
            f"generation {number} of {view.path} is damaged: {view.damaged[number]}",
            remedy=f"export an older one (--generation {others[-1]})" if others else "restore the file from a backup",
            path=view.path,
            generation=number,
            available=tuple(others),
        )
    return view.manifests[number]


def _notes(view: View, manifest: Manifest, options: Options) -> Iterator[str]:
    if options.generation is None and (view.hint or 0) > manifest.generation:
        yield f"generation {view.hint} was committed, and its manifest is missing: this is an older state"
    if view.foreign:
        yield f"files that are not the store's: {some(view.foreign, ', ')}"
    for option, patterns in (("--only", options.only), ("--exclude", options.exclude)):
        for pattern in patterns:
            if not any(_matches(record.block.name, [pattern]) for record in manifest.records):
                yield f"{option} {pattern!r} matches no block"


def _damaged(view: View, record: Record, problem: Problem) -> ShardError:
    tensors = some(problem.harms, ", ") or "none of its tensors"
    others = [number for number, manifest in view.manifests.items() if record not in manifest.records]
    older = f"export another generation (--generation {max(others)}), or " if others else ""
    return ShardError(
        f"block {record.block.name!r} is damaged ({tensors}): {file_of(record)} {problem.what}",
        remedy=f"see what else is with `tierstore verify`; {older}leave the block out with --exclude",
        block=record.block.name,
        tensors=problem.harms,
        chunk=problem.chunk,
        path=os.path.join(view.path, file_of(record)),
    )


async def _prepare(out_files: Files, view: View, options: Options) -> bool:
    """Make `out`, or refuse what is there. Returns whether it was made."""
    out = options.out
    if out == view.path or out.startswith(view.path + os.sep):
        remedy = "name a directory outside of it"
        raise OptionError(f"an export inside the store's own directory would make it unusable ({out})", remedy=remedy, path=out)
    try:
        status = await out_files.stat(out)
    except FileNotFoundError:
        try:
            await out_files.make_directory(out)
        except OSError as error:
            with contextlib.suppress(OSError):  # it may be made, and not synced
                await out_files.remove_directory(out)
            raise io_error(error, "making the directory", path=out) from error
        return True
    except OSError as error:
        raise io_error(error, "looking at the directory", path=out) from error
    if not status.directory:
        raise DirectoryError(f"{out} is not a directory", remedy="name a directory to write into", path=out)
    present = await out_files.listdir(out)
    if adapters := sorted(name for name in present if name in ADAPTERS):
        raise DirectoryError(
            f"{out} holds adapters: libraries that find them load these, on the model that they name, and not the export",
            have=", ".join(adapters),
            remedy="name another directory, or move them away",
            path=out,
            there=tuple(adapters),
        )
    there = sorted(name for name in present if is_export(name))
    if there and not options.force:
        raise DirectoryError(
            f"{out} holds a model already",
            have=some(there, ", "),
            remedy="name another directory, or replace these files with --force",
            path=out,
            there=tuple(there),
        )
    return False


class Writer:
    """Carries out one export."""

    def __init__(self, files: Files, out_files: Files, view: View, options: Options, parts: list[Part], exported: Exported) -> None:
        self._files = files
        self._out = out_files
        self._view = view
        self._options = options
        self._parts = parts
        self._exported = exported
        self._open: dict[str, File] = {}  # by part
        self._pieces: dict[tuple[str, str], tuple[Part, Placed]] = {}  # what is copied, by block and tensor
        self._naming = Naming(out_files, options.out)

    async def run(self, records: Sequence[Record], begin: Begin | None) -> None:
        progress: Callable[[int], None] | None = None
        if begin is not None:
            progress = begin(sum(record.block.nbytes for record in records))
        for part in self._parts:
            if not await self._share(part):
                await self._begin(part)
        await Reading(self._files, self._view, self._refuse, use=self._copy, progress=progress).run(records)
        for name, file in self._open.items():
            try:
                await file.sync()
            except OSError as error:
                raise self._failed(error, "syncing", name) from error
        await self._close()
        await self._publish()

    def _refuse(self, record: Record, problem: Problem) -> None:
        raise _damaged(self._view, record, problem)

    async def _share(self, part: Part) -> bool:
        """See [Note: Files that are the export already]. The bytes are checked afterwards like all others."""
        if part.same_as is None:
            return False
        source = os.path.join(self._view.path, part.same_as.shard.file)
        ways = [("reflink", self._out.clone), ("hard link", self._out.link)]
        for way, share in ways if self._options.link else ways[:1]:
            try:
                target = await self._naming.make(part.file)
                await share(source, target)
            except OSError:
                continue  # not on this file system, or not across two
            if way == "reflink":
                self._open[part.file] = self._out.file(target, write=True)  # to be synced
            self._exported.shared[way] += 1
            return True
        if self._options.link:
            self._exported.not_shared[REFUSED] += 1
        return False

    async def _begin(self, part: Part) -> None:
        try:
            target = await self._naming.make(part.file)
            file = self._open[part.file] = self._out.file(target, write=True)
            await file.create(len(part.header) + part.tensor_bytes)
            await move_all(self._out, file.write, [Request(0, memoryview(part.header))])
        except OSError as error:
            raise self._failed(error, "writing", part.file) from error
        self._exported.copied_bytes += part.tensor_bytes
        self._pieces.update(((placed.record.block.name, placed.spec.name), (part, placed)) for placed in part.tensors)

    async def _copy(self, record: Record, chunk: int, data: memoryview) -> None:
        """Write what a chunk holds of each tensor to its place."""
        start = chunk * CHUNK_BYTES
        requests: dict[str, list[Request]] = {}
        for spec in tensors_of(record, chunk):
            part, placed = self._pieces.get((record.block.name, spec.name), (None, None))
            if part is None or placed is None:
                continue  # shared
            first, last = max(spec.offset, start), min(spec.offset + spec.nbytes, start + len(data))
            where = len(part.header) + placed.begin + first - spec.offset
            requests.setdefault(part.file, []).append(Request(where, data[first - start : last - start]))
        for name, listed in requests.items():
            try:
                await move_all(self._out, self._open[name].write, listed)
            except OSError as error:
                raise self._failed(error, "writing", name) from error

    async def _publish(self) -> None:
        try:
            await self._out.save(await self._naming.make(INDEX), encode_index(self._parts), sync=True)
        except OSError as error:
            raise self._failed(error, "writing", INDEX) from error
        try:
            left = await self._naming.publish(self._exported.files)
        except OSError as error:
            raise self._failed(error, "naming", INDEX) from error
        self._exported.notes.extend(f"{name}, which was replaced, could not be removed" for name in left)

    async def undo(self, made: bool) -> None:
        """After a failure: leave `out` as it was. Failures of this are not worth more than the first one."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                await file.close()
        await self._naming.undo()
        if made:
            with contextlib.suppress(OSError):
                await self._out.remove_directory(self._options.out)

    async def _close(self) -> None:
        for name, file in self._open.items():
            try:
                await file.close()
            except OSError as error:
                raise self._failed(error, "closing", name) from error

    def _failed(self, error: OSError, doing: str, name: str) -> Exception:
        failure = io_error(error, f"{doing} the export", path=os.path.join(self._options.out, name))
        return type(failure)(failure.problem, remedy="free space or choose another place for OUT", **failure.details)
