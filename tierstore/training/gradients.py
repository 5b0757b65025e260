"""Gradients in the store: added up over one backward pass, then over several, as `.grad` is in plain torch.

[Note: In which order gradients are added]
Sums in floating point depend on their order, so ours is that of torch. All contributions to a parameter within one backward pass are added
one by one, in the order in which autograd comes upon them; then the sum is added to what earlier passes have accumulated. A unit whose
parameters are used in several places of the graph (tied weights, a module called twice) therefore hands its sum on: the next one starts
from it (`Partial`), and only the last one, or the end of the backward pass, adds it to the accumulated gradient.

[Note: None is not zero]
A parameter that had no part in a backward pass (an expert without tokens) has no gradient, and an optimizer passes it by, while a zero
gradient would move it by its momentum and decay. Which parameters have one is kept beside the block, never in it.

[Note: From the last part to the first]
Updates use up the parts from the first to the last, and small extents lie in a stack (`arena`, [Note: Two ends]). Written in the opposite
order, what is used up first lies on top, and leaves one hole that grows instead of many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tierstore.catalog import extent_bytes
from tierstore.errors import CapacityError, DeadlockError
from tierstore.training.leasing import Buffers, Tensors, rounded
from tierstore.training.pieces import Piece, Stored, gather, parse_piece
from tierstore.training.structure import Weight, WeightBlock

PREFIX = "gradients/"

TOGETHER = 16
"""Parts are leased at once while they take at most one part in so many of the device."""

Sums = dict[Weight, Tensor]
Observe = Callable[[Sums], None]


@dataclass(eq=False, slots=True)
class Part:
    """A block that holds gradients of pieces of one block of weights.

    Attributes:
        present: The weights whose gradient it holds now.
        nbytes: What its tensors take.
    """

    name: str
    pieces: list[Piece]
    declared: bool = False
    present: set[Weight] = field(default_factory=set)
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(piece.numel * piece.weight.dtype.itemsize for piece in self.pieces)

    @property
    def block_bytes(self) -> int:
        """What the block takes."""
        return part_bytes(self.pieces)


def part_bytes(pieces: Iterable[Piece]) -> int:
    """What a block with the gradients of these pieces takes."""
    return rounded(extent_bytes(piece.numel * piece.weight.dtype.itemsize for piece in pieces))


class Sum:
    """Gradients of one block of weights, in one or several parts."""

    def __init__(self, buffers: Buffers, block: WeightBlock, suffix: str = "") -> None:
        self._buffers = buffers
        self._suffix = suffix
        self.block = block
        self.parts: list[Part] = []
        self.cut([[Piece(weight) for weight in block.weights]])

    def cut(self, pieces: Iterable[list[Piece]]) -> None:
        """Have these parts from now on. Gradients that are there are carried over."""
        lists = [mine for mine in pieces if mine]
        before = self.parts
        if [part.pieces for part in before] == lists:
            return
        taken = {part.name for part in before if part.declared}
        self.parts = []
        for number, mine in enumerate(lists):
            name = f"{PREFIX}{self.block.name}{self._suffix}" + (f"/{number}" if len(lists) > 1 else "")
            while name in taken:
                name += "'"
            self.parts.append(Part(name, mine))
        stored = [Stored(part.name, piece.key, "", piece) for part in before for piece in part.pieces if piece.weight in part.present]
        if stored:
            for part in self.parts:
                self._fill(part, gather(self._buffers.store, stored, part.pieces))
        for part in before:
            if part.declared:
                self._buffers.delete(part.name)

    def _fill(self, part: Part, values: Mapping[tuple[Piece, str], Tensor]) -> None:
        if not values:
            return
        self._declare(part)
        with self._buffers.lease(part.name, write=[part.name], fresh=[part.name]) as tensors:
            for (piece, _), value in values.items():
                tensors[piece.key].copy_(value)
        part.present.update(piece.weight for piece, _ in values)

    @property
    def present(self) -> set[Weight]:
        return set().union(*(part.present for part in self.parts))

    def add(self, sums: Sums, observe: Observe | None = None) -> None:
        """Add gradients, on the device.

        Args:
            sums: What to add.
            observe: Is shown all totals, whole, row-major and on the device, several or one at a time.
        """
        present = self.present
        totals: Sums = {}
        left = Counter(piece.weight for part in self.parts for piece in part.pieces if piece.weight in sums and piece.weight in present)

        def show(part: Part, tensors: Tensors) -> None:
            if observe is not None and left:
                _show(tensors, [piece for piece in part.pieces if piece.weight in left], totals, left, observe)

        # See [Note: From the last part to the first].
        for parts in self._together([part for part in reversed(self.parts) if any(piece.weight in sums for piece in part.pieces)]):
            self._add(parts, sums, show)
        if observe is not None:
            _show_given({weight: grad for weight, grad in sums.items() if weight not in present}, observe)

    def _together(self, parts: Iterable[Part]) -> Iterator[list[Part]]:
        """Several at once, for each lease costs the host as much as any other, as long as they are a small part of the device."""
        limit = self._buffers.device_bytes // TOGETHER
        group: list[Part] = []
        for part in parts:
            if group and sum(each.nbytes for each in group) + part.nbytes > limit:
                yield group
                group = []
            group.append(part)
        if group:
            yield group

    def _add(self, parts: list[Part], sums: Sums, show: Callable[[Part, Tensors], None]) -> None:
        """Add to some parts. Where they find no room together, beside what their owner and others have leased, one by one."""
        for part in parts:
            self._declare(part)
        names = [part.name for part in parts]
        fresh = [part.name for part in parts if not part.present]
        with ExitStack() as stack:
            try:
                leased = stack.enter_context(self._buffers.lease_all(names, write=names, fresh=fresh))
            except (CapacityError, DeadlockError):
                if len(parts) == 1:
                    raise
                leased = {}
            for part in parts if leased else ():
                _write(part, leased[part.name], sums)
                show(part, leased[part.name])
        # Only now: what leaves a fresh lease by an exception has no content.
        for part in parts:
            if leased:
                part.present.update(piece.weight for piece in part.pieces if piece.weight in sums)
            else:
                self._add([part], sums, show)

    def take(self) -> Sums:
        """All there is, as tensors on the device, and nothing is left."""
        found: Sums = {}
        for part in self.parts:
            if not part.present:
                continue
            with self._buffers.lease(part.name, write=[part.name], spent=[part.name]) as tensors:
                self._copy_out(part, tensors, found, part.present)
            part.present.clear()
        return found

    def read(self, weight: Weight) -> Tensor | None:
        """A copy of one gradient, on the device."""
        found: Sums = {}
        for part in self.parts:
            if weight in part.present:
                with self._buffers.lease(part.name) as tensors:
                    self._copy_out(part, tensors, found, {weight})
        return found.get(weight)

    @staticmethod
    def _copy_out(part: Part, tensors: Mapping[str, Tensor], found: Sums, wanted: Collection[Weight]) -> None:
        for piece in part.pieces:
            if piece.weight in wanted:
                mine = tensors[piece.key]
                if piece.start is None:
                    found[piece.weight] = mine.clone()
                else:
                    piece.of(_whole(found, piece.weight, mine)).copy_(mine)

    def erase(self, weights: Collection[Weight] | None = None) -> None:
        """Have no gradient of these any more (None: of any)."""
        for part in self.parts:
            if not part.present:
                continue
            part.present = set() if weights is None else part.present - set(weights)
            if not part.present:
                self._buffers.give_up([part.name])

    def erase_part(self, part: Part) -> None:
        """Have none of the gradients of a part any more."""
        if part.present:
            part.present = set()
            self._buffers.give_up([part.name])

    def forget(self) -> None:
        """Delete the blocks."""
        for part in self.parts:
            if part.declared:
                self._buffers.delete(part.name)
                part.declared = False
            part.present.clear()

    def _declare(self, part: Part) -> None:
        if not part.declared:
            self._buffers.declare(part.name, [(piece.key, piece.weight.dtype, piece.shape) for piece in part.pieces])
            part.declared = True

    def restore(self, present: Mapping[str, Collection[str]]) -> None:
        """Take over what a commit holds, in the pieces in which it does.

        Args:
            present: The weights that have a gradient, by the block that holds it.
        """
        weights = {weight.name: weight for weight in self.block.weights}
        parts: list[Part] = []
        for name, names in present.items():
            if name in self._buffers.store:
                pieces = [parse_piece(key, weights) for key in self._buffers.store.info(name).tensors]
                mine = [piece for piece in pieces if piece is not None]
                if mine and len(mine) == len(pieces):
                    parts.append(Part(name, mine, declared=True, present={weights[each] for each in names}))
        if parts:
            rest = [Piece(weight) for weight in self.block.weights if not any(weight is p.weight for part in parts for p in part.pieces)]
            self.parts = [*parts, *([Part(f"{PREFIX}{self.block.name}{self._suffix}/rest", rest)] if rest else [])]


def _write(part: Part, tensors: Tensors, sums: Sums) -> None:
    """Add to what the part holds. One call for all: each costs the host as much as a kernel."""
    held: list[tuple[Tensor, Tensor]] = []
    new: list[tuple[Tensor, Tensor]] = []
    for piece in part.pieces:
        if piece.weight not in sums:
            continue
        pairs = held if piece.weight in part.present else new
        pairs.append((tensors[piece.key], piece.of(sums[piece.weight])))
        if piece.start is not None and not sums[piece.weight].is_contiguous():  # all of it was copied for that: one at a time takes room
            _write_pairs(held, new)
    _write_pairs(held, new)


def _write_pairs(held: list[tuple[Tensor, Tensor]], new: list[tuple[Tensor, Tensor]]) -> None:
    """Add to what is held, copy what is new, and empty both lists."""
    if held:
        torch._foreach_add_([mine for mine, _ in held], [more for _, more in held])
    if new:
        torch._foreach_copy_([mine for mine, _ in new], [more for _, more in new])
    held.clear()
    new.clear()


def _show(tensors: Tensors, pieces: Sequence[Piece], totals: Sums, left: Counter[Weight], observe: Observe) -> None:
    """Show totals that were added up: inside the lease, as soon as all ranges of a weight are there.

    Args:
        tensors: Of the part that was written last.
        pieces: Of these, those to be shown.
        totals: What comes together of ranges.
        left: How many ranges of each weight are yet to come.
        observe: See `Sum.add`.
    """
    whole = {piece.weight: tensors[piece.key] for piece in pieces if piece.start is None}
    if whole:
        observe(whole)
    for piece in pieces:
        if piece.start is None:
            continue
        piece.of(_whole(totals, piece.weight, tensors[piece.key])).copy_(tensors[piece.key])
        left[piece.weight] -= 1
        if not left[piece.weight]:  # one at a time takes room
            observe({piece.weight: totals.pop(piece.weight)})


def _show_given(sums: Sums, observe: Observe) -> None:
    """Show totals that are what was given, since nothing was there before: whole already, and the bits that are stored."""
    plain = {weight: grad for weight, grad in sums.items() if grad.dtype is weight.dtype and grad.is_contiguous()}
    if plain:
        observe(plain)
    for weight, grad in sums.items():
        if weight not in plain:  # one at a time takes room
            observe({weight: grad.to(weight.dtype).contiguous()})


def _whole(known: Sums, weight: Weight, like: Tensor) -> Tensor:
    """The tensor in which ranges of a weight's gradient come together."""
    if weight not in known:
        known[weight] = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
    return known[weight]


