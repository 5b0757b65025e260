"""Optimizer state in chunks, and one step of any optimizer on one chunk at a time.

[Note: One instance per chunk]
An optimizer that treats its parameters separately does the same to each whether one instance has them all or several have a few
each: its arithmetic is that of the elements, not of their number. So each chunk has an instance of its own, made by the user's factory,
whose parameters and state tensors are views of leased blocks while it takes its step. Which of torch's implementations (fused, foreach,
single) is used differs in the last bit, so it is resolved once, as torch does for the whole set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.training.gradients import Part
from tierstore.training.instances import Factory, Hyper, give
from tierstore.training.leasing import Buffers
from tierstore.training.pieces import Piece
from tierstore.training.structure import Weight, WeightBlock

PREFIX = "optimizer/"
MASTER = "master"
ALIGN = 64
"""Ranges of a parameter begin at multiples of so many elements: fused kernels compute the elements of a vector's width alike, and the
rest of a tensor by other code."""

SPARE = 16
"""Chunks are cut evenly where a range's step is at most one part in so many of them."""

New = dict[tuple[Piece, str], Tensor]
"""State that has no place in the store yet."""


@dataclass(eq=False)
class Chunk:
    """Pieces of one block of weights that are updated together, and where their state is.

    Attributes:
        group: Index of their parameter group.
        inner: The optimizer's instance; made when it first takes a step.
        blocks: Blocks of the store that hold state.
        tensors: By piece and key: the block that holds the tensor.
        values: By piece and key: what is kept here instead: numbers, and tensors of one element.
        part: The gradients of the same pieces.
        weights: Of which it has pieces.
        unkept: State for which there was no room yet, or whose step failed: it is the pieces' as what is in the store is.
        version: Of the block of weights when the masters were last those of it; None: no step was taken yet.
    """

    name: str
    block: WeightBlock
    pieces: list[Piece]
    group: int
    part: Part | None = None
    inner: torch.optim.Optimizer | None = None
    blocks: list[str] = field(default_factory=list)
    tensors: dict[Piece, dict[str, str]] = field(default_factory=dict)
    values: dict[Piece, dict[str, Any]] = field(default_factory=dict)
    unkept: New = field(default_factory=dict)
    version: int | None = None
    weights: frozenset[Weight] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = frozenset(piece.weight for piece in self.pieces)
        self.tensors = {piece: {} for piece in self.pieces}
        self.values = {piece: {} for piece in self.pieces}

    @property
    def has_masters(self) -> bool:
        return all(MASTER in self.tensors[piece] or MASTER in self.values[piece] for piece in self.pieces)


