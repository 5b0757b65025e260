"""The files of an export: which tensors go where, and under which names. Pure.

[Note: Files that are the export already]
A shard without fillers is, byte for byte, a file that an export could consist of: its header has the key `format` that readers ask
for, and one of ours that they pass over. Such a file can be shared instead of copied. A reflink shares its bytes until either side
is changed, so it is always tried. A hard link is the same file under a second name; that is safe from the store, which never
rewrites a file with more than one link, but not from whoever changes the export in place, so it must be asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tierstore.catalog import PAGE, TensorSpec, round_up
from tierstore.errors import TensorError
from tierstore.nvme.manifest import Record
from tierstore.nvme.safetensors import LENGTH_BYTES, stored_shape

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
"""A model in one file. Readers take it before an index, so an export beside it would not be seen."""

_PART = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_export(name: str) -> bool:
    """Whether a file is one that an export consists of, or that would be read in its place."""
    return name in (INDEX, WHOLE) or _PART.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor's place in an export: bytes from the start of its file's data."""

    name: str
    record: Record
    spec: TensorSpec
    begin: int


@dataclass(slots=True)
class Part:
    """One file of an export.

    Attributes:
        tensors: In the manifest's order.
        same_as: The shard that is this file already.
        header: Its first bytes.
    """

    tensors: list[Placed]
    same_as: Record | None = None
    header: bytes = b""
    file: str = ""

    @property
    def tensor_bytes(self) -> int:
        return sum(placed.spec.nbytes for placed in self.tensors)


def tensor_names(records: Sequence[Record]) -> tuple[dict[tuple[str, str], str], bool]:
    """What each tensor is called in the export, by block and tensor, and whether blocks' names had to come before theirs.

    Raises:
        TensorError: Two would have the same name all the same.
    """
    pairs = [(record, spec.name) for record in records for spec in record.block.tensors]
    qualified = len({name for _, name in pairs}) < len(pairs)
    called: dict[tuple[str, str], str] = {}
    taken: dict[str, tuple[str, str]] = {}
    for record, name in pairs:
        block = record.block.name
        full = f"{block}.{name}" if qualified and not record.block.single else name
        if full in taken:
            raise TensorError(
                f"two tensors would be exported as {full!r}: {name!r} of block {block!r}, and {taken[full][1]!r} of {taken[full][0]!r}",
                remedy="leave one of the blocks out with --exclude",
                block=block,
                tensor=name,
            )
        called[block, name] = full
        taken[full] = (block, name)
    return called, qualified


def lay_out(records: Sequence[Record], called: dict[tuple[str, str], str], *, max_bytes: int, apart: bool) -> list[Part]:
    """Distribute tensors over files, in the manifest's order.

    Args:
        records: Blocks to export.
        called: From `tensor_names`.
        max_bytes: Tensor bytes of one file.
        apart: Blocks whose shards are export files already have a file each.
    """
    groups: list[list[tuple[Record, TensorSpec]]] = [[]]
    filled = 0
    for record in records:
        alone = apart and _is_export(record, called)
        for index, spec in enumerate(record.block.tensors):
            begins = index == 0 if alone else bool(groups[-1]) and filled + spec.nbytes > max_bytes
            if begins and groups[-1]:
                groups.append([])
                filled = 0
            groups[-1].append((record, spec))
            filled += spec.nbytes
        if alone:
            groups.append([])
            filled = 0
    parts = [_part(group, called) for group in groups if group]
    for number, part in enumerate(parts, 1):
        part.file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
    return parts


def _part(group: Sequence[tuple[Record, TensorSpec]], called: dict[tuple[str, str], str]) -> Part:
    places = dict(_places([spec for _, spec in group]))
    part = Part([Placed(called[record.block.name, spec.name], record, spec, places[index]) for index, (record, spec) in enumerate(group)])
    record = group[0][0]
    if len(group) == len(record.block.tensors) and all(other is record for other, _ in group) and _is_export(record, called):
        part.same_as = record
    part.header = _header(part.tensors)
    return part


def _places(specs: Sequence[TensorSpec]) -> Iterator[tuple[int, int]]:
    """(index, begin) of each: one behind the other, wider items first if some would otherwise not be aligned to their size."""
    order = list(range(len(specs)))
    begins = [0]
    for spec in specs:
        begins.append(begins[-1] + spec.nbytes)
    if any(begin % specs[index].item_bytes for index, begin in enumerate(begins[:-1])):
        order.sort(key=lambda index: -specs[index].item_bytes)
    begin = 0
    for index in order:
        yield index, begin
        begin += specs[index].nbytes


RENAMED, FILLERS, REFUSED = "with renamed tensors", "with gaps between tensors", "that the file system does not share"
IN_MODEL = "that lie in model files"
"""Why a block's shard is no file of an export."""


def _is_export(record: Record, called: dict[tuple[str, str], str]) -> bool:
    """Whether the shard is a file of an export as it is."""
    return why_no_export(record, called) is None


def why_no_export(record: Record, called: dict[tuple[str, str], str]) -> str | None:
    block = record.block
    if record.adopted is not None:
        return IN_MODEL
    if any(called[block.name, spec.name] != spec.name for spec in block.tensors):
        return RENAMED
    return FILLERS if sum(spec.nbytes for spec in block.tensors) != block.nbytes else None


def _header(tensors: Sequence[Placed]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for placed in tensors:
        spec = placed.spec
        shape, offsets = stored_shape(spec.dtype, spec.shape), (placed.begin, placed.begin + spec.nbytes)
        header[placed.name] = {"dtype": spec.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = round_up(LENGTH_BYTES + len(text), PAGE) - LENGTH_BYTES
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def encode_index(parts: Sequence[Part]) -> bytes:
    weight_map = {placed.name: part.file for part in parts for placed in part.tensors}
    index = {"metadata": {"total_size": sum(part.tensor_bytes for part in parts)}, "weight_map": weight_map}
    return json.dumps(index, ensure_ascii=False, indent=2).encode("utf-8") + b"\n"
