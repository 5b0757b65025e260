"""`from_pretrained`: a model of transformers, attached to a store that reads its weights from the model's own files."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tierstore.errors import OptionError, SizeError, TensorError
from tierstore.huggingface.checkpoint import Checkpoint
from tierstore.huggingface.hollow import Hollow, hollow, solid
from tierstore.residency import Tier
from tierstore.sync import TierStore
from tierstore.training.initial import ModelFiles
from tierstore.training.layers import Tiered, attach
from tierstore.training.structure import Structure, Weight, WeightBlock

if TYPE_CHECKING:
    from tierstore.huggingface.loading import Origin, Skeleton

log = logging.getLogger("tierstore")

INSTALL = 'pip install "tierstore[huggingface]"'

RESIDENT_SHARE = 4
"""Adapters stay on the device where all of them take at most one part in so many of it, and with their gradients and state in RAM where
all that takes at most one part in so many of that."""

STATE_COPIES = 4
"""Of a parameter beside its weights: its gradient, and what AdamW keeps, with a master."""


def from_pretrained(
    path: str | os.PathLike[str],
    store: TierStore,
    *,
    adapt: Callable[[Any], Any] | None = None,
    model_class: Any = None,
    dtype: torch.dtype | str | None = None,
    layers: object = None,
    micro_batch: int | None = None,
    activations: Literal["device", "ram", "nvme"] = "device",
    split: Collection[str] | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Tiered]:
    """A model of transformers from its folder, attached to a store. It is never whole in memory, and its files are never written.

        model, tiered = from_pretrained("SmolLM2-135M", store)
        model.generate(**tokenizer("The capital of France is", return_tensors="pt"))

    What the files hold as the model wants it is read from them whenever it is needed, also by later runs on the same store. Blocks that
    have to be made (another dtype, experts that transformers fuses, weights that no file has) are put into the store, one after the other.
    On a store that holds a commit of this model, its values are taken.

    Args:
        path: A folder with config.json and safetensors files, as on the Hugging Face Hub. Nothing is downloaded, and no code in it is run.
        store: As in `attach`.
        adapt: Called with the model before its weights are there: to freeze parameters, or to add adapters, as in
            `lambda model: peft.get_peft_model(model, LoraConfig(...))`. Returns the model to attach; None: the same.
        model_class: A class of transformers, or an auto class. None: `AutoModelForCausalLM`.
        dtype: Of the weights; None: that of the configuration, as in transformers.
        layers: As in `attach`, and so are `micro_batch`, `activations` and `split`.
        attn_implementation: As in transformers, which may fetch a kernel of that name. None: what the configuration says, if transformers
            has it itself, else its default: a folder never has anything fetched.

    Returns:
        The model, in evaluation mode (call `train()` where dropout is wanted), and what holds it and the store together. Its
        `save_pretrained` works as ever.

    Raises:
        OptionError: No such folder, a quantised model, or one that transformers does not know.
        TensorError: A tensor does not fit the configuration.
        ModelFileError: A file is damaged or missing.
        CapacityError: A block is too large for the budgets.
    """
    require("transformers")
    from tierstore.huggingface.loading import build  # noqa: PLC0415  # of an extra
    from tierstore.huggingface.saving import replace_saving  # noqa: PLC0415  # as above

    checkpoint = Checkpoint(path)
    skeleton = build(checkpoint, model_class, dtype, attn_implementation)
    if skeleton.num_converted:
        log.info("%d tensors of %s are converted for transformers: their blocks are put, not adopted", skeleton.num_converted, path)
    model, origins = _adapted(skeleton, adapt)
    files = _Files(checkpoint, skeleton.model, origins)
    tiered = attach(model, store, layers, micro_batch=micro_batch, activations=activations, split=split, init=files)
    _hold_adapters(tiered)
    replace_saving(tiered)
    return model, tiered


def require(*packages: str) -> None:
    """Say in words what is not installed.

    Raises:
        OptionError: One of these.
    """
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        raise OptionError(f"{' and '.join(lacking)} is not installed", remedy=INSTALL)


def _adapted(skeleton: Skeleton, adapt: Callable[[Any], Any] | None) -> tuple[Any, dict[int, Origin]]:
    """The model as the user wants it, and the origin of each of its parameters, by id."""
    model: Any = skeleton.model
    if adapt is None:
        return model, skeleton.origins
    made: dict[int, nn.Parameter] = {}
    for name, slots in _slots(model):
        parameter = _of(slots[0])
        origin = skeleton.origins.get(id(parameter))
        if origin is not None:
            made[id(parameter)] = hollow(name, parameter, origin)
            for module, attribute in slots:
                module._parameters[attribute] = made[id(parameter)]
    changed = adapt(model)
    model = model if changed is None else changed
    if not isinstance(model, nn.Module):
        raise OptionError("adapt= returned no model", need="a module, or None", have=type(model).__name__, remedy="return the model")
    origins: dict[int, Origin] = {}
    for _, slots in _slots(model):
        parameter = _of(slots[0])
        if isinstance(parameter, Hollow):
            filled = solid(parameter)
            origins[id(filled)] = parameter.__dict__["origin"]
            for module, attribute in slots:
                module._parameters[attribute] = filled
    return model, origins


def _slots(model: nn.Module) -> list[tuple[str, list[tuple[nn.Module, str]]]]:
    """Each parameter's first name, and the places where it hangs."""
    found: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (name, []))[1].append((module, attribute))
    return list(found.values())


