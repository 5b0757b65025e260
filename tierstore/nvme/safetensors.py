"""Headers of shards: built from a block, and parsed without trusting a byte.

A safetensors file is 8 bytes of header length (little-endian), a JSON header, and the data. Readers refuse holes, so the gaps
that alignment leaves between tensors, and the tail, are tensors too: U8, named `FILLER_PREFIX` and a number. The header is
padded with spaces so that data begins at a multiple of 4096.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tierstore.catalog import FILLER_PREFIX, ITEM_BYTES, PAGE, PAIRED, Block, round_up
from tierstore.errors import ShardError, SizeError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the format allows; other readers refuse more."""

NOT_IN_TORCH = ("F6_E2M3", "F6_E3M2")
"""Dtypes of the format that no torch tensor can have."""

MAX_DIMENSIONS = 64
MAX_SIZE = 2**62
"""No dimension, offset or length is as large."""

ENTRY_BYTES = 160
"""Of a header's entry at most, but for its name and shape."""

ENTRY_VALUES = 12
"""Likewise, as `num_values` counts."""

MAX_VALUES = 1 << 23
"""JSON values in a header or manifest, as `num_values` counts them: up to about 100 bytes of memory each while they are parsed. A block
of a few tensors takes about 40."""

BLOCK_KEY = "tierstore_block"
"""Key of the block's name in the header's metadata, so that a shard explains itself without a manifest."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a header places it; offsets in bytes from the start of the data, the shape in elements (`catalog.PAIRED`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        metadata: Text to text.
        tensors: Ascending by place, without holes, fillers included.
        data_start: Bytes from the file's start to the data.
        data_bytes: Length of the data; the file ends there.
    """

    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]
    data_start: int
    data_bytes: int


def build_header(block: Block) -> bytes:
    """The bytes of a shard before its payload: a multiple of 4096. Pure; any thread."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", BLOCK_KEY: block.name}}
    fillers = 0
    end = 0
    for spec in block.tensors:
        if spec.offset > end:
            header[f"{FILLER_PREFIX}{fillers}"] = _entry("U8", (spec.offset - end,), end)
            fillers += 1
        header[spec.name] = _entry(spec.dtype, spec.shape, spec.offset)
        end = spec.offset + spec.nbytes
    if block.nbytes > end:
        header[f"{FILLER_PREFIX}{fillers}"] = _entry("U8", (block.nbytes - end,), end)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    data_start = round_up(LENGTH_BYTES + len(text), PAGE)
    return (data_start - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + text.ljust(data_start - LENGTH_BYTES)


def check_can_be_read(block: Block) -> None:
    """Refuse a block whose shard no reader would take back. Pure; any thread.

    Raises:
        SizeError: Names too long or tensors too many for a header, dimensions too many or too large.
    """
    for spec in block.tensors:
        if len(spec.shape) > MAX_DIMENSIONS or any(size >= MAX_SIZE for size in spec.shape):
            raise SizeError(
                f"tensor {spec.name!r} of block {block.name!r} has a shape that the file format cannot hold",
                need=f"at most {MAX_DIMENSIONS} dimensions, each below 2**62",
                have=f"{len(spec.shape)} dimensions, the largest {max(spec.shape)}",
                remedy="store a view with fewer dimensions",
                block=block.name,
                tensor=spec.name,
            )
    nbytes, values = header_bounds(block)
    if nbytes + PAGE > MAX_HEADER_BYTES or values > MAX_VALUES:
        raise SizeError(
            f"block {block.name[:100]!r} has names too long, or too many tensors, for one file's header",
            need=f"at most {MAX_HEADER_BYTES} bytes and {MAX_VALUES} values",
            have=f"up to {nbytes} bytes and {values} values",
            remedy="use shorter names, or several blocks",
            block=block.name,
        )


def header_bounds(block: Block) -> tuple[int, int]:
    """No fewer than the bytes and the values (as `num_values` counts them) of a block's header, but for its padding."""
    names = json.dumps([block.name, *(spec.name for spec in block.tensors)], ensure_ascii=False).encode()
    entries = 2 * len(block.tensors) + 2  # a filler behind each at most, and the metadata
    dimensions = sum(len(spec.shape) for spec in block.tensors)
    nbytes = len(names) + entries * ENTRY_BYTES + 21 * dimensions
    values = num_values(names) + entries * ENTRY_VALUES + dimensions
    return nbytes, values


