"""Pieces of parameters, in which gradients and optimizer state are stored; and how to get from some pieces to others.

[Note: Cut anew]
Chunks depend on the budget of the device, so a commit that is resumed with another has them cut in another way. They are put together
from what is there, one new piece after the other: in memory there is what one new chunk and one old block hold, which is a chunk's
size, or that of a parameter which no optimizer may take in ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tierstore.errors import TrainingError
from tierstore.sync import TierStore
from tierstore.training.structure import Weight

_RANGE = re.compile(r"\[(\d+):(\d+)\]$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter, or a range of its elements.

    Attributes:
        start, stop: Elements of the flattened parameter; None: all of it.
        numel: How many these are.
        key: Its tensor's name in a block.
    """

    weight: Weight
    start: int | None = None
    stop: int | None = None
    numel: int = field(init=False, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Once: they are asked for many times in each step.
        whole = self.start is None or self.stop is None
        object.__setattr__(self, "numel", self.weight.numel if self.start is None or self.stop is None else self.stop - self.start)
        object.__setattr__(self, "key", self.weight.name if whole else f"{self.weight.name}[{self.start}:{self.stop}]")
        object.__setattr__(self, "_hash", hash((id(self.weight), self.start, self.stop)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape) if self.start is None else (self.numel,)

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor shaped like the parameter. Of a range, a view if the tensor is contiguous."""
        if self.start is None:
            return tensor
        if tensor.is_contiguous():
            return tensor.as_strided((self.numel,), (1,), tensor.storage_offset() + self.start)
        return tensor.reshape(-1)[self.start : self.stop]


def parse_piece(key: str, weights: dict[str, Weight]) -> Piece | None:
    """The piece of that key; None if it is of none of these weights."""
    if key in weights:
        return Piece(weights[key])
    found = _RANGE.search(key)
    weight = weights.get(key[: found.start()]) if found is not None else None
    if weight is None or found is None:
        return None
    start, stop = int(found.group(1)), int(found.group(2))
    return Piece(weight, start, stop) if 0 <= start < stop <= weight.numel else None


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the store.

    Attributes:
        block, tensor: Where.
        key: What it is to the piece: "exp_avg", say.
    """

    block: str
    tensor: str
    key: str
    piece: Piece


def bounds(piece: Piece) -> tuple[int, int]:
    return (piece.start or 0, piece.weight.numel if piece.stop is None else piece.stop)


def gather(store: TierStore, stored: Iterable[Stored], pieces: Sequence[Piece]) -> dict[tuple[Piece, str], Tensor]:
    """Put together what belongs to some pieces, on the CPU. Reads each block once.

    Raises:
        TrainingError: State that is not shaped like its parameter, and so cannot be cut.
    """
    by_block: dict[str, list[tuple[Stored, Piece]]] = {}
    for each in stored:
        begin, end = bounds(each.piece)
        for piece in pieces:
            start, stop = bounds(piece)
            if piece.weight is each.piece.weight and start < end and begin < stop:
                by_block.setdefault(each.block, []).append((each, piece))
    found: dict[tuple[Piece, str], Tensor] = {}
    for block, needed in by_block.items():
        values = store.read(block)
        assert isinstance(values, dict)
        for each, piece in needed:
            value = values[each.tensor]
            if each.piece == piece:
                found[piece, each.key] = value
                continue
            begin, end = bounds(each.piece)
            if value.numel() != end - begin:
                raise TrainingError(
                    f"state {each.key!r} of {piece.weight.name!r} is not shaped like the parameter and cannot be cut",
                    need=f"{end - begin} elements",
                    have=str(tuple(value.shape)),
                    remedy="open the store with the gpu= that it was committed with",
                )
            if (piece, each.key) not in found:
                found[piece, each.key] = torch.empty(piece.shape, dtype=value.dtype)
            start, stop = bounds(piece)
            low, high = max(start, begin), min(stop, end)
            found[piece, each.key].view(-1)[low - start : high - start] = value.reshape(-1)[low - begin : high - begin]
    return found