def _of(slot: tuple[nn.Module, str]) -> nn.Parameter:
    parameter = slot[0]._parameters[slot[1]]
    assert parameter is not None
    return parameter


def _hold_adapters(tiered: Tiered) -> None:
    """Keep what is trained beside a frozen model where it is, if it is small: it is needed in every step, and changes in every step.

    Else the drive would be written to in each: what is needed furthest in the future is the state that was just used, and not a layer.
    """
    store, blocks = tiered.store, tiered.structure.blocks
    trained = [block for block in blocks if block.trainable]
    if not trained or len(trained) == len(blocks):
        return
    weights = sum(store.info(block.name).nbytes for block in trained)
    state = STATE_COPIES * sum(max(weight.dtype.itemsize, 4) * weight.numel for block in trained for weight in block.weights)
    arenas = store.engine.placement.arenas
    if weights * RESIDENT_SHARE <= arenas[Tier.GPU].capacity_bytes:
        tier = "gpu"
    elif (weights + state) * RESIDENT_SHARE <= arenas[Tier.RAM].capacity_bytes:
        tier = "ram"
    else:
        return
    for block in trained:
        store.hold(block.name, tier)
        if tier == "gpu" and not tiered.resumed:
            # The newest copy is to be the one that stays: that in RAM would be written to the drive when its place is needed.
            with store.use(block.name, write=True):
                pass
    if (weights + state) * RESIDENT_SHARE <= arenas[Tier.RAM].capacity_bytes:
        tiered.buffers.held_on = "ram"
        for name in [name for name in store if name.startswith(("gradients/", "optimizer/"))]:
            store.hold(name, "ram")


class _Files(ModelFiles):
    """The weights of a model folder.

    Attributes:
        of: Where each weight of the attached model comes from, of those that a file has.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, origins: dict[int, Origin]) -> None:
        self.of: dict[Weight, Origin] = {}
        self._checkpoint = checkpoint
        self._model = model
        self._origins = origins
        self._adoptable: list[WeightBlock] = []

    def name(self, structure: Structure) -> None:
        found = [(weight, self._origins.get(id(_of(weight.slots[0])))) for weight in structure.weights]
        self.of = {weight: origin for weight, origin in found if origin is not None}
        keys = [origin.key for origin in self.of.values()]
        once = {key for key in keys if key is not None and keys.count(key) == 1} if len(set(keys)) < len(keys) else set(keys)
        for block in structure.blocks:
            if all(self._is_as_stored(weight, once) for weight in block.weights):
                self._adoptable.append(block)
                for weight in block.weights:
                    key = self.of[weight].key
                    assert key is not None
                    weight.stored = key

    def _is_as_stored(self, weight: Weight, once: Collection[str | None]) -> bool:
        origin = self.of.get(weight)
        if origin is None or origin.key is None or origin.key not in once:
            return False
        return self._checkpoint.tensors[origin.key].dtype == weight.dtype

    def adopt(self, structure: Structure, store: TierStore) -> Collection[str]:
        blocks = {weight.stored: block.name for block in self._adoptable for weight in block.weights}
        num_put = len(structure.blocks) - len(self._adoptable)
        if num_put:
            log.info(
                "%d blocks of %d have to be made, and are put into the store: the files do not hold them as they are",
                num_put,
                len(structure.blocks),
            )
        try:
            return store.adopt(self._checkpoint.source, layout=blocks.get) if blocks else ()
        except SizeError as error:
            remedy = f"raise {error.tier}="  # what makes a block is the model's own
            raise SizeError(error.problem, need=error.need, have=error.have, remedy=remedy, **error.details) from error

    def fill(self, modules: list[tuple[str, nn.Module]], weights: list[Weight]) -> None:
        from tierstore.huggingface.loading import convert  # noqa: PLC0415  # of an extra

        homeless = next((weight.name for weight in weights if weight not in self.of), None)
        if homeless is not None:
            remedy = "have adapt= make parameters with values, on the CPU"
            raise TensorError(f"parameter {homeless!r} has no values, and no file has them", remedy=remedy, tensor=homeless)
        _give_memory_back()
        with self._checkpoint.reading() as files, torch.no_grad():
            converted = [weight for weight in weights if self.of[weight].key is None]
            values = convert(self._model, dict.fromkeys(self.of[weight] for weight in converted), files)
            for weight in converted:
                _of(weight.slots[0]).copy_(values[self.of[weight].name])
            values.clear()
            for weight in weights:
                key = self.of[weight].key
                if key is not None:  # one at a time takes room
                    _of(weight.slots[0]).copy_(files[key])


def _give_memory_back() -> None:
    """Have the C library let go of what was freed: glibc does not find aligned memory again, and would grow by each unit that is made."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