def cut(
    block: WeightBlock,
    weights: Collection[Weight],
    bytes_per_element: Callable[[Weight], float],
    limit_bytes: int,
    *,
    ranges: Collection[Weight],
    share_bytes: float | None = None,
) -> list[list[Piece]]:
    """Pieces of a block's weights, chunk by chunk.

    Chunks are filled to their share, a weight that may be cut going on in the next one. What could not be filled, as ranges begin at
    multiples of `ALIGN`, is added to the next: where the share is an even one of the block, chunks differ by a few bytes only.

    Args:
        block: The block.
        weights: Those of it to cut.
        bytes_per_element: What one element of a weight takes in a chunk.
        limit_bytes: What a chunk takes at most, where that is possible.
        ranges: Those that may be cut into flat ranges.
        share_bytes: What it is to take, by default as much as it may.
    """
    chunks: list[list[Piece]] = []
    share = float(limit_bytes if share_bytes is None else share_bytes)
    room = 0.0
    for weight in block.weights:
        if weight not in weights:
            continue
        each = max(bytes_per_element(weight), 1e-9)
        step = ALIGN * each if weight in ranges else math.inf
        start = 0
        while True:
            need = (weight.numel - start) * each
            if not chunks or room < min(need, step):
                chunks.append([])
                room = min(limit_bytes, share + (room if 0 < room < ALIGN * each else 0.0))
            stop = weight.numel
            if weight in ranges and need > room:
                stop = start + max(ALIGN, int(room / each) // ALIGN * ALIGN)
            if weight.numel - stop <= 1:  # the state of one element could not be told from a number
                stop = weight.numel
            whole = not start and stop == weight.numel
            chunks[-1].append(Piece(weight) if whole else Piece(weight, start, stop))
            room -= (stop - start) * each
            if (start := stop) == weight.numel:
                break
    return chunks


def even_share(sizes: Collection[float], limit_bytes: int, spare_bytes: float) -> float:
    """A share for `cut` that most of the bytes can be cut by evenly.

    Chunks of one size take each other's places, on the device and in RAM, and none is moved to make room for a larger one.

    Args:
        sizes: What all chunks of each block take.
        limit_bytes: What one may take.
        spare_bytes: Of that, what is kept for what the chunk before it could not take, unless it is much of it.
    """
    alike: dict[float, float] = {}
    for size in sizes:
        alike[size] = alike.get(size, 0.0) + size
    most = max(alike, key=lambda size: (alike[size], size), default=0.0)
    if most <= limit_bytes or limit_bytes < SPARE * spare_bytes:
        return limit_bytes
    return most / math.ceil(most / (limit_bytes - spare_bytes)) + 1.0  # a byte for what is rounded off


class Stepper:
    """Takes steps of one optimizer class on chunks.

    Args:
        buffers: Where state is kept.
        factories: By group: what makes an instance.
        options: For each of them.
        master_dtype: Of masters, if there are any.
        name: Of the class.
        begun: The groups whose class makes state when it is made, and not in the first step only.
    """

    def __init__(
        self,
        buffers: Buffers,
        factories: Sequence[Factory],
        options: Mapping[str, Any],
        master_dtype: torch.dtype | None,
        name: str,
        begun: Collection[int],
    ) -> None:
        self._buffers = buffers
        self._factories = factories
        self._options = options
        self._master_dtype = master_dtype
        self.name = name
        self._begun = begun

    @torch.no_grad()
    def step(
        self,
        chunk: Chunk,
        weights: Mapping[str, Tensor],
        updated: Collection[Weight],
        gradients: Callable[[list[Piece]], list[Tensor]],
        state: Mapping[str, Mapping[str, Tensor]],
        hyper: Hyper,
        begin: Callable[[], None],
        *,
        written: bool = False,
    ) -> None:
        """One step on one chunk. Inside a lease of its weights and state (to be written) and of its gradients.

        State that the step has made is the chunk's in `unkept`, to be given to `keep` once the lease of the old has ended.

        Args:
            chunk: Which.
            weights: The block's tensors.
            updated: Those that have a gradient.
            gradients: Gives the gradients of pieces of these, clipped and, with masters, widened.
            state: The tensors of the chunk's blocks.
            hyper: Options and attributes of this step.
            begin: Called when values are about to change: until then a step that failed may be taken again.
            written: Somebody else has written the weights since: the masters of those that differ are made anew.
        """
        new: New = dict(chunk.unkept)
        values = {piece: dict(chunk.values[piece]) for piece in chunk.pieces}

        def stored(piece: Piece, key: str) -> Tensor:
            return state[chunk.tensors[piece][key]][f"{key}.{piece.key}"]

        # Of these only is there state, masters included: pieces of one parameter are in several chunks, and all of them have it or none.
        active = [piece for piece in chunk.pieces if piece.weight in updated]
        homes = {piece: self._home(chunk, piece, weights, stored, new) for piece in active}
        for piece in chunk.pieces if written else ():
            master = self._master(chunk, piece, stored, new)
            if master is not None:
                own = piece.of(weights[piece.weight.stored])
                master.copy_(torch.where(master.to(own.dtype) == own, master, own.to(master.dtype)))
        # As in plain torch: some optimizers pass by what is no parameter, or requires no gradient.
        leaves = {piece: nn.Parameter(home) for piece, home in homes.items()}
        inner = chunk.inner
        if inner is None:
            inner = self._factories[chunk.group](list(leaves.values()), **self._options)
        group = inner.param_groups[0]
        try:
            inner.state.clear()
            for piece, gradient in zip(active, gradients(active), strict=True):
                leaf = leaves[piece]
                leaf.grad = gradient
                # Aliases: what an optimizer does to a tensor's `data`, it does not do to what the lease has given out.
                found: dict[str, Any] = {key: stored(piece, key).detach() for key in chunk.tensors[piece] if key != MASTER}
                found.update((key, value) for key, value in values[piece].items() if key != MASTER)
                found.update((key, value) for (other, key), value in new.items() if other is piece and key != MASTER)
                if not found and chunk.group in self._begun:
                    found = self.made_state(homes[piece], chunk.group)
                    self._note_made(piece, found, new, values)
                if found:
                    inner.state[leaf] = found
            give(inner, hyper.options[chunk.group], hyper.attributes)
            group["params"] = [leaves[piece] for piece in active]
            begin()
            chunk.inner, chunk.values, chunk.unkept = inner, values, new
            try:
                inner.step()
            finally:  # also what a step that failed has done, as in plain torch
                for piece in active:
                    if leaves[piece].data_ptr() != homes[piece].data_ptr():  # given another storage
                        homes[piece].copy_(leaves[piece])
                    self._note_state(chunk, piece, inner.state.get(leaves[piece], {}), stored)
            if self._master_dtype is not None:
                torch._foreach_copy_([piece.of(weights[piece.weight.stored]) for piece in active], [homes[piece] for piece in active])
        finally:
            group["params"] = []
            inner.state.clear()

    def _home(self, chunk: Chunk, piece: Piece, weights: Mapping[str, Tensor], stored: Callable[[Piece, str], Tensor], new: New) -> Tensor:
        """Where the optimizer's update is to end up: the weight, or its master."""
        if self._master_dtype is None:
            return piece.of(weights[piece.weight.stored])
        master = self._master(chunk, piece, stored, new)
        if master is None:
            master = new[piece, MASTER] = piece.of(weights[piece.weight.stored]).to(self._master_dtype, copy=True)
        return master

    @staticmethod
    def _master(chunk: Chunk, piece: Piece, stored: Callable[[Piece, str], Tensor], new: New) -> Tensor | None:
        """The one that there is."""
        if MASTER in chunk.tensors[piece]:
            return stored(piece, MASTER)
        master: Tensor | None = chunk.values[piece].get(MASTER, new.get((piece, MASTER)))
        return master

    @torch.no_grad()
    def made_state(self, value: Tensor, group: int) -> dict[str, Any]:
        """The state that a parameter has before its first step, of classes that make it when they are made."""
        leaf = nn.Parameter(value)
        owns = self._buffers.store.engine.device.owns
        made = self._factories[group]([leaf], **self._options).state.get(leaf, {})
        return {key: each.clone() if isinstance(each, Tensor) and owns(each) else each for key, each in made.items()}

    @staticmethod
    def _note_made(piece: Piece, made: Mapping[str, Any], new: New, values: dict[Piece, dict[str, Any]]) -> None:
        """State of before the first step."""
        for key, value in made.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                new[piece, key] = value
            else:
                values[piece][key] = value

    def _note_state(self, chunk: Chunk, piece: Piece, state: Mapping[str, Any], stored: Callable[[Piece, str], Tensor]) -> None:
        """What a step has left behind: most optimizers change their tensors in place, some put others in their stead or take some away."""
        owns = self._buffers.store.engine.device.owns
        places, values, new = chunk.tensors[piece], chunk.values[piece], chunk.unkept
        replaced: dict[str, Tensor] = {}
        for key in [*places, *values, *(key for other, key in new if other is piece)]:
            if key != MASTER and key not in state:
                places.pop(key, None)
                values.pop(key, None)
                new.pop((piece, key), None)
        for key, left in state.items():
            if isinstance(left, Tensor) and key in places and _is_same_memory(left, mine := stored(piece, key)):
                continue
            # What is leased is the gradient itself, say, or what another key had.
            value = left.clone() if isinstance(left, Tensor) and owns(left) else left
            if not isinstance(value, Tensor) or value.numel() <= 1:
                values[key] = value
                places.pop(key, None)
                new.pop((piece, key), None)
            elif key in places and (value.shape, value.dtype) == (mine.shape, mine.dtype):
                replaced[key] = value
            else:
                new[piece, key] = value
                places.pop(key, None)
                values.pop(key, None)
        for key, value in replaced.items():
            stored(piece, key).copy_(value)

    def keep(self, chunk: Chunk) -> None:
        """State that a step has created becomes a block. Where that fails, it stays beside the store until there is room."""
        for (piece, key), value in chunk.unkept.items():
            if value.numel() <= 1:
                chunk.values[piece][key] = value
        tensors = {(piece, key): value for (piece, key), value in chunk.unkept.items() if value.numel() > 1}
        if not tensors:
            chunk.unkept = {}
            return
        # One block for all: pieces whose first gradient comes later than that of others do not each get one of their own.
        before = list(chunk.blocks)
        if before:
            with self._buffers.lease(*before) as leased:
                blocks = dict(zip(before, (leased,) if len(before) == 1 else leased, strict=True))
                for piece, names in chunk.tensors.items():
                    tensors.update({(piece, key): blocks[name][f"{key}.{piece.key}"].clone() for key, name in names.items()})
        self._new_block(chunk, tensors)
        chunk.unkept = {}
        for name in before:
            chunk.blocks.remove(name)
            self._buffers.delete(name)

    def replace(self, chunk: Chunk, new: New, values: dict[Piece, dict[str, Any]]) -> None:
        """Have this state and no other."""
        for name in chunk.blocks:
            self._buffers.delete(name)
        chunk.blocks = []
        chunk.unkept = {}
        chunk.tensors = {piece: {} for piece in chunk.pieces}
        chunk.values = values
        if new:
            self._new_block(chunk, new)

    def _new_block(self, chunk: Chunk, tensors: New) -> None:
        name = chunk.name
        while name in chunk.blocks or name in self._buffers.store:  # also of chunks that were cut in another way
            name += "+"
        layout = [(f"{key}.{piece.key}", value.dtype, tuple(value.shape)) for (piece, key), value in tensors.items()]
        self._buffers.declare(name, layout, part=chunk.part.block_bytes if chunk.part is not None else 0)
        try:
            with self._buffers.lease(name, write=[name], fresh=[name]) as block:
                for (piece, key), value in tensors.items():
                    block[f"{key}.{piece.key}"].copy_(value)
        except BaseException:
            self._buffers.delete(name)
            raise
        chunk.blocks.append(name)
        for piece, key in tensors:
            chunk.tensors[piece][key] = name


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