@dataclass(eq=False, slots=True)
class Partial:
    """The sum of a backward pass under way.

    Attributes:
        task: Which pass; another one has nothing to do with it.
    """

    task: int
    sum: Sum


class Gradients:
    """The gradients of a model."""

    def __init__(self, buffers: Buffers, blocks: Iterable[WeightBlock]) -> None:
        self._buffers = buffers
        self.of = {block: Sum(buffers, block) for block in blocks if block.trainable}
        self._partials: dict[WeightBlock, Partial] = {}

    def begin(self, block: WeightBlock, task: int) -> Sums:
        """What this backward pass has summed up for the block so far."""
        partial = self._partials.get(block)
        if partial is None:
            return {}
        if partial.task != task:  # that one failed half-way, and is lost as in plain torch
            partial.sum.erase()
            return {}
        return partial.sum.take()

    def keep(self, block: WeightBlock, task: int, sums: Sums) -> None:
        """Hand a sum on to whoever of this backward pass comes upon the block next, or to its end."""
        partial = self._partials.get(block)
        if partial is None:
            partial = self._partials[block] = Partial(task, Sum(self._buffers, block, "/partial"))
            partial.sum.cut([part.pieces for part in self.of[block].parts])
        partial.task = task
        partial.sum.add(sums)

    def erase_partials(self) -> None:
        """Drop what passes have left behind that failed half-way."""
        for partial in self._partials.values():
            partial.sum.erase()

    def kept(self, task: int) -> list[WeightBlock]:
        return [block for block, partial in self._partials.items() if partial.task == task and partial.sum.present]

    def cut(self, block: WeightBlock, pieces: Iterable[list[Piece]]) -> None:
        partial = self._partials.pop(block, None)
        if partial is not None:
            partial.sum.forget()
        self.of[block].cut(pieces)

    def forget(self) -> None:
        """Delete all blocks."""
        for total in [*self.of.values(), *(partial.sum for partial in self._partials.values())]:
            total.forget()
