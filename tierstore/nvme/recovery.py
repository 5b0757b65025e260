"""What a directory holds when it is opened, and which generation to go on from.

[Note: Which generation counts]
The highest whose manifest is there and matches its checksum. `CURRENT` is a hint, used only to say that a commit is missing.
A manifest appears under its name only after the shards it names are durable, and disappears durably before the first of them
is rewritten; so a valid manifest means intact shards, however the last process ended.

[Note: Which store this is]
Every manifest and `CURRENT` say it, with 64 bits that were drawn when the directory was new. So another store's file that was put
here by mistake is told, though it is whole and names shards of the same names. `CURRENT` decides what is the directory's own, if it
is whole; a crash may have come before there was one, and then the manifests must agree. Another store's manifest counts as damaged.
If `CURRENT` and all manifests differ, any of them may be the one that was exchanged, so nothing is opened: who knows says so by
deleting the wrong ones.

[Note: What is not thrown away]
A manifest that is damaged, or that `CURRENT` promises and is missing, may be mended or restored by hand. Which shards it needs
cannot be told, so while there is such a one no shard is deleted because nobody claims it: not before the next commit. The same
where `CURRENT` is damaged and promises who knows what.

[Note: Nothing is opened before it was looked at]
Under a name of the store's there may be anything: a pipe, whose opening never returns; another name of somebody's file. So what
is not a plain file is refused before it is opened, and whatever the store writes goes to a file that it makes itself.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tierstore.errors import DirectoryError, ShardError
from tierstore.nvme import model_files, names, windows
from tierstore.nvme.adopted import ModelFile
from tierstore.nvme.files import Files, FileStat
from tierstore.nvme.locks import MAX_HOLDER_BYTES, living_holder
from tierstore.nvme.manifest import MAX_MANIFEST_BYTES, Hint, Manifest, Record, decode_hint, decode_manifest
from tierstore.nvme.shards import RESTORE, Entry, Shard, io_error

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Found:
    """A directory's contents.

    Attributes:
        files: Every file and what it is, without those that are ignored (`names.IGNORED`).
        manifests: The valid ones by generation.
        damaged: Why each other one cannot be used.
        manifest_bytes: Length of each manifest file, valid or not.
        hint: The generation `CURRENT` names.
        hint_damaged: `CURRENT` is there, and names none.
        store: Which one this is; None if nobody says.
        conflict: Why that cannot be told. There is no valid manifest then.
    """

    files: dict[str, FileStat] = field(default_factory=dict)
    manifests: dict[int, Manifest] = field(default_factory=dict)
    damaged: dict[int, ShardError] = field(default_factory=dict)
    manifest_bytes: dict[int, int] = field(default_factory=dict)
    hint: int | None = None
    hint_damaged: bool = False
    store: str | None = None
    conflict: ShardError | None = None


def check_name(path: str) -> None:
    """Refuse what Windows would take for a device, or for another name.

    Raises:
        DirectoryError: A part of the path is such a name.
    """
    part = windows.reserved_part(path)
    if part is not None:
        raise DirectoryError(
            f"{path} cannot be a directory on Windows, which keeps the name {part!r} for itself",
            need="a name that is no device's (CON, NUL, COM1, ...), ends neither in a dot nor in a space, and has none of <>:\"|?*",
            have=repr(part),
            remedy="name another directory",
            path=path,
        )


async def check_place(files: Files, path: str) -> None:
    """Make the directory if it is absent; refuse what is not a store's.

    Raises:
        DirectoryError: Not a directory, not accessible, or with foreign files in it.
    """
    try:
        status = await files.stat(path)
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise unusable(path, error) from error
    try:
        if status is None:
            await files.make_directory(path)
        elif not status.directory:
            raise DirectoryError(f"{path} is not a directory", remedy="name a directory of the store's own", path=path)
        present = [name for name in await files.listdir(path) if not names.is_ignored(name)]
    except OSError as error:
        raise unusable(path, error) from error
    foreign = sorted(name for name in present if not names.is_ours(name))
    if not foreign and not any(name == names.LOCK or names.manifest_generation(name) is not None for name in present):
        foreign = sorted(name for name in present if names.shard_number(name) is not None)
    if foreign:
        raise DirectoryError(
            f"{path} holds files that are not the store's",
            need="an empty directory, or one that a store made",
            have=some(list(map(repr, foreign)), ", "),
            remedy="name another directory, or move these files away",
            path=path,
            foreign=tuple(foreign),
        )
    # The others are looked at with the lock held, in `survey`; these are opened before.
    first = [name for name in (names.LOCK, names.HOLDER) if name in present]
    _refuse_odd(path, {name: status for name in first if (status := await _look(files, os.path.join(path, name))) is not None})


async def _look(files: Files, path: str) -> FileStat | None:
    """None if it has gone: a store that is just closing removes files."""
    try:
        return await files.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unusable(path, error) from error


def _refuse_odd(path: str, present: Mapping[str, FileStat]) -> None:
    """See [Note: Nothing is opened before it was looked at]."""
    odd = sorted(name for name, status in present.items() if not status.regular)
    if odd:
        raise DirectoryError(
            f"{path} holds a link, a directory or a device under a name of the store's",
            need="plain files",
            have=some(odd, ", "),
            remedy="remove it",
            path=path,
            foreign=tuple(odd),
        )


async def clear_holder(files: Files, path: str) -> None:
    """Remove what a killed process said about itself, so that nobody takes it for ours. The lock is held.

    Raises:
        DirectoryError: It cannot be removed.
    """
    holder = os.path.join(path, names.HOLDER)
    try:
        await files.unlink(holder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise unusable(path, error) from error


def some(items: Sequence[str], separator: str) -> str:
    """The first few of a list that may be long."""
    return separator.join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def unusable(path: str, error: OSError) -> DirectoryError:
    problem = f"{path} cannot be used as a directory ({error.strerror or error})"
    return DirectoryError(problem, remedy="make it readable and writable", path=path)


async def scan(files: Files, path: str) -> dict[str, FileStat]:
    """Every name in a directory that means anything to a store, and what it is."""
    return {name: status for name, status in (await files.scan(path)).items() if not names.is_ignored(name)}


async def survey(files: Files, path: str) -> Found:
    """Read and check all manifests, and stat every file. The lock is held.

    Raises:
        DirectoryError: Something that is not a plain file, or a manifest of a newer format.
        TransferError: A read failed.
    """
    found = Found()
    found.files = await scan(files, path)
    _refuse_odd(path, found.files)
    for name, status in sorted(found.files.items()):
        generation = names.manifest_generation(name)
        if generation is not None:
            found.manifest_bytes[generation] = status.nbytes
            await _read_manifest(files, path, name, generation, status, found)
    if names.CURRENT in found.files:
        hint = await read_hint(files, path, found.files)
        found.hint_damaged = hint is None
    else:
        hint = None
    for generation, error in settle_store(found, path, hint).items():
        where = os.path.join(path, names.manifest_name(generation))
        found.damaged[generation] = _cannot_open(where, generation, error)
    return found


async def _read_manifest(files: Files, path: str, name: str, generation: int, status: FileStat, found: Found) -> None:
    where = os.path.join(path, name)
    try:
        found.manifests[generation] = await load_manifest(files, where, generation, status.nbytes)
    except ShardError as error:
        found.damaged[generation] = _cannot_open(where, generation, error)
    except OSError as error:
        raise io_error(error, "reading the manifest", path=where) from error


def _cannot_open(where: str, generation: int, error: ShardError) -> ShardError:
    return ShardError(
        f"generation {generation} cannot be opened ({where}): {error}",
        remedy=RESTORE,
        path=where,
        generation=generation,
        block=None,
    )


def settle_store(found: Found, path: str, hint: Hint | None) -> dict[int, ShardError]:
    """Find out which store this is, and take out the manifests of others. See [Note: Which store this is].

    Args:
        found: `hint`, `store` and `conflict` are set.
        path: The directory.
        hint: What `CURRENT` says; None if it is not there or damaged.

    Returns:
        What is wrong with each manifest that was taken out, by generation.
    """
    found.hint = hint.generation if hint is not None else None
    said = {manifest.store for manifest in found.manifests.values()}
    if hint is not None and (hint.store in said or not said):
        found.store = hint.store
    elif hint is None and len(said) <= 1:
        found.store = next(iter(said), None)
    else:
        found.conflict = _conflict(found, path, hint)
    wrong: dict[int, ShardError] = {}
    for generation, manifest in sorted(found.manifests.items()):
        if manifest.store != found.store:
            if found.store is None:
                wrong[generation] = ShardError("which store the directory is cannot be told", have=f"a manifest of store {manifest.store}")
            else:
                need, have = f"store {found.store}", f"store {manifest.store}"
                wrong[generation] = ShardError("the manifest belongs to another store", need=need, have=have)
            del found.manifests[generation]
    return wrong


def _conflict(found: Found, path: str, hint: Hint | None) -> ShardError:
    files: dict[str, list[str]] = {}
    for generation, manifest in sorted(found.manifests.items()):
        files.setdefault(manifest.store, []).append(names.manifest_name(generation))
    said = [f"{some(listed, ', ')} of store {store}" for store, listed in files.items()]
    if hint is not None:
        remedy = f"restore the manifest of store {hint.store} from a backup; or delete {names.CURRENT}, if it is not this directory's"
        said.insert(0, f"{names.CURRENT} of store {hint.store}")
    else:
        remedy = f"restore {names.CURRENT} from a backup; or move the manifests away that are not this directory's"
    return ShardError(
        f"{path} holds files of different stores, and which of them it is cannot be told",
        need=f"{names.CURRENT} and manifests of one store",
        have=some(said, "; "),
        remedy=remedy,
        path=path,
        block=None,
        stores=tuple(dict.fromkeys([*([hint.store] if hint is not None else []), *files])),
    )


async def load_manifest(files: Files, where: str, generation: int, nbytes: int) -> Manifest:
    """Read and check one manifest of that length.

    Raises:
        ShardError: It is damaged, or another generation's.
        DirectoryError: A newer version of tierstore wrote it.
        OSError: The read failed.
    """
    if nbytes > MAX_MANIFEST_BYTES:
        raise ShardError("the manifest is too long", need=f"at most {MAX_MANIFEST_BYTES} bytes", have=nbytes)
    manifest = await files.work(decode_manifest, await files.load(where, nbytes))
    if manifest.generation != generation:
        raise ShardError("the manifest is another generation's", need=generation, have=manifest.generation)
    return manifest


async def read_hint(files: Files, path: str, present: Mapping[str, FileStat]) -> Hint | None:
    """What `CURRENT` says; None if it is not there, damaged, or cannot be read."""
    status = present.get(names.CURRENT)
    if status is None or not status.regular:
        return None
    try:
        return decode_hint(await files.load(os.path.join(path, names.CURRENT), 256))
    except OSError:
        return None


async def read_holder(files: Files, path: str) -> int | None:
    """The process that has the directory open; None where no process that is alive says so."""
    where = os.path.join(path, names.HOLDER)
    try:
        return living_holder(await files.load(where, MAX_HOLDER_BYTES)) if (await files.stat(where)).regular else None
    except OSError:
        return None


def choose(found: Found, path: str, generation: int | None) -> Manifest | None:
    """The manifest to go on from; None for an empty directory. See [Note: Which generation counts].

    Raises:
        DirectoryError: `generation` is not there.
        ShardError: It is damaged, or all are, or they are of different stores.
    """
    if found.conflict is not None:
        raise found.conflict
    if generation is not None:
        if generation in found.damaged:
            raise found.damaged[generation]
        if generation not in found.manifests:
            raise DirectoryError(
                f"generation {generation} is not in {path}",
                need=f"generation {generation}",
                have=f"generations {', '.join(map(str, sorted(found.manifests)))}" if found.manifests else "no commit",
                remedy="choose one of those, or leave generation= out",
                path=path,
                available=tuple(sorted(found.manifests)),
            )
        return found.manifests[generation]
    if not found.manifests:
        if found.damaged:
            raise found.damaged[max(found.damaged)]
        if found.hint is not None:
            problem = f"the manifest of generation {found.hint} is missing from {path}"
            raise ShardError(problem, remedy="restore it from a backup", path=path, block=None)
        if found.hint_damaged:
            problem = f"{names.CURRENT} says that {path} held a commit, but is damaged itself, and there is no manifest"
            raise ShardError(problem, remedy="restore the manifest from a backup", path=path, block=None)
        return None
    newest = max(found.manifests)
    lost = max([*found.damaged, found.hint or 0])
    if lost > newest:
        log.warning("generation %d of %s is damaged or missing: going on from generation %d", lost, path, newest)
    elif found.hint_damaged:
        log.warning("%s of %s is damaged: going on from generation %d, the newest there is", names.CURRENT, path, newest)
    return found.manifests[newest]


def next_numbers(found: Found) -> tuple[int, int]:
    """Numbers that nothing in the directory has, nor any manifest promises: (shard, generation)."""
    numbers = [number for name in found.files if (number := names.shard_number(name)) is not None]
    shard = max([1, *(number + 1 for number in numbers), *(manifest.next_shard for manifest in found.manifests.values())])
    generation = max([0, found.hint or 0, *found.manifest_bytes]) + 1
    return shard, generation


def doubts(found: Found, chosen: Manifest | None) -> bool:
    """Whether a generation may be there that cannot be read now; see [Note: What is not thrown away]."""
    return bool(found.damaged) or found.hint_damaged or (found.hint or 0) > (0 if chosen is None else max(found.manifests))


def check_shards(found: Found, path: str, manifest: Manifest) -> None:
    """Every shard of the manifest must be there with its length; its bytes are checked when they are read.

    Raises:
        ShardError: Naming the blocks whose shards are not.
    """
    bad: list[str] = []
    bad_blocks: list[str] = []
    for record in manifest.records:
        if record.adopted is not None:
            continue
        status = found.files.get(record.shard.file)
        if status is not None and status.nbytes == record.shard.file_bytes:
            continue
        what = "is missing" if status is None else f"has {status.nbytes} bytes instead of {record.shard.file_bytes}"
        bad.append(f"block {record.block.name!r}: {record.shard.file} {what}")
        bad_blocks.append(record.block.name)
    if bad:
        others = sorted(set(found.manifests) - {manifest.generation})
        raise ShardError(
            f"generation {manifest.generation} of {path} is damaged: {some(bad, '; ')}",
            remedy=f"open an older generation (generation={others[-1]})" if others else "restore the files from a backup",
            path=path,
            generation=manifest.generation,
            block=bad_blocks[0],
            blocks=tuple(bad_blocks),
            available=tuple(others),
        )


async def check_models(files: Files, path: str, manifest: Manifest) -> dict[ModelFile, ModelFile | str]:
    """Look again at every model file that adopted blocks lie in, and warn of those that are others: see `model_files.look_again`.

    Nothing is refused: what lies elsewhere, adapters above all, is to be had whatever has become of a model's files. Blocks in files that
    are others are refused when they are read.
    """
    adopted = [(record, record.adopted) for record in manifest.records if record.adopted is not None]
    now = {file: await model_files.look_again(files, file) for file in dict.fromkeys(file for _, one in adopted for file in one.files)}
    whose = {file: [record for record, one in adopted if file in one.files] for file in now}
    different = {file.path: what for file, what in now.items() if isinstance(what, str)}
    if different:
        blocks = [record.block.name for record, one in adopted if any(file.path in different for file in one.files)]
        log.warning(
            "generation %d of %s needs model files that are not what they were: %s. "
            "All other blocks can be used; these %d cannot until the files are as they were: %s",
            manifest.generation,
            path,
            some([f"{where} {what}" for where, what in different.items()], "; "),
            len(blocks),
            some(list(map(repr, blocks)), ", "),
        )
    for file, found in now.items():
        if isinstance(found, str) or found == file:
            continue
        unknown = [record.block.name for record in whose[file] if record.shard.chunks is None]
        if unknown:
            message = (
                "%s was written to since it was adopted. Its header is the same, but %d blocks in it have no checksums, and "
                "cannot be checked: %s. Go on only if you know that it is the same model"
            )
            log.warning(message, file.path, len(unknown), some(list(map(repr, unknown)), ", "))
        else:
            log.info(
                "%s has another time than when it was adopted, and the same header: its blocks are checked as they are read", file.path
            )
    return now


def link_shards(
    found: Found, path: str, chosen: Manifest | None, models: Mapping[ModelFile, ModelFile | str]
) -> tuple[dict[str, Shard], dict[int, list[Entry]]]:
    """One `Shard` per file, however many generations share it: (by file name, entries per generation).

    `models` says what has become of the chosen generation's model files, as `check_models` has it. That generation has passed
    `check_shards`. Any other whose manifest contradicts it, a newer one or the files is damaged, and moves there. Files that are only
    missing are left for who opens that generation.
    """
    for generation, wrong in contradictions(found, chosen).items():
        where = os.path.join(path, names.manifest_name(generation))
        found.damaged[generation] = ShardError(
            f"generation {generation} cannot be opened ({where}): {wrong.shard.file} is not what it says",
            remedy="open another generation, or restore the directory from a backup",
            path=where,
            generation=generation,
            block=wrong.block.name,
        )
        log.warning("%s", found.damaged[generation])
        del found.manifests[generation]
    shards: dict[str, Shard] = {}
    entries: dict[int, list[Entry]] = {}
    for manifest in _chosen_first(found, chosen):
        entries[manifest.generation] = []
        for record in manifest.records:
            file = record.shard.file
            if record.adopted is not None:
                shard = Shard.of_model(record.block, record.adopted, record.shard.chunks)
                shard.look_again(models if manifest is chosen else {})
                shard.references += 1
                entries[manifest.generation].append(Entry(record.block, shard))
            elif file in found.files:
                shard = shards.get(file) or shards.setdefault(file, Shard.from_record(record.block, record.shard))
                shard.references += 1
                entries[manifest.generation].append(Entry(record.block, shard))
    return shards, entries


def contradictions(found: Found, chosen: Manifest | None) -> dict[int, Record]:
    """What is first wrong with each generation that contradicts the chosen one, a newer one or the lengths of the files."""
    described: dict[str, Record] = {}
    contradicting: dict[int, Record] = {}
    for manifest in _chosen_first(found, chosen):
        records = [record for record in manifest.records if record.shard.file in found.files]
        wrong = next((record for record in records if _contradicts(record, described, found)), None)
        if wrong is not None:
            contradicting[manifest.generation] = wrong
        else:
            described.update((record.shard.file, record) for record in records)
    return contradicting


def _chosen_first(found: Found, chosen: Manifest | None) -> list[Manifest]:
    return sorted(found.manifests.values(), key=lambda one: (one is chosen, one.generation), reverse=True)


def _contradicts(record: Record, described: Mapping[str, Record], found: Found) -> bool:
    file = record.shard.file
    return described.get(file, record) != record or found.files[file].nbytes != record.shard.file_bytes
