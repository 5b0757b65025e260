"""Which tensors of a model make which block. Pure, but for the caller's function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tierstore.catalog import STATE_PREFIXES, Block, lay_out
from tierstore.errors import ModelFileError, OptionError, SizeError, TensorError
from tierstore.nvme.adopted import Adopted
from tierstore.nvme.model_files import FoundTensor, Model, natural
from tierstore.nvme.safetensors import check_can_be_read

Layout = Literal["layers"] | Callable[[str], str | None]
"""How blocks are made of tensors: by layer, or by a function from a tensor's full name to its block's, or to None to leave it out."""

ROOT = "model"
"""The block of tensors whose names have one part only, as `tierstore.training` calls what the model itself owns."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A block to be registered, and where it lies."""

    block: Block
    adopted: Adopted


def by_layer(name: str) -> str:
    """A tensor's block: what its name has up to the first running number ("model.layers.3"), else its module ("model.norm")."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or ROOT


def claims(model: Model, layout: Layout) -> list[Claim]:
    """The blocks of a model, by the first file that has some of them and then by name, numbers as numbers.

    Raises:
        OptionError: The layout is none, or names no block.
        ModelFileError: A name that no block or tensor can have.
        SizeError: A block too large for the file format.
        Exception: Whatever the caller's function raises.
    """
    if layout != "layers" and not callable(layout):
        need = "'layers', or a function from a tensor's name to its block's"
        raise OptionError("layout= is not understood", need=need, have=repr(layout)[:200], remedy="give one of these")
    name_of = by_layer if layout == "layers" else layout
    grouped: dict[str, list[FoundTensor]] = {}
    for tensor in model.tensors:
        block = name_of(tensor.name)
        if block is not None:
            _check_block_name(block, tensor, model)
            grouped.setdefault(block, []).append(tensor)
    if not grouped:
        raise OptionError(
            f"layout= leaves nothing of {model.path}",
            need="at least one tensor",
            have=f"{len(model.tensors)} tensors, all left out" if model.tensors else "a model without tensors",
            remedy="return a block's name for some of them",
            path=model.path,
        )
    order = sorted(grouped, key=lambda name: (grouped[name][0].file, natural(name)))
    return [_claim(name, grouped[name], model) for name in order]


def _check_block_name(block: object, tensor: FoundTensor, model: Model) -> None:
    path = model.files[tensor.file].path
    if not isinstance(block, str):
        need = "a block's name, or None to leave the tensor out"
        have = f"{type(block).__name__} for {tensor.name[:200]!r}"
        raise OptionError("layout= returned no name", need=need, have=have, remedy="return such", path=path, tensor=tensor.name)
    if block.startswith(STATE_PREFIXES):
        raise ModelFileError(
            f"tensor {tensor.name[:200]!r} of {path} would be in block {block[:200]!r}, a name kept for training state",
            need=f"a name that does not begin with {', '.join(STATE_PREFIXES)}",
            remedy="give layout= a function that returns another name",
            path=path,
            tensor=tensor.name,
            block=block,
        )


def _claim(name: str, tensors: list[FoundTensor], model: Model) -> Claim:
    path = model.files[tensors[0].file].path
    try:
        block = lay_out(name, [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
        check_can_be_read(block)
    except TensorError as error:
        details = {**error.details, "path": path}
        raise ModelFileError(f"{path}: {error.problem}", need=error.need, have=error.have, remedy=error.remedy, **details) from error
    except SizeError as error:
        details = {**error.details, "path": path}
        raise SizeError(f"{path}: {error.problem}", need=error.need, have=error.have, remedy=error.remedy, **details) from error
    used: Mapping[int, int] = {file: index for index, file in enumerate(dict.fromkeys(tensor.file for tensor in tensors))}
    places = tuple((used[tensor.file], tensor.begin) for tensor in tensors)
    return Claim(block, Adopted(tuple(model.files[file] for file in used), places))
