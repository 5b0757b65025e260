"""`save_pretrained`: an attached model's weights as plain transformers, or PEFT, reads them, written block by block."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tierstore.catalog import ITEM_BYTES
from tierstore.errors import OptionError, TrainingError, TransferError
from tierstore.huggingface.checkpoint import INDEX, SINGLE
from tierstore.nvme.model_files import ADAPTERS
from tierstore.nvme.safetensors import LENGTH_BYTES
from tierstore.tiers.device import NAMES
from tierstore.training.layers import Tiered
from tierstore.training.structure import Weight
from tierstore.units import parse_size

SHARD = "model-{:05d}-of-{:05d}.safetensors"
TEMPORARY = ".part"


def save_pretrained(tiered: Tiered, directory: str | os.PathLike[str], *, max_shard_size: str | int = "5GB") -> None:
    """Write what plain libraries load: of a PEFT model its adapters, of a model of transformers all weights, and the configuration.

    Never more than one layer is in memory. Pending updates are carried out first. The model goes on being attached.

    Args:
        tiered: As `attach` or `from_pretrained` returned it.
        directory: Made if it is absent; what is in it under the same names is replaced.
        max_shard_size: Most bytes of tensors in one file.

    Raises:
        OptionError: `directory` is none, or is the folder that the model was read from, whose files are never written; or a model
            would lie beside adapters, which hide it.
        TrainingError: The model is neither of transformers nor of PEFT.
        TransferError, OSError: A file cannot be written.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise OptionError(f"{target} is not a directory", remedy="give a directory, or a name that is not taken")
    tiered.finish()
    model: Any = tiered.model
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        target.mkdir(parents=True, exist_ok=True)
        with _in_their_places(tiered, _trained(tiered)) as values:
            try:
                type(model).save_pretrained(model, os.fspath(target), state_dict=values)
            except SafetensorError as error:  # what the system refuses, too
                raise TransferError(
                    f"{target}: the adapters cannot be written ({error})", remedy="make room, or give another place"
                ) from error
    elif hasattr(model, "base_model_prefix") and hasattr(model, "config"):
        _refuse_own_files(tiered, target)
        refuse_adapters(target)
        target.mkdir(parents=True, exist_ok=True)
        _save_whole(tiered, target, parse_size(max_shard_size, what="max_shard_size="))
    else:
        remedy = "commit, and take the weights out with `tierstore export`"
        raise TrainingError(f"{type(model).__name__} is a model of neither transformers nor PEFT", remedy=remedy)


def _refuse_own_files(tiered: Tiered, target: Path) -> None:
    """Blocks are read from there still, now or by an older commit.

    Raises:
        OptionError: The model's own files would be replaced.
    """
    model: Any = tiered.model
    shards = list(tiered.store.engine.shards.values())
    adopted = {Path(file.path) for shard in shards if shard.adopted is not None for file in shard.adopted.files}
    real = target.resolve()
    folders = {Path(model.config.name_or_path).resolve()} if model.config.name_or_path else set()
    if real in folders | {file.parent for file in adopted} or any(old.resolve() in adopted for old in _replaced(target)):
        raise OptionError(f"{target} is the folder of the model, whose files are never written", remedy="give another directory")


def refuse_adapters(target: Path) -> None:
    """Where somebody's adapters are, libraries load the model that these name, and not the one beside them.

    Raises:
        OptionError: There are some.
    """
    found = [name for name in ADAPTERS if (target / name).exists()]
    if found:
        raise OptionError(
            f"{target} holds adapters: transformers would load these, on the model that they name, and not the one to be written",
            have=", ".join(found),
            remedy="give another directory, or move them away",
        )


def _replaced(target: Path) -> list[Path]:
    """What of an earlier model is taken away."""
    return [*target.glob("model-*-of-*.safetensors"), target / SINGLE, target / INDEX]


