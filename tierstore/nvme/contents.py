"""What a directory holds, as plain data: generations, blocks, tensors, and what takes which part of the drive.

Only names, lengths and manifests are looked at; whether payloads are right is what `verify` tells. The JSON (`Contents.to_json`) is
documented in FORMAT.md; names are added to it, never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tierstore.catalog import STATE_PREFIXES
from tierstore.nvme import names
from tierstore.nvme.files import Files
from tierstore.nvme.manifest import FORMAT, Record
from tierstore.nvme.reading import View, check_file, look
from tierstore.nvme.recovery import read_holder
from tierstore.nvme.verify import no_generation, problems_of

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class BlockRow:
    """One block of a generation.

    Attributes:
        record: As the manifest has it.
        state: Training state, by its name; see `catalog.STATE_PREFIXES`.
        problem: What is wrong with its file, as far as its name and length tell.
    """

    record: Record
    state: bool
    problem: str | None

    @property
    def tensor_bytes(self) -> int:
        """Without what fills the gaps."""
        return sum(spec.nbytes for spec in self.record.block.tensors)

    @property
    def dtypes(self) -> list[str]:
        """Those of its tensors, the one with most bytes first."""
        nbytes: dict[str, int] = {}
        for spec in self.record.block.tensors:
            nbytes[spec.dtype] = nbytes.get(spec.dtype, 0) + spec.nbytes
        return sorted(nbytes, key=lambda dtype: (-nbytes[dtype], dtype))

    def to_json(self) -> dict[str, Any]:
        block, shard = self.record.block, self.record.shard
        return {
            "name": block.name,
            "state": self.state,
            "frozen": block.frozen,
            "single": block.single,
            "payload_bytes": block.nbytes,
            "tensor_bytes": self.tensor_bytes,
            "tensors": [
                {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "offset": spec.offset, "bytes": spec.nbytes}
                for spec in block.tensors
            ],
            "file": shard.file if self.record.adopted is None else None,
            "file_bytes": shard.file_bytes if self.record.adopted is None else None,
            "data_start": shard.data_start if self.record.adopted is None else None,
            "adopted": [file.path for file in self.record.adopted.files] if self.record.adopted is not None else None,
            "checksums": shard.chunks is not None,
            "problem": self.problem,
        }


@dataclass(slots=True)
class GenerationRow:
    """One generation.

    Attributes:
        committed: The manifest file's modification time, which a copy may not have kept.
        current: A store would open this one.
        problem: Why its manifest cannot be used.
        metadata: The user's.
        blocks: In the manifest's order.
    """

    generation: int
    committed: datetime
    current: bool = False
    problem: str | None = None
    metadata: Any = None
    blocks: list[BlockRow] = field(default_factory=list)

    @property
    def payload_bytes(self) -> int:
        return sum(row.record.block.nbytes for row in self.blocks)

    @property
    def damaged(self) -> bool:
        return self.problem is not None or any(row.problem for row in self.blocks)

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "committed": self.committed.isoformat(timespec="seconds"),
            "current": self.current,
            "damaged": self.damaged,
            "problem": self.problem,
            "payload_bytes": self.payload_bytes,
            "metadata": self.metadata,
            "blocks": [row.to_json() for row in self.blocks],
        }


@dataclass(frozen=True, slots=True)
class Share:
    """Some of the directory's files, and their lengths together."""

    files: int
    bytes: int


@dataclass(slots=True)
class Contents:
    """What `inspect` tells.

    Attributes:
        path: The directory.
        store: Which store it is; None if nothing was committed, or it cannot be told.
        conflict: Why it cannot be told.
        problems: What is wrong with the directory as a whole, `conflict` among it.
        doubt: Which generation, that cannot be read, the "unclear" shards may belong to.
        holder: The process that has it open, if it is one of this machine's.
        generations: Ascending.
        disk: By kind of file: "current shards" that the current generation needs, "older shards" that only others do, "left over" that
            none does, "unclear" that one which cannot be read may need, "manifests", "other" files of the store's, "foreign".
    """

    path: str
    store: str | None
    conflict: str | None
    holder: int | None
    generations: list[GenerationRow]
    disk: dict[str, Share]
    leftovers: list[str]
    foreign: list[str]
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    doubt: str | None = None

    @property
    def current(self) -> GenerationRow | None:
        return next((row for row in self.generations if row.current), None)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "format": FORMAT,
            "path": self.path,
            "store": self.store,
            "conflict": self.conflict,
            "open_in": {"pid": self.holder} if self.holder is not None else None,
            "current": self.current.generation if self.current else None,
            "generations": [row.to_json() for row in self.generations],
            "disk": {
                kind.replace(" ", "_"): {"files": share.files, "bytes": share.bytes} for kind, share in [*self.disk.items(), self.total()]
            },
            "leftovers": self.leftovers,
            "unclear": self.orphans,
            "foreign": self.foreign,
            "problems": self.problems,
        }

    def total(self) -> tuple[str, Share]:
        return "total", Share(sum(share.files for share in self.disk.values()), sum(share.bytes for share in self.disk.values()))


async def inspect(files: Files, path: str, *, generation: int | None = None) -> Contents:
    """Look at a directory, also beside the store that has it open.

    Args:
        path: Absolute; see `reading.absolute`.
        generation: Only this one.

    Raises:
        DirectoryError: Not a store's directory, or without that generation.
    """
    view = await look(files, path)
    holder = await read_holder(files, path) if names.HOLDER in view.files else None
    if generation is not None and generation not in view.manifest_bytes:
        raise no_generation(view, generation)
    rows = _generations(view)
    shown = rows if generation is None else [row for row in rows if row.generation == generation]
    return Contents(
        path,
        view.store,
        str(view.conflict) if view.conflict is not None else None,
        holder,
        shown,
        _disk(view),
        view.leftovers,
        view.foreign,
        problems_of(view),
        view.orphans,
        view.doubt,
    )


def _generations(view: View) -> list[GenerationRow]:
    rows = []
    current = view.opens
    for number in view.manifest_bytes:
        written_s = view.files[names.manifest_name(number)].modified_ns / 1e9
        row = GenerationRow(number, datetime.fromtimestamp(written_s, UTC), current=number == current)
        rows.append(row)
        if number not in view.manifests:
            row.problem = str(view.damaged[number] if number in view.damaged else view.newer[number])
            continue
        row.metadata = view.manifests[number].metadata
        for record in view.manifests[number].records:
            problem = check_file(view, record)
            state = record.block.name.startswith(STATE_PREFIXES)
            row.blocks.append(BlockRow(record, state, problem.what if problem is not None else None))
    return rows


def _disk(view: View) -> dict[str, Share]:
    claimed = {number: manifest.files for number, manifest in view.manifests.items()}
    current = claimed[max(claimed)] if claimed else set()
    older = set().union(*claimed.values()) - current
    leftovers = set(view.leftovers)
    kinds: dict[str, list[int]] = {
        kind: [] for kind in ("current shards", "older shards", "left over", "unclear", "manifests", "other", "foreign")
    }
    for name, status in view.files.items():
        if name in current:
            kind = "current shards"
        elif name in older:
            kind = "older shards"
        elif name in leftovers:
            kind = "left over"
        elif names.shard_number(name) is not None:
            kind = "unclear"
        elif names.manifest_generation(name) is not None:
            kind = "manifests"
        else:
            kind = "other" if names.is_ours(name) else "foreign"
        kinds[kind].append(status.nbytes)
    return {kind: Share(len(lengths), sum(lengths)) for kind, lengths in kinds.items()}
