"""The manifest: one JSON file per generation that says which shard holds which block.

[Note: The manifest's frame]
The file is a JSON object whose last member is `checksum`, xxh3_64 of every byte before `,"checksum":`. Every format version
keeps that frame, so that a damaged manifest is told from one that a newer version wrote. One line per block. `CURRENT` has the same
frame: it says which store the directory is, and damage must not look like another store's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeGuard

from tierstore.catalog import FILLER_PREFIX, ITEM_BYTES, PAGE, TENSOR_ALIGNMENT, Block, TensorSpec
from tierstore.errors import DirectoryError, OptionError, ShardError, SizeError
from tierstore.nvme import names
from tierstore.nvme.adopted import Adopted, ModelFile
from tierstore.nvme.checksums import checksum, num_chunks
from tierstore.nvme.safetensors import LENGTH_BYTES, MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_SIZE, MAX_VALUES, num_values, read_object

FORMAT = 2
"""The newest version. What version 1 can say is written as such: version 2 has adopted blocks beside it, and the dtypes `NEW_DTYPES`."""

NEW_DTYPES = frozenset({"F4", "C64"})
MAX_MANIFEST_BYTES = 1 << 27
"""Of one that is read, and so of one that is written: some 200,000 blocks."""

MAX_METADATA_DEPTH = 100
"""Lists and objects within one another. How deep a parser can go depends on who calls it; what was committed must be read by all."""

_FRAME = re.compile(rb',"checksum":"([0-9a-f]{16})"\}\n')
_FRAME_BYTES = len(',"checksum":"0123456789abcdef"}\n')
_HEX = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard as a manifest describes it.

    Attributes:
        file: Its name in the directory.
        number: The running number in that name.
        file_bytes: `data_start` and the block's payload.
        data_start: Bytes of header, a multiple of 4096.
        chunks: xxh3_64 per 16 MiB of payload; None if it was written with `checksum=False`.
        digest: xxh3_64 over the header's xxh3_64 and `chunks`, 8 bytes each, little-endian.
    """

    file: str
    number: int
    file_bytes: int
    data_start: int
    chunks: tuple[int, ...] | None
    digest: int


@dataclass(frozen=True, slots=True)
class Record:
    """One block and its shard.

    Attributes:
        adopted: Where it lies in model files. Its `shard` has a payload's checksums then, and no file.
    """

    block: Block
    shard: ShardRecord
    adopted: Adopted | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest; `metadata` is the user's JSON value, `store` tells the directory from every other, see `is_identity`."""

    store: str
    generation: int
    next_shard: int
    metadata: Any
    records: tuple[Record, ...]

    @property
    def files(self) -> set[str]:
        """Names of all its shards."""
        return {record.shard.file for record in self.records if record.adopted is None}


@dataclass(frozen=True, slots=True)
class Hint:
    """What `CURRENT` says: which store the directory is, and its last commit."""

    store: str
    generation: int


def is_identity(value: object) -> TypeGuard[str]:
    """Whether this can tell one store from another: 64 bits as sixteen lower-case hexadecimal digits."""
    return isinstance(value, str) and _HEX.fullmatch(value) is not None


def _seal(body: bytes) -> bytes:
    """Complete an object that lacks its end. See [Note: The manifest's frame]."""
    return body + f',"checksum":"{checksum(body):016x}"}}\n'.encode("ascii")


def _unseal(data: bytes) -> bytes | None:
    """The object without its checksum; None if that is wrong."""
    body, frame = data[:-_FRAME_BYTES], _FRAME.fullmatch(data[-_FRAME_BYTES:])
    if frame is None or int(frame[1], 16) != checksum(body):
        return None
    return body + b"}"


def encode_hint(hint: Hint) -> bytes:
    return _seal(f'{{"generation":{hint.generation},"store":"{hint.store}"'.encode("ascii"))


