"""Optimizer state in chunks, and one step of any optimizer on one chunk at a time.

[Note: One instance per chunk]
An optimizer that treats its parameters separately does the same to each whether one instance has them all or several have a few
each: its arithmetic is that of the elements, not of their number. So each chunk has an instance of its own, made by the user's factory,
whose parameters and state tensors are views of leased blocks while it takes its step. Which of torch's implementations (fused, foreach,
single) is used differs in the last bit, so it is resolved once, as torch does for the whole set.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tierstore.errors import TrainingError
from tierstore.training.gradients import Part
from tierstore.training.leasing import Buffers
from tierstore.training.pieces import Piece
from tierstore.training.probe import name_of, same
from tierstore.training.structure import Weight, WeightBlock

PREFIX = "optimizer/"
MASTER = "master"
ALIGN = 64
"""Ranges of a parameter begin at multiples of so many elements: fused kernels compute the elements of a vector's width alike, and the
rest of a tensor by other code."""

Factory = Callable[..., torch.optim.Optimizer]
New = dict[tuple[Piece, str], Tensor]
"""State that has no place in the store yet."""

CONTAINERS = (list, dict, set)
"""Options of these types may be changed in place."""


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

    def __post_init__(self) -> None:
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
) -> list[list[Piece]]:
    """Pieces of a block's weights, chunk by chunk.

    Args:
        block: The block.
        weights: Those of it to cut.
        bytes_per_element: What one element of a weight takes in a chunk.
        limit_bytes: What a chunk takes at most, where that is possible.
        ranges: Those that may be cut into flat ranges.
    """
    chunks: list[list[Piece]] = []
    room = 0.0
    for weight in block.weights:
        if weight not in weights:
            continue
        each = max(bytes_per_element(weight), 1e-9)
        if weight in ranges and weight.numel * each > limit_bytes and weight.numel > ALIGN:
            most = max(ALIGN, int(limit_bytes / each) // ALIGN * ALIGN)
            count = -(-weight.numel // most)
            length = -(-weight.numel // count // ALIGN) * ALIGN if count > 1 else weight.numel
            length = max(length, ALIGN)
            starts = list(range(0, weight.numel, length))
            if weight.numel - starts[-1] == 1:  # the state of one element could not be told from a number
                starts.pop()
            chunks += [[Piece(weight, start, stop)] for start, stop in zip(starts, [*starts[1:], weight.numel], strict=True)]
            room = 0.0
            continue
        need = weight.numel * each
        if need > room or not chunks:
            chunks.append([])
            room = float(limit_bytes)
        chunks[-1].append(Piece(weight))
        room -= need
    return [chunk for chunk in chunks if chunk]


def in_group(factory: Factory, options: Mapping[str, Any]) -> Factory:
    """A factory of instances with these options in their group: some make state by them, before the first step."""
    if not options:
        return factory

    @functools.wraps(factory, assigned=("__name__", "__qualname__"), updated=())
    def make(params: Iterable[Tensor], **others: Any) -> torch.optim.Optimizer:
        return factory([{**own_options(options), "params": list(params)}], **others)

    if isinstance(factory, functools.partial):
        make.__name__ = make.__qualname__ = name_of(factory)
    return make


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group for one who may change them in place."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return copy.deepcopy(value) if isinstance(value, CONTAINERS) else value

    return {key: own(value) for key, value in options.items()}


class Stepper:
    """Takes steps of one optimizer class on chunks."""

    def __init__(
        self,
        buffers: Buffers,
        factories: Sequence[Factory],
        options: Mapping[str, Any],
        master_dtype: torch.dtype | None,
        name: str,
    ) -> None:
        self._buffers = buffers
        self._factories = factories
        self._options = options
        self._master_dtype = master_dtype
        self.name = name

    @torch.no_grad()
    def step(
        self,
        chunk: Chunk,
        weights: Mapping[str, Tensor],
        gradients: Mapping[Weight, Callable[[Piece], Tensor]],
        state: Mapping[str, Mapping[str, Tensor]],
        hyper: dict[str, Any],
        begin: Callable[[], None],
    ) -> tuple[dict[str, Any], New]:
        """One step on one chunk. Inside a lease of its weights and state (to be written) and of its gradients.

        Args:
            chunk: Which.
            weights: The block's tensors.
            gradients: For each weight that has one, what gives the gradient of a piece, clipped and, with masters, widened.
            state: The tensors of the chunk's blocks.
            hyper: The group's options of this step.
            begin: Called when values are about to change: until then a step that failed may be taken again.

        Returns:
            Options that the step has changed, and state that it has made, to be given to `keep` once the lease of the old has ended.
        """
        new: New = {}

        def stored(piece: Piece, key: str) -> Tensor:
            return state[chunk.tensors[piece][key]][f"{key}.{piece.key}"]

        leaves = {piece: self._leaf(chunk, piece, weights, stored, new) for piece in chunk.pieces}
        inner = chunk.inner
        if inner is None:
            inner = chunk.inner = self._factories[chunk.group](list(leaves.values()), **self._options)
            if not (chunk.blocks or any(chunk.values.values())):  # state of one element is in no block
                self._note_made(chunk, leaves, new)
        active = [piece for piece in chunk.pieces if piece.weight in gradients]
        inner.state.clear()
        for piece in active:
            leaf = leaves[piece]
            leaf.grad = gradients[piece.weight](piece)
            found: dict[str, Any] = {key: stored(piece, key) for key in chunk.tensors[piece] if key != MASTER}
            found.update((key, value) for key, value in chunk.values[piece].items() if key != MASTER)
            found.update((key, value) for (other, key), value in new.items() if other is piece and key != MASTER)
            if found:
                inner.state[leaf] = found
        group = inner.param_groups[0]
        given = own_options(hyper)
        group.update(given)
        known = set(group)
        versions = {key: value._version for key, value in given.items() if isinstance(value, Tensor)}
        group["params"] = [leaves[piece] for piece in active]
        places = [leaves[piece].data_ptr() for piece in active]
        begin()
        try:
            inner.step()
            for piece, place in zip(active, places, strict=True):
                if leaves[piece].data_ptr() != place:  # given another storage
                    self._copy_back(chunk, piece, leaves[piece], weights, stored)
            for piece in active:
                self._note_state(chunk, piece, inner.state.get(leaves[piece], {}), stored, new)
                if self._master_dtype is not None:
                    piece.of(weights[piece.weight.name]).copy_(leaves[piece])
            owns = self._buffers.store.engine.device.owns
            for where, value in new.items():
                if owns(value):
                    new[where] = value.clone()

            def is_changed(key: str, value: Any) -> bool:
                if key not in given:
                    return key not in known
                if value is not given[key]:
                    return True
                if isinstance(value, Tensor):  # not by its value, for which a device would be waited for
                    return value._version != versions[key]
                return isinstance(value, CONTAINERS) and not same(value, hyper[key])

            return {key: value for key, value in group.items() if key != "params" and is_changed(key, value)}, new
        finally:
            group["params"] = []
            inner.state.clear()

    def _leaf(self, chunk: Chunk, piece: Piece, weights: Mapping[str, Tensor], stored: Callable[[Piece, str], Tensor], new: New) -> Tensor:
        """What the optimizer updates: the weight, or its master."""
        own = piece.of(weights[piece.weight.name])
        if self._master_dtype is None:
            return own
        if MASTER in chunk.tensors[piece]:
            return stored(piece, MASTER)
        master = chunk.values[piece].get(MASTER)
        if master is None:
            master = new[piece, MASTER] = own.to(self._master_dtype, copy=True)
        assert isinstance(master, Tensor)
        return master

    def _copy_back(
        self, chunk: Chunk, piece: Piece, leaf: Tensor, weights: Mapping[str, Tensor], stored: Callable[[Piece, str], Tensor]
    ) -> None:
        if self._master_dtype is None:
            piece.of(weights[piece.weight.name]).copy_(leaf)
        elif MASTER in chunk.tensors[piece]:
            stored(piece, MASTER).copy_(leaf)

    def made_state(self, leaf: Tensor, group: int) -> dict[str, Any]:
        """The state that a parameter has before its first step, of classes that make it when they are made."""
        return dict(self._factories[group]([leaf], **self._options).state.get(leaf, {}))

    @staticmethod
    def _note_made(chunk: Chunk, leaves: Mapping[Piece, Tensor], new: New) -> None:
        """State that the optimizer makes when it is made."""
        assert chunk.inner is not None
        for piece, leaf in leaves.items():
            for key, value in chunk.inner.state.get(leaf, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1:
                    new[piece, key] = value
                else:
                    chunk.values[piece][key] = value

    def _note_state(self, chunk: Chunk, piece: Piece, state: Mapping[str, Any], stored: Callable[[Piece, str], Tensor], new: New) -> None:
        """What a step has left behind: most optimizers change their tensors in place, some put others in their stead."""
        tensors, values = chunk.tensors[piece], chunk.values[piece]
        owns = self._buffers.store.engine.device.owns
        found: dict[str, Any] = {}
        for key, value in state.items():
            # Memory of the store in another place than its own: the gradient itself, or two tensors that have changed places, of which
            # neither may be written before the other is read.
            elsewhere = isinstance(value, Tensor) and not (key in tensors and value is stored(piece, key)) and owns(value)
            found[key] = value.clone() if elsewhere else value
        for key in (tensors.keys() | values.keys()) - found.keys() - {MASTER}:  # it was dropped
            tensors.pop(key, None)
            values.pop(key, None)
        for key, value in found.items():
            if not isinstance(value, Tensor) or value.numel() <= 1:
                tensors.pop(key, None)
                new.pop((piece, key), None)
                values[key] = value
                continue
            values.pop(key, None)  # None, say, until there is a tensor
            if key not in tensors:
                new[piece, key] = value
                continue
            mine = stored(piece, key)
            if value is not mine:
                _check_same(mine, value, key, self.name)
                mine.copy_(value)

    def keep(self, chunk: Chunk, new: New) -> None:
        """State that a step has created becomes a block."""
        for (piece, key), value in new.items():
            if value.numel() <= 1:
                chunk.values[piece][key] = value
        tensors = {(piece, key): value for (piece, key), value in new.items() if value.numel() > 1}
        if not tensors:
            return
        # One block for all: pieces whose first gradient comes later than that of others do not each get one of their own.
        before = list(chunk.blocks)
        if before:
            with self._buffers.lease(*before) as leased:
                blocks = dict(zip(before, (leased,) if len(before) == 1 else leased, strict=True))
                for piece, names in chunk.tensors.items():
                    tensors.update({(piece, key): blocks[name][f"{key}.{piece.key}"].clone() for key, name in names.items()})
        self._new_block(chunk, tensors)
        for name in before:
            chunk.blocks.remove(name)
            self._buffers.delete(name)

    def replace(self, chunk: Chunk, new: New, values: dict[Piece, dict[str, Any]]) -> None:
        """Have this state and no other."""
        for name in chunk.blocks:
            self._buffers.delete(name)
        chunk.blocks = []
        chunk.tensors = {piece: {} for piece in chunk.pieces}
        chunk.values = values
        if new:
            self._new_block(chunk, new)

    def _new_block(self, chunk: Chunk, tensors: New) -> None:
        name = chunk.name
        while name in chunk.blocks or name in self._buffers.store:  # also of chunks that were cut in another way
            name += "+"
        self._buffers.declare(name, [(f"{key}.{piece.key}", value.dtype, tuple(value.shape)) for (piece, key), value in tensors.items()])
        with self._buffers.lease(name, write=[name], fresh=[name]) as block:
            for (piece, key), value in tensors.items():
                block[f"{key}.{piece.key}"].copy_(value)
        chunk.blocks.append(name)
        for piece, key in tensors:
            chunk.tensors[piece][key] = name


def _check_same(mine: Tensor, value: Tensor, key: str, name: str) -> None:
    if value.shape != mine.shape or value.dtype != mine.dtype:
        raise TrainingError(
            f"{name} has changed the shape or dtype of its state {key!r}",
            need=f"{tuple(mine.shape)}, {mine.dtype}",
            have=f"{tuple(value.shape)}, {value.dtype}",
            remedy="use an optimizer whose state keeps its shape",
        )
