"""Micro-batches: which arguments of a layer are split along the batch, and how its outputs are put together again."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tierstore.errors import TrainingError

PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
"""Arguments that cannot change, and outputs beside tensors that can be compared."""


@dataclass(slots=True)
class Arguments:
    """The arguments of one call, taken apart.

    Attributes:
        leaves: All leaves of the argument tree; None where a tensor was.
        where: For each tensor, its positions among the leaves.
        splits: For each tensor, whether it is split.
        batch: Length of the first dimension of those that are; -1: nothing is.
        sizes: Rows of each micro-batch; None: nothing is split.
        one_row_each: Each micro-batch comes to one row of the result, instead of as many as it has itself.
        containers: There may be lists or dicts among the arguments.
    """

    spec: TreeSpec
    leaves: list[Any]
    where: list[tuple[int, ...]]
    splits: list[bool]
    batch: int = -1
    sizes: list[int] | None = None
    one_row_each: bool = False
    containers: bool = False

    @property
    def count(self) -> int:
        return 1 if self.sizes is None else len(self.sizes)

    @property
    def rows_out(self) -> list[int]:
        """Rows of the result, by micro-batch."""
        assert self.sizes is not None
        return [1] * len(self.sizes) if self.one_row_each else self.sizes

    def rebuild(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with these tensors in place of those that were taken out."""
        args, kwargs = tree_unflatten(self._with(tensors), self.spec)
        return args, kwargs

    def _with(self, tensors: Sequence[Tensor]) -> list[Any]:
        """All leaves, these tensors in their places."""
        leaves = list(self.leaves)
        for positions, tensor in zip(self.where, tensors, strict=True):
            for position in positions:
                leaves[position] = tensor
        return leaves

    def check_unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor], layer: str) -> None:
        """Refuse a call that has changed a list or dict that it was given: those were made for it, and whoever has the others sees nothing.

        Args:
            args, kwargs: As `rebuild` returned them for `tensors`; the call is over.
            tensors: As above.
            layer: Its name.

        Raises:
            TrainingError: It has.
        """
        if not self.containers:
            return
        leaves, spec = tree_flatten((args, kwargs))
        expected = self._with(tensors)
        if len(leaves) != len(expected) or any(one is not other for one, other in zip(leaves, expected, strict=True)) or spec != self.spec:
            raise TrainingError(
                f"{layer!r} changes a list or dict that it was given",
                need="arguments that stay as they are: the backward pass computes with them once more",
                remedy="return what is new, and have the caller put it there",
            )

    def of_micro_batch(self, tensors: Sequence[Tensor], index: int) -> list[Tensor]:
        """The tensors of one micro-batch; those that are not split, whole."""
        if self.sizes is None:
            return list(tensors)
        start = sum(self.sizes[:index])
        return [tensor.narrow(0, start, self.sizes[index]) if split else tensor for tensor, split in zip(tensors, self.splits, strict=True)]