def _entry(dtype: str, shape: tuple[int, ...], begin: int) -> dict[str, Any]:
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    return {"dtype": dtype, "shape": stored_shape(dtype, shape), "data_offsets": (begin, begin + nbytes)}


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape as files give it: in values, of which an element may be two."""
    return (*shape[:-1], 2 * shape[-1]) if dtype in PAIRED and shape else shape


def header_length(start: bytes, file_bytes: int) -> int:
    """Length of the JSON, from a file's first 8 bytes: checked before anything of that size is read.

    Raises:
        ShardError: Too short a file, or a length no valid file can have.
    """
    if len(start) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise ShardError("the file is too short for a safetensors header", need=f"{LENGTH_BYTES} bytes", have=min(len(start), file_bytes))
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    allowed = min(MAX_HEADER_BYTES, file_bytes - LENGTH_BYTES)
    if not 2 <= length <= allowed:
        raise ShardError("the safetensors header has an impossible length", need=f"2 to {allowed} bytes", have=length)
    return length


def parse_header(header: bytes, file_bytes: int) -> Header:
    """Check a header in full: types, known dtypes, sizes, and that the tensors cover the data exactly once.

    Args:
        header: The file's first `LENGTH_BYTES + header_length(...)` bytes.
        file_bytes: The file's length.

    Raises:
        ShardError: What is wrong, and with which tensor.
    """
    length = header_length(header, file_bytes)
    data_start = LENGTH_BYTES + length
    if len(header) != data_start:
        raise ShardError("the safetensors header is cut off", need=data_start, have=len(header))
    fields = read_object(header[LENGTH_BYTES:], what="safetensors header")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ShardError("the safetensors header's metadata is not text to text", have=type(metadata).__name__)
    tensors = sorted((_stored(name, entry) for name, entry in fields.items()), key=lambda tensor: (tensor.begin, tensor.end))
    data_bytes = file_bytes - data_start
    for tensor, expected in _with_expected_begin(tensors):
        if tensor.begin != expected:
            what = "overlaps the tensor before it" if tensor.begin < expected else "leaves a hole before it"
            raise ShardError(f"tensor {_short(tensor.name)} {what}", need=f"data offset {expected}", have=tensor.begin, tensor=tensor.name)
    end = tensors[-1].end if tensors else 0
    if end != data_bytes:
        raise ShardError("the tensors do not end where the file does", need=f"{end} bytes of data", have=data_bytes)
    return Header(metadata, tuple(tensors), data_start, data_bytes)


def _with_expected_begin(tensors: list[StoredTensor]) -> Iterator[tuple[StoredTensor, int]]:
    end = 0
    for tensor in tensors:
        yield tensor, end
        end = tensor.end


def _stored(name: str, entry: object) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ShardError(f"tensor {_short(name)} is not described by dtype, shape and data_offsets", tensor=name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        why = "for which torch has no dtype" if dtype in NOT_IN_TORCH else "the store does not know"
        raise ShardError(f"tensor {_short(name)} has a dtype {why}", need=f"one of {known}", have=_short(dtype), tensor=name)
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS or not _naturals(offsets) or len(offsets) != 2:
        raise ShardError(f"tensor {_short(name)} has a shape or offsets that are not non-negative whole numbers", tensor=name)
    begin, end = offsets
    if dtype in PAIRED:
        if not shape or shape[-1] % 2:
            problem = f"tensor {_short(name)} of dtype {dtype} has an odd number of values in a row, which torch cannot hold"
            raise ShardError(problem, need="a last dimension that is even", have=str(shape), tensor=name)
        shape = [*shape[:-1], shape[-1] // 2]
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise ShardError(f"tensor {_short(name)} does not fill its range", need=f"{nbytes} bytes", have=end - begin, tensor=name)
    return StoredTensor(name, dtype, tuple(shape), begin, end)


def _short(value: object) -> str:
    """For a message: whoever made the file chose how long it is."""
    return repr(value[:200] if isinstance(value, str) else type(value).__name__)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def read_object(text: bytes, *, what: str) -> dict[str, Any]:
    """Parse a JSON object strictly: valid UTF-8, no key twice, finite numbers, bounded depth, and few enough values to be held.

    Raises:
        ShardError: `what` is not such an object.
    """
    if (values := num_values(text)) > MAX_VALUES:
        raise ShardError(f"the {what} has too many values", need=f"at most {MAX_VALUES}", have=values)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"the {what} is not valid JSON", have=str(error)[:200]) from None
    if not isinstance(value, dict):
        raise ShardError(f"the {what} is not a JSON object", have=type(value).__name__)
    return value


def num_values(text: bytes) -> int:
    """No fewer than the values in a JSON text. Does not parse it: separators and brackets are counted, also those within strings."""
    return sum(map(text.count, (b",", b":", b"[", b"{")))


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key occurs twice")
    return fields


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")