def replace_saving(tiered: Tiered) -> None:
    """Have the model's own `save_pretrained` do this while it is attached."""
    tiered.replace_method(tiered.model, "save_pretrained", functools.partial(save_pretrained, tiered))


def _trained(tiered: Tiered) -> dict[Weight, Tensor]:
    """Values of the trainable parameters."""
    found: dict[Weight, Tensor] = {}
    for block in tiered.structure.blocks:
        if block.trainable:
            values: Any = tiered.store.read(block.name)
            found.update((weight, values[weight.stored]) for weight in block.weights)
    return found


@contextlib.contextmanager
def _in_their_places(tiered: Tiered, values: dict[Weight, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Have these parameters in the model for the time being: PEFT looks there for what modules have. Yields them by all their names."""
    try:
        for weight, value in values.items():
            parameter = nn.Parameter(value, requires_grad=weight.requires_grad)
            for module, attribute in weight.slots:
                module._parameters[attribute] = parameter
        yield {alias: value for weight, value in values.items() for alias in weight.aliases}
    finally:
        for weight in values:
            for module, attribute in weight.slots:
                module._parameters[attribute] = weight.stand_in


@dataclass(slots=True)
class _Shard:
    """One file to be written: tensors by name, in their order in it."""

    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    nbytes: int = 0

    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self.tensors.items():
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        text = json.dumps(entries, separators=(",", ":")).encode()
        length = -(-len(text) // 8) * 8
        return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def _save_whole(tiered: Tiered, target: Path, most: int) -> None:
    shards = [_Shard()]
    for name, tensor in _tensors(tiered, values=False):
        if shards[-1].nbytes and shards[-1].nbytes + tensor.nbytes > most:
            shards.append(_Shard())
        shards[-1].tensors[name] = (NAMES[tensor.dtype], tuple(tensor.shape))
        shards[-1].nbytes += tensor.nbytes
    names = [SINGLE] if len(shards) == 1 else [SHARD.format(number, len(shards)) for number in range(1, len(shards) + 1)]
    tensors = _tensors(tiered, values=True)
    for name, shard in zip(names, shards, strict=True):
        with (target / f"{name}{TEMPORARY}").open("wb") as file:
            file.write(shard.header())
            for expected in shard.tensors:
                found, tensor = next(tensors)
                assert found == expected
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
    for old in _replaced(target):
        old.unlink(missing_ok=True)
    for name in names:
        (target / f"{name}{TEMPORARY}").replace(target / name)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard.tensors},
        }
        (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _save_configuration(tiered, target)


def _save_configuration(tiered: Tiered, target: Path) -> None:
    model: Any = tiered.model
    config = copy.deepcopy(model.config)
    if id(model.config) in tiered.uncached:
        config.use_cache = True
    config.architectures = [type(model).__name__]
    first = next(iter(tiered.structure.weights), None)
    if first is not None:
        config.dtype = str(first.dtype).removeprefix("torch.")
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)


def _tensors(tiered: Tiered, *, values: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the model by the names that files have, unit by unit; without `values` on the meta device."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415  # of an extra

    model: Any = tiered.model
    tied = getattr(model, "all_tied_weights_keys", {})
    done: set[Weight] = set()
    for unit in tiered.structure.units:
        mine = [weight for weight in unit.weights if weight not in done]
        done.update(mine)
        found: dict[str, Tensor] = {}
        read: dict[str, Any] = {}
        for weight in mine:
            name = next((alias for alias in weight.aliases if alias not in tied), weight.name)
            if values:
                block = weight.block.name
                if block not in read:
                    read[block] = tiered.store.read(block)
                found[name] = read[block][weight.stored]
            else:
                found[name] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        read.clear()
        yield from sorted(revert_weight_conversion(model, found).items())
    buffers: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if buffer is not None and attribute not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{attribute}" if prefix else attribute] = buffer.cpu() if values else buffer.to("meta")
    yield from sorted(revert_weight_conversion(model, buffers).items())
