"""Reads everything that a directory holds, and says what is right and what is damaged, down to the tensor.

The report as JSON (`Report.to_json`) is documented in FORMAT.md; names are added to it, never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tierstore.errors import DirectoryError
from tierstore.nvme import names
from tierstore.nvme.files import Files
from tierstore.nvme.manifest import Record
from tierstore.nvme.reading import Problem, Reading, View, chunk_bytes, file_of, lock, look
from tierstore.nvme.recovery import some
from tierstore.units import format_bytes

SCHEMA = 1


@dataclass(slots=True)
class BlockDamage:
    """What is wrong with one block's shard.

    Attributes:
        problems: One clause each, about the file.
        tensors: Those that cannot be trusted, in payload order. None of them: the damage is in bytes that mean nothing.
        whole: All of the block's tensors.
        within_bytes: How many bytes the damage lies in, where it can be told: one checksum is for up to 16 MiB, whosever they are.
    """

    block: str
    file: str
    problems: list[str]
    tensors: list[str]
    whole: bool
    within_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"block": self.block, "file": self.file, "problems": self.problems, "tensors": self.tensors}


@dataclass(slots=True)
class GenerationReport:
    """One generation.

    Attributes:
        problem: Why the generation cannot be read at all.
        damaged: Blocks with something wrong, in the manifest's order.
        unchecked: Blocks that were written with `checksum=False`, or adopted and not read before the commit: their payload was read, and
            there is nothing to compare it with.
    """

    generation: int
    num_blocks: int = 0
    payload_bytes: int = 0
    problem: str | None = None
    damaged: list[BlockDamage] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return self.problem is None and not self.damaged

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "whole": self.whole,
            "blocks": self.num_blocks,
            "payload_bytes": self.payload_bytes,
            "problem": self.problem,
            "damaged": [damage.to_json() for damage in self.damaged],
            "unchecked": self.unchecked,
        }


@dataclass(slots=True)
class Report:
    """What `verify` found.

    Attributes:
        path: The directory.
        store: Which store it is; None if nothing was committed, or it cannot be told.
        generations: Ascending.
        problems: What is wrong with the directory as a whole.
        notes: What is no damage, and worth knowing.
        foreign: Files that are not the store's: none opens the directory while they are there.
        opens: The generation that a store goes on from.
        warns: It says then that a newer one, or `CURRENT`, is damaged or missing.
        next_commit: What its next commit does about damage outside of that generation's blocks; one clause each.
        read_bytes: Payload bytes read.
        num_shards: Files that they came from.
    """

    path: str
    store: str | None = None
    generations: list[GenerationReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    opens: int | None = None
    warns: bool = False
    next_commit: list[str] = field(default_factory=list)
    read_bytes: int = 0
    num_shards: int = 0

    @property
    def good(self) -> bool:
        return not self.problems and all(generation.whole for generation in self.generations)

    @property
    def whole(self) -> list[int]:
        """Generations that are undamaged."""
        return [generation.generation for generation in self.generations if generation.whole]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "path": self.path,
            "store": self.store,
            "good": self.good,
            "generations": [generation.to_json() for generation in self.generations],
            "whole_generations": self.whole,
            "problems": self.problems,
            "notes": self.notes,
            "foreign": self.foreign,
            "shards_read": self.num_shards,
            "payload_bytes_read": self.read_bytes,
        }


Begin = Callable[[int], Callable[[int], None]]
"""Told how many payload bytes there are to read; returns what is told of each part that is done."""


async def verify(files: Files, path: str, *, generation: int | None = None, begin: Begin | None = None) -> Report:
    """Read all shards of all generations, each once, and check every byte that has a checksum.

    Args:
        path: Absolute; see `reading.absolute`.
        generation: Only this one.
        begin: For a display of progress.

    Raises:
        BusyError: A store has the directory open.
        DirectoryError: Not a store's, of a newer format, or without that generation.
        TransferError: The drive does not answer.
    """
    await look(files, path)  # before anything else: what is no store's directory is not locked either
    held, unlocked = await lock(files, path)
    try:
        view = await look(files, path)
        if view.newer and (generation is None or generation in view.newer):
            raise next(reversed(view.newer.values()))
        report = Report(path, view.store, foreign=view.foreign, opens=view.opens, warns=view.warns, next_commit=_next_commit(view))
        report.problems = problems_of(view)
        report.notes = [*([unlocked] if unlocked else []), *notes_of(view)]
        await _check_generations(files, view, report, _chosen(view, generation), begin)
        return report
    finally:
        if held is not None:
            held.release()


def _chosen(view: View, generation: int | None) -> list[int]:
    if generation is None:
        return sorted(view.manifest_bytes)
    if generation not in view.manifest_bytes:
        raise no_generation(view, generation)
    return [generation]


def no_generation(view: View, generation: int) -> DirectoryError:
    available = tuple(sorted(view.manifest_bytes))
    lost = bool(problems_of(view)) and not available
    return DirectoryError(
        f"generation {generation} is not in {view.path}",
        need=f"generation {generation}",
        have=f"generations {', '.join(map(str, available))}" if available else "no manifest" if lost else "no commit",
        remedy="choose one of those" if available else "restore the manifest from a backup" if lost else "commit first",
        path=view.path,
        available=available,
    )


def problems_of(view: View) -> list[str]:
    """What is wrong with the directory as a whole."""
    problems = []
    if view.conflict is not None:
        problems.append(str(view.conflict))
    if view.hint_damaged:
        problems.append(f"{names.CURRENT} is damaged" + ("; it is only a hint, and the next commit writes it anew" if view.opens else ""))
    if view.missing is not None:
        problems.append(f"generation {view.missing} was committed, and its manifest is missing")
    described: dict[str, Record] = {}
    problems.extend(
        f"generation {generation} and an older one disagree about {record.shard.file}"
        for generation, manifest in view.manifests.items()
        for record in manifest.records
        if record.adopted is None
        if described.setdefault(record.shard.file, record) != record
    )
    return problems


def _next_commit(view: View) -> list[str]:
    """See `Report.next_commit`."""
    does = []
    listed = some(list(map(str, sorted(view.damaged))), ", ")
    if view.damaged:
        manifests = f"manifest of generation {listed}" if len(view.damaged) == 1 else f"manifests of generations {listed}"
        does.append(f"removes the damaged {manifests}")
    if view.hint_damaged:
        does.append(f"writes {names.CURRENT} anew")
    if view.orphans:
        one = "the shard that may" if len(view.orphans) == 1 else "the shards that may"
        does.append(f"deletes {one} belong to {'it' if view.damaged and view.missing is None else view.doubt}")
    return does


def notes_of(view: View) -> list[str]:
    """What lies in the directory beside what its generations need."""
    notes = []
    nothing = not (view.manifest_bytes or view.hint_damaged or view.missing)
    if nothing:
        notes.append("nothing has been committed yet")
    if view.orphans:
        stay = "until the next commit" if view.opens else "as no store opens the directory"
        notes.append(f"{_shards(view, view.orphans)} that may belong to {view.doubt}: kept {stay}")
    left = view.leftovers
    if nothing and view.unclaimed:
        notes.append(f"{_shards(view, view.unclaimed)} that no manifest names: opening the directory as a store deletes them")
        left = [name for name in left if name not in view.unclaimed]
    if left:
        nbytes = format_bytes(view.bytes_of(left))
        notes.append(f"files that no generation needs, {nbytes} in all, which the next opening deletes: {some(left, ', ')}")
    if view.foreign:
        notes.append(f"files that are not the store's: {some(view.foreign, ', ')}")
    notes += [f"{path} was written to since it was adopted: only blocks that were read before can be checked" for path in view.touched]
    return notes


def _shards(view: View, listed: list[str]) -> str:
    return f"{len(listed)} shard{'s' * (len(listed) != 1)} ({format_bytes(view.bytes_of(listed))})"


async def _check_generations(files: Files, view: View, report: Report, chosen: list[int], begin: Begin | None) -> None:
    problems: dict[Record, list[Problem]] = {}
    records = dict.fromkeys(record for number in reversed(chosen) if number in view.manifests for record in view.manifests[number].records)
    progress = begin(sum(record.block.nbytes for record in records)) if begin is not None else None
    reading = Reading(files, view, lambda record, problem: problems.setdefault(record, []).append(problem), progress=progress)
    await reading.run(records)
    report.read_bytes, report.num_shards = reading.read_bytes, len(records)
    for number in chosen:
        generation = GenerationReport(number)
        report.generations.append(generation)
        if number not in view.manifests:
            generation.problem = str(view.damaged[number] if number in view.damaged else view.newer[number])
            continue
        for record in view.manifests[number].records:
            generation.num_blocks += 1
            generation.payload_bytes += record.block.nbytes
            if record in problems:
                generation.damaged.append(_damage(record, problems[record]))
            if record.shard.chunks is None:
                generation.unchecked.append(record.block.name)


def _damage(record: Record, problems: list[Problem]) -> BlockDamage:
    harmed = {name for problem in problems for name in problem.harms}
    tensors = [spec.name for spec in record.block.tensors if spec.name in harmed]
    ordered = sorted(problems, key=lambda problem: -1 if problem.chunk is None else problem.chunk)
    chunks = {problem.chunk for problem in problems}
    within = None if None in chunks else sum(chunk_bytes(record, chunk) for chunk in chunks if chunk is not None)
    whole = len(tensors) == len(record.block.tensors)
    return BlockDamage(record.block.name, file_of(record), [problem.what for problem in ordered], tensors, whole, within)