def take_apart(args: tuple[Any, ...], kwargs: dict[str, Any], *, merge: bool = False) -> tuple[Arguments, list[Tensor]]:
    """Flatten arguments. Returns them, and the tensors among them.

    Args:
        args, kwargs: The arguments.
        merge: Have a tensor that is given more than once be one there too: attention asks whether queries and keys are the same object,
            and computes in another way if they are. Micro-batches are split off for each argument by itself.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places: dict[int, list[int]] = {}
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            places.setdefault(id(leaf) if merge else position, []).append(position)
    where = [tuple(positions) for positions in places.values()]
    tensors = [leaves[positions[0]] for positions in where]
    for positions in where:
        for position in positions:
            leaves[position] = None
    containers = any(not isinstance(value, (Tensor, *PLAIN)) for value in (*args, *kwargs.values()))
    return Arguments(spec, leaves, where, [False] * len(where), containers=containers), tensors


def plan_split(
    arguments: Arguments,
    tensors: Sequence[Tensor],
    micro_batch: int,
    *,
    forward: Callable[..., Any],
    split: Collection[str] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    layer: str,
) -> None:
    """Decide which tensors to split into pieces of `micro_batch` rows, and note it in `arguments`.

    Raises:
        TrainingError: There is nothing to split by, or a tensor of which one cannot tell whether its rows are those of the batch.
    """
    first = next((value for value in args if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        first = next((tensor for tensor in tensors if tensor.dim()), None)
    if first is None:
        raise TrainingError(f"layer {layer!r} was called without a tensor to split", remedy="leave micro_batch= out")
    batch = first.shape[0]
    names = _names_of_tensors(forward, args, kwargs)
    for index, tensor in enumerate(tensors):
        if tensor.dim() == 0 or tensor.shape[0] != batch:
            if split is not None and names[index] in split:
                raise TrainingError(
                    f"argument {names[index]!r} of layer {layer!r} cannot be split",
                    need=f"{batch} rows",
                    have=str(tuple(tensor.shape)),
                    remedy="leave it out of split=",
                )
            continue
        if split is not None:
            arguments.splits[index] = tensor is first or names[index] in split
            continue
        if tensor is not first and batch in first.shape[1:] and tensor.shape != first.shape:
            raise TrainingError(
                f"argument {names[index]!r} of layer {layer!r}, of shape {tuple(tensor.shape)}, has as many rows as the batch, but the "
                f"batch has another dimension of that length too: {tuple(first.shape)}",
                need="to know whether its rows are those of the batch",
                remedy="name the arguments to split: attach(..., split=[...])",
            )
        arguments.splits[index] = True
    arguments.batch = batch
    arguments.sizes = sizes_of(batch, micro_batch)


def sizes_of(batch: int, micro_batch: int) -> list[int]:
    """Rows of each micro-batch, as `torch.split` has them."""
    whole, rest = divmod(batch, micro_batch)
    return [micro_batch] * whole + ([rest] if rest else []) or [0]


_POSITIONAL: weakref.WeakKeyDictionary[Callable[..., Any], list[str]] = weakref.WeakKeyDictionary()
"""What `_positional` found: to look at a signature takes longer than to run a small layer."""


def _positional(forward: Callable[..., Any]) -> list[str]:
    """Names of the parameters that take positional arguments."""
    function = getattr(forward, "__func__", forward)  # one for all layers of a class
    with contextlib.suppress(TypeError, KeyError):  # not everything can be referred to weakly
        return _POSITIONAL[function]
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
    with contextlib.suppress(TypeError):
        _POSITIONAL[function] = names
    return names


def _names_of_tensors(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """For each tensor among the arguments, the name of the parameter of `forward` that has it."""
    positional = _positional(forward)
    names: list[str] = []
    for index, value in enumerate(args):
        name = positional[index] if index < len(positional) else f"argument {index}"
        names += [name] * sum(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])
    for name, value in kwargs.items():
        names += [name] * sum(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])
    return names


@dataclass(slots=True)
class Outputs:
    """The outputs of one call, taken apart.

    Attributes:
        leaves: None where a tensor was.
        where: Positions of the tensors.
        differentiable: For each tensor, whether gradients flow through it.
    """

    spec: TreeSpec
    leaves: list[Any]
    where: list[int]
    differentiable: list[bool]

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for position, tensor in zip(self.where, tensors, strict=True):
            leaves[position] = tensor
        return tree_unflatten(leaves, self.spec)


def take_outputs_apart(result: Any) -> tuple[Outputs, list[Tensor]]:
    leaves, spec = tree_flatten(result)
    where = [position for position, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[position] for position in where]
    for position in where:
        leaves[position] = None
    return Outputs(spec, leaves, where, [tensor.requires_grad for tensor in tensors]), tensors


def check_alike(first: Outputs, other: Outputs, layer: str) -> None:
    """Refuse micro-batches whose outputs differ in more than their rows."""
    same = first.where == other.where and first.spec == other.spec
    same = same and all(a is b or (isinstance(a, PLAIN) and a == b) for a, b in zip(first.leaves, other.leaves, strict=True))
    if not same:
        remedy = "return what does not depend on the batch, or leave micro_batch= out"
        raise TrainingError(f"layer {layer!r} returned something else for each micro-batch", remedy=remedy)


def join(pieces: Sequence[Sequence[Tensor]], sizes: Sequence[int], layer: str) -> list[Tensor]:
    """Put the outputs of all micro-batches together, tensor by tensor.

    Raises:
        TrainingError: A tensor whose rows are not those of the batch.
    """
    for tensors, size in zip(pieces, sizes, strict=True):
        for tensor in tensors:
            if tensor.dim() == 0 or tensor.shape[0] != size:
                raise TrainingError(
                    f"layer {layer!r} returns a tensor whose rows are not those of its micro-batch",
                    need=f"{size} rows",
                    have=str(tuple(tensor.shape)),
                    remedy="leave micro_batch= out",
                )
    return [torch.cat(list(of_all)) for of_all in zip(*pieces, strict=True)]
