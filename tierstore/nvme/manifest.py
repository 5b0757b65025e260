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
from tierstore.nvme.checksums import checksum, num_chunks
from tierstore.nvme.safetensors import MAX_DIMENSIONS, MAX_HEADER_BYTES, MAX_SIZE, MAX_VALUES, num_values, read_object

FORMAT = 1
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
    """One block and its shard."""

    block: Block
    shard: ShardRecord


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest; `metadata` is the user's JSON value, `store` tells the directory from every other, see `is_identity`."""

    store: str
    generation: int
    next_shard: int
    metadata: Any
    records: tuple[Record, ...]


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


def encode_record(record: Record) -> str:
    """One block's line. Pure; any thread."""
    block, shard = record.block, record.shard
    fields = {
        "name": block.name,
        "payload_bytes": block.nbytes,
        "single": block.single,
        "frozen": block.frozen,
        "adopted": None,
        "tensors": [[spec.name, spec.dtype, list(spec.shape), spec.offset] for spec in block.tensors],
        "file": shard.file,
        "file_bytes": shard.file_bytes,
        "data_start": shard.data_start,
        "chunks": None if shard.chunks is None else [f"{chunk:016x}" for chunk in shard.chunks],
        "digest": f"{shard.digest:016x}",
    }
    return json.dumps(fields, separators=(",", ":"))


def encode_manifest(store: str, generation: int, next_shard: int, metadata: str, records: Sequence[str]) -> bytes:
    """The manifest's bytes, from `encode_metadata` and `encode_record`. Pure; any thread.

    Raises:
        SizeError: No store would read one so long.
    """
    numbers = f'"generation":{generation},"next_shard":{next_shard}'
    head = f'{{"format":{FORMAT},"store":"{store}",{numbers},"metadata":{metadata},"blocks":[\n'
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
    _expect(type(version) is int and version == FORMAT and set(fields) == members, "its members are not those of format 1")
    _expect(is_identity(fields["store"]), "store is not 16 hexadecimal digits")
    generation = _natural(fields["generation"], "generation")
    next_shard = _natural(fields["next_shard"], "next_shard")
    _expect(max(generation, next_shard - 1) <= names.MAX_NUMBER, "generation or next_shard is more than a file's name can carry")
    _expect(isinstance(fields["blocks"], list), "blocks is not a list")
    records = tuple(_record(entry) for entry in fields["blocks"])
    _expect(len({record.block.name for record in records}) == len(records), "a block occurs twice")
    _expect(len({record.shard.number for record in records}) == len(records), "a shard occurs twice")
    _expect(all(record.shard.number < next_shard for record in records), "a shard's number is not below next_shard")
    return Manifest(fields["store"], generation, next_shard, fields["metadata"], records)


_MEMBERS = {"name", "payload_bytes", "single", "frozen", "adopted", "tensors", "file", "file_bytes", "data_start", "chunks", "digest"}


def _record(entry: object) -> Record:
    _expect(isinstance(entry, dict) and set(entry) == _MEMBERS, "a block's members are not those of format 1")
    assert isinstance(entry, dict)
    name = entry["name"]
    _expect(_is_text(name), "a block's name is not text")
    where = f"block {name[:200]!r}: "
    nbytes = _natural(entry["payload_bytes"], where + "payload_bytes")
    _expect(nbytes > 0 and nbytes % PAGE == 0, where + "payload_bytes is not a positive multiple of 4096")
    _expect(type(entry["single"]) is bool and type(entry["frozen"]) is bool, where + "single or frozen is not a bool")
    _expect(entry["adopted"] is None, where + "adopted is not null")
    block = Block(name, _tensors(entry["tensors"], nbytes, where), nbytes, entry["single"], entry["frozen"])
    return Record(block, _shard(entry, nbytes, where))


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
    chunks = entry["chunks"]
    if chunks is not None:
        _expect(isinstance(chunks, list) and len(chunks) == num_chunks(nbytes), where + "chunks is not one checksum per 16 MiB")
        chunks = tuple(_hex(chunk, where) for chunk in chunks)
    return ShardRecord(file, number, file_bytes, data_start, chunks, _hex(entry["digest"], where))


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
