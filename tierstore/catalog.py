"""What a block is: its tensors, and where in its payload each begins. No torch.

[Note: One layout for every tier]
A block's payload is one contiguous range of bytes, the same on the device, in RAM and in its shard, so a move between tiers
is one copy. Tensors begin at multiples of 256 bytes (kernels choose other code paths, and other bits, for less aligned
pointers); the payload's length is a multiple of 4096, so that direct I/O can take it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType

from tierstore.errors import TensorError

BlockId = NewType("BlockId", int)

TENSOR_ALIGNMENT = 256
PAGE = 4096

FILLER_PREFIX = "__tierstore_filler__"
"""Names that begin so are gaps between tensors in a shard, never a user's data."""

STATE_PREFIXES = ("optimizer/", "gradients/", "activations/", "training/")
"""Names of blocks that begin so are training state, which an export of the weights leaves out. `tierstore.training` will use
`optimizer/` (masters and moments), `gradients/`, `activations/` and, for all else that it must keep, `training/`."""

ITEM_BYTES = {
    "F4": 1,
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes per element of each dtype, by its safetensors name. An element of F4 is two values in one byte, as torch has it."""

PAIRED = frozenset({"F4"})
"""Dtypes whose elements are two values. Files count values: the last dimension there is twice as long as here."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a block.

    Attributes:
        name: Its name within the block, and its full name in the shard.
        dtype: safetensors dtype name, a key of `ITEM_BYTES`.
        shape: Sizes per dimension; `()` for a scalar.
        offset: Bytes from the payload's start, a multiple of 256.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Block:
    """A named, fixed set of tensors that always move together.

    Attributes:
        name: Any non-empty text.
        tensors: In payload order, offsets ascending, not overlapping.
        nbytes: Length of the payload, a positive multiple of 4096.
        single: The block was given as one bare tensor, and is handed out as one.
        frozen: Never written; `use(write=True)` raises.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    nbytes: int
    single: bool = False
    frozen: bool = False


def lay_out(name: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, single: bool = False, frozen: bool = False) -> Block:
    """Place tensors one behind the other, each at the next multiple of 256 bytes.

    Args:
        name: The block's name.
        tensors: (name, safetensors dtype, shape) of each, in the order to keep.
        single: It was given as one bare tensor.
        frozen: It is never written.

    Raises:
        TensorError: A name no shard can hold, or a dtype that is not known.
    """
    check_text(name, what="block name", block=name)
    specs: list[TensorSpec] = []
    offset = 0
    for tensor, dtype, shape in tensors:
        check_text(tensor, what="tensor name", block=name)
        if tensor.startswith(FILLER_PREFIX) or tensor == "__metadata__":
            raise TensorError(
                f"tensor name {tensor!r} of block {name!r} is reserved by the file format",
                remedy="choose another name",
                block=name,
                tensor=tensor,
            )
        if dtype not in ITEM_BYTES:
            raise TensorError(
                f"tensor {tensor!r} of block {name!r} has a dtype that safetensors cannot hold",
                need=f"one of {', '.join(ITEM_BYTES)}",
                have=dtype,
                remedy="convert it first",
                block=name,
                tensor=tensor,
            )
        if dtype in PAIRED and not shape:
            raise TensorError(
                f"tensor {tensor!r} of block {name!r} is a single element of dtype {dtype}, which files count in pairs of a dimension",
                need="at least one dimension",
                remedy="store it with the shape (1,)",
                block=name,
                tensor=tensor,
            )
        specs.append(TensorSpec(tensor, dtype, tuple(shape), offset))
        offset = round_up(offset + specs[-1].nbytes, TENSOR_ALIGNMENT)
    return Block(name, tuple(specs), max(PAGE, round_up(offset, PAGE)), single, frozen)


def check_text(text: object, *, what: str, block: object) -> None:
    """Refuse names that no JSON header could carry unchanged: not text, empty, or with lone surrogates."""
    if not isinstance(text, str) or not text:
        raise TensorError(f"a {what} must be non-empty text", have=repr(text), remedy="name it", block=block)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise TensorError(f"{what} {text!r} is not valid Unicode", remedy="use text without lone surrogates", block=block) from None


def extent_bytes(sizes: Iterable[int]) -> int:
    """Bytes of a block that `lay_out` makes of tensors of these sizes; 0 if there are none."""
    return round_up(sum(round_up(size, TENSOR_ALIGNMENT) for size in sizes), PAGE)