def decode_hint(data: bytes) -> Hint | None:
    """None if it is damaged."""
    try:
        text = _unseal(data)
        fields = read_object(text, what=names.CURRENT) if text is not None else {}
    except ShardError:
        return None
    store, generation = fields.get("store"), fields.get("generation")
    if set(fields) != {"store", "generation"} or not is_identity(store) or type(generation) is not int:
        return None
    # Whoever wrote this must not use up the numbers.
    return Hint(store, generation) if 0 < generation <= names.MAX_NUMBER // 2 else None


def encode_metadata(metadata: object) -> str:
    """The user's metadata as JSON text.

    Raises:
        OptionError: It is not JSON: another type, a key that is not text, NaN or an infinity, a cycle; or it is nested too deep.
    """
    try:
        _check_nested(metadata, MAX_METADATA_DEPTH)
        return json.dumps(metadata, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(
            "commit metadata must be JSON",
            need=f"dicts with text keys, lists, text, finite numbers, bools, None, at most {MAX_METADATA_DEPTH} within one another",
            have=str(error)[:200],
            remedy="convert what is not, e.g. tensors with .tolist()",
        ) from None


def _check_nested(value: object, levels: int) -> None:
    if not isinstance(value, dict | list | tuple):
        return
    if not levels:
        raise ValueError("deeper nesting, or a cycle")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not text")
    for item in value.values() if isinstance(value, dict) else value:
        _check_nested(item, levels - 1)


def format_of(block: Block, adopted: Adopted | None) -> int:
    """The first version of the format that can say it."""
    return 2 if adopted is not None or any(spec.dtype in NEW_DTYPES for spec in block.tensors) else 1


def encode_record(record: Record) -> str:
    """One block's line. Pure; any thread."""
    block, shard = record.block, record.shard
    own = record.adopted is None
    fields = {
        "name": block.name,
        "payload_bytes": block.nbytes,
        "single": block.single,
        "frozen": block.frozen,
        "adopted": None if record.adopted is None else _encode_adopted(record.adopted),
        "tensors": [[spec.name, spec.dtype, list(spec.shape), spec.offset] for spec in block.tensors],
        "file": shard.file if own else None,
        "file_bytes": shard.file_bytes if own else None,
        "data_start": shard.data_start if own else None,
        "chunks": None if shard.chunks is None else [f"{chunk:016x}" for chunk in shard.chunks],
        "digest": f"{shard.digest:016x}" if own else None,
    }
    return json.dumps(fields, separators=(",", ":"))


def _encode_adopted(adopted: Adopted) -> dict[str, Any]:
    return {
        "files": [[file.path, file.nbytes, file.modified_ns, file.header_bytes, f"{file.header_sum:016x}"] for file in adopted.files],
        "places": [list(place) for place in adopted.places],
    }


def encode_manifest(store: str, generation: int, next_shard: int, metadata: str, records: Sequence[str], version: int = FORMAT) -> bytes:
    """The manifest's bytes, from `encode_metadata` and `encode_record`. Pure; any thread.

    Args:
        store, generation, next_shard, metadata, records: As in `Manifest`, encoded.
        version: Of the format: at least `format_of` every block.

    Raises:
        SizeError: No store would read one so long.
    """
    numbers = f'"generation":{generation},"next_shard":{next_shard}'
    head = f'{{"format":{version},"store":"{store}",{numbers},"metadata":{metadata},"blocks":[\n'
    body = (head + ",\n".join(records) + "\n]").encode("ascii")
    values = num_values(body)
    if len(body) + _FRAME_BYTES > MAX_MANIFEST_BYTES or values > MAX_VALUES:
        raise SizeError(
            "the commit's manifest would be longer than any store reads",
            need=f"at most {MAX_MANIFEST_BYTES} bytes and {MAX_VALUES} values",
            have=f"{len(body) + _FRAME_BYTES} bytes and {values} values, {len(metadata)} bytes of them metadata, for {len(records)} blocks",
            remedy="commit less metadata, or put fewer and larger blocks",
        )
    return _seal(body)


def decode_manifest(data: bytes) -> Manifest:
    """Check a manifest in full. See [Note: The manifest's frame].

    Raises:
        ShardError: It is damaged, or says what no manifest may say.
        DirectoryError: A newer version of tierstore wrote it.
    """
    text = _unseal(data)
    if text is None:
        raise ShardError("the manifest does not match its checksum")
    fields = read_object(text, what="manifest")
    version = fields.get("format")
    if type(version) is int and version > FORMAT:
        raise DirectoryError(
            f"the directory has format {version}, written by a newer tierstore",
            need=f"format {FORMAT}",
            have=f"format {version}",
            remedy="update tierstore",
            format=version,
        )
    members = {"format", "store", "generation", "next_shard", "metadata", "blocks"}
    if type(version) is not int or not 1 <= version <= FORMAT or set(fields) != members:
        _refuse(f"its members are not those of format 1 to {FORMAT}")
    _expect(is_identity(fields["store"]), "store is not 16 hexadecimal digits")
    generation = _natural(fields["generation"], "generation")
    next_shard = _natural(fields["next_shard"], "next_shard")
    _expect(max(generation, next_shard - 1) <= names.MAX_NUMBER, "generation or next_shard is more than a file's name can carry")
    _expect(isinstance(fields["blocks"], list), "blocks is not a list")
    records = tuple(_record(entry) for entry in fields["blocks"])
    _expect(len({record.block.name for record in records}) == len(records), "a block occurs twice")
    numbers = [record.shard.number for record in records if record.adopted is None]
    _expect(len(set(numbers)) == len(numbers), "a shard occurs twice")
    _expect(all(number < next_shard for number in numbers), "a shard's number is not below next_shard")
    _expect(all(format_of(record.block, record.adopted) <= version for record in records), f"a block is none of format {version}")
    return Manifest(fields["store"], generation, next_shard, fields["metadata"], records)


_MEMBERS = {"name", "payload_bytes", "single", "frozen", "adopted", "tensors", "file", "file_bytes", "data_start", "chunks", "digest"}


def _record(entry: object) -> Record:
    _expect(isinstance(entry, dict) and set(entry) == _MEMBERS, f"a block's members are not those of format 1 to {FORMAT}")
    assert isinstance(entry, dict)
    name = entry["name"]
    _expect(_is_text(name), "a block's name is not text")
    where = f"block {name[:200]!r}: "
    nbytes = _natural(entry["payload_bytes"], where + "payload_bytes")
    _expect(nbytes > 0 and nbytes % PAGE == 0, where + "payload_bytes is not a positive multiple of 4096")
    _expect(type(entry["single"]) is bool and type(entry["frozen"]) is bool, where + "single or frozen is not a bool")
    block = Block(name, _tensors(entry["tensors"], nbytes, where), nbytes, entry["single"], entry["frozen"])
    if entry["adopted"] is None:
        return Record(block, _shard(entry, nbytes, where))
    own = [member for member in ("file", "file_bytes", "data_start", "digest") if entry[member] is not None]
    _expect(not own, where + "it is adopted, and has a shard")
    chunks = _chunks(entry["chunks"], nbytes, where)
    return Record(block, ShardRecord("", 0, 0, 0, chunks, 0), _adopted(entry["adopted"], block, where))


def _adopted(entry: object, block: Block, where: str) -> Adopted:
    if not isinstance(entry, dict) or set(entry) != {"files", "places"} or not isinstance(entry["files"], list):
        _refuse(where + "adopted is not files and places")
    files: list[ModelFile] = []
    for file in entry["files"]:
        if not isinstance(file, list) or len(file) != 5:
            _refuse(where + "a model file is not path, length, time, header length, checksum")
        path, nbytes, modified_ns, header_bytes, header_sum = file
        _expect(_is_text(path) and "\0" not in path, where + "the path of a model file is not text")
        _expect(type(modified_ns) is int and abs(modified_ns) < 2**63, where + "the time of a model file is not a whole number")
        length = _natural(nbytes, where + "the length of a model file")
        header = _natural(header_bytes, where + "the header of a model file")
        _expect(
            LENGTH_BYTES < header <= min(length, LENGTH_BYTES + MAX_HEADER_BYTES), where + "the header of a model file has no such length"
        )
        files.append(ModelFile(path, length, modified_ns, _hex(header_sum, where), header))
    places: list[tuple[int, int]] = []
    listed = entry["places"]
    if not isinstance(listed, list) or len(listed) != len(block.tensors):
        _refuse(where + "places is not one for each tensor")
    for spec, place in zip(block.tensors, listed, strict=True):
        if not isinstance(place, list) or len(place) != 2:
            _refuse(where + "a place is not a file and an offset")
        index, begin = (_natural(value, where + "a place") for value in place)
        _expect(index < len(files), where + "a place is in no file")
        _expect(files[index].header_bytes <= begin <= files[index].nbytes - spec.nbytes, where + "a place is not within its file's data")
        places.append((index, begin))
    _expect(bool(files), where + "adopted has no file")
    return Adopted(tuple(files), tuple(places))


def _tensors(entries: object, nbytes: int, where: str) -> tuple[TensorSpec, ...]:
    if not isinstance(entries, list):
        _refuse(where + "tensors is not a list")
    specs: list[TensorSpec] = []
    end = 0
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 4:
            _refuse(where + "a tensor is not name, dtype, shape, offset")
        name, dtype, shape, offset = entry
        _expect(_is_text(name) and not name.startswith(FILLER_PREFIX) and name != "__metadata__", where + "a tensor's name is not allowed")
        what = repr(name[:200])
        _expect(isinstance(dtype, str) and dtype in ITEM_BYTES, where + f"the dtype of {what} is not known")
        _expect(isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS, where + f"the shape of {what} is not a short list")
        sizes = tuple(_natural(size, where + f"the shape of {what}") for size in shape)
        spec = TensorSpec(name, dtype, sizes, _natural(offset, where + f"the offset of {what}"))
        _expect(spec.offset % TENSOR_ALIGNMENT == 0 and spec.offset >= end, where + f"{what} overlaps or is not aligned")
        end = spec.offset + spec.nbytes
        _expect(end <= nbytes, where + f"{what} reaches beyond the payload")
        specs.append(spec)
    _expect(len({spec.name for spec in specs}) == len(specs), where + "a tensor occurs twice")
    return tuple(specs)


def _shard(entry: dict[str, Any], nbytes: int, where: str) -> ShardRecord:
    file = entry["file"]
    number = names.shard_number(file) if isinstance(file, str) else None
    if number is None:
        _refuse(where + "file is not the name of a shard")
    data_start = _natural(entry["data_start"], where + "data_start")
    _expect(data_start > 0 and data_start % PAGE == 0 and data_start <= MAX_HEADER_BYTES, where + "data_start is not a multiple of 4096")
    file_bytes = _natural(entry["file_bytes"], where + "file_bytes")
    _expect(file_bytes == data_start + nbytes, where + "file_bytes is not header and payload")
    return ShardRecord(file, number, file_bytes, data_start, _chunks(entry["chunks"], nbytes, where), _hex(entry["digest"], where))


def _chunks(chunks: object, nbytes: int, where: str) -> tuple[int, ...] | None:
    if chunks is None:
        return None
    if not isinstance(chunks, list) or len(chunks) != num_chunks(nbytes):
        _refuse(where + "chunks is not one checksum per 16 MiB")
    return tuple(_hex(chunk, where) for chunk in chunks)


def _hex(value: object, where: str) -> int:
    if not isinstance(value, str) or _HEX.fullmatch(value) is None:
        _refuse(where + "a checksum is not 16 hexadecimal digits")
    return int(value, 16)


def _natural(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value < MAX_SIZE:
        _refuse(f"{what} is not a non-negative whole number")
    return value


def _is_text(value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        _refuse(problem)


def _refuse(problem: str) -> NoReturn:
    raise ShardError(f"the manifest is not valid: {problem}")
