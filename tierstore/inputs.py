"""What callers hand to a store, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tierstore.catalog import Block, check_text, lay_out
from tierstore.errors import OptionError, TensorError
from tierstore.mover.operations import Source, Tensors
from tierstore.nvme.safetensors import check_can_be_read
from tierstore.residency import Tier
from tierstore.tiers.device import NAMES


def source_of(block: str, tensors: torch.Tensor | Tensors) -> tuple[Source, bool]:
    """Check what a caller gave, and note where its making stands. Returns (source, it was one bare tensor).

    Raises:
        TensorError: Something that is not a dense tensor of real numbers with values.
    """
    check_text(block, what="block name", block=block)
    single = isinstance(tensors, torch.Tensor)
    mapping: Tensors = {block: tensors} if isinstance(tensors, torch.Tensor) else tensors
    if not isinstance(mapping, Mapping) or not mapping:
        have = f"an empty {type(mapping).__name__}" if isinstance(mapping, Mapping) else type(mapping).__name__
        raise TensorError(
            f"block {block!r} needs tensors",
            need="a tensor, or a mapping of names to one or more",
            have=have,
            remedy='hand over a mapping, such as module.state_dict() or {"0": first, "1": second}, or torch.as_tensor() of numbers',
            block=block,
        )
    checked: dict[str, torch.Tensor] = {}
    made: dict[torch.device, torch.cuda.Event] = {}
    for name, tensor in mapping.items():
        problem, remedy = _unsuitable(tensor)
        if problem:
            raise TensorError(
                f"tensor {name!r} of block {block!r} {problem}", need="a dense tensor with values", remedy=remedy, block=block, tensor=name
            )
        checked[name] = tensor.detach().resolve_conj()
        if tensor.is_cuda and tensor.device not in made:
            made[tensor.device] = torch.cuda.Event(blocking=True)
            made[tensor.device].record(torch.cuda.current_stream(tensor.device))
    return Source(checked, tuple(made.values())), single


def _unsuitable(tensor: object) -> tuple[str, str]:
    if not isinstance(tensor, torch.Tensor):
        return f"is not a tensor but {type(tensor).__name__}", "wrap it with torch.as_tensor()"
    if tensor.is_meta:
        return "is on the meta device and has no values", "initialise it first"
    if tensor.layout is not torch.strided:
        return f"is sparse ({tensor.layout})", "store .to_dense(), or its indices and values"
    if tensor.is_complex() and tensor.dtype not in NAMES:
        return f"is complex ({tensor.dtype})", "store torch.view_as_real(tensor)"
    if tensor.dtype not in NAMES:
        return f"has the dtype {tensor.dtype}, which safetensors cannot hold", f"convert it to one of {', '.join(map(str, NAMES))}"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"is on the device {tensor.device}", "move it to the CPU"
    return "", ""


def block_of(name: str, source: Source, *, single: bool, frozen: bool) -> Block:
    specs = [(tensor, NAMES[value.dtype], tuple(value.shape)) for tensor, value in source.tensors.items()]
    block = lay_out(name, specs, single=single, frozen=frozen)
    check_can_be_read(block)
    return block


def tier_of(value: str | Tier) -> Tier:
    """A tier by name.

    Raises:
        OptionError: There is no such tier.
    """
    try:
        return Tier(value)
    except ValueError:
        raise OptionError(f"unknown tier {value!r}", need="'gpu', 'ram' or 'nvme'", remedy="name one of these") from None
