"""How a model falls into units that run and blocks that move. Reads the model, changes nothing.

A **unit** is a module whose forward leases what it needs: each layer; each outermost module beside the layers; and each module above a
layer that owns parameters itself (a scope). The parameters a unit owns are one block, or two where some of them are frozen; a parameter
that several units share is a block of its own.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tierstore.errors import OptionError, TrainingError

log = logging.getLogger("tierstore")

FROZEN_SUFFIX = "/frozen"
"""Behind the name of the block that holds the frozen parameters of a unit that has trainable ones too."""

ROOT = "model"
"""In place of the root module's empty name, as the name of the block of what it owns itself."""

ALIKE = 0.1
"""Beside the largest list of layers, others count as layers too whose modules are of its class, or that have this share of its parameters:
a decoder beside an encoder."""


class Kind(Enum):
    """What a unit is."""

    LAYER = "layer"
    """Split into micro-batches, and recomputed in the backward pass."""
    OUTER = "outer"
    """Recomputed in the backward pass, never split."""
    SCOPE = "scope"
    """Contains layers. Of what it owns itself it gets copies, for its forward and backward pass."""


@dataclass(eq=False, slots=True)
class Weight:
    """One parameter, shared or not.

    Attributes:
        name: Its first full name in the model.
        aliases: All full names that it has there, if several modules share it.
        index: Its position in `model.parameters()`.
        slots: (module, attribute) wherever it hangs.
        block: Where it lives; set once all blocks are known.
        stored: Its name in its block: that of the file that the block was adopted from, where that is another.
        stand_in: The placeholder that hangs in its place while the model is attached.
        origin: The parameter as it was before; without values while the model is attached.
    """

    name: str
    index: int
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    block: WeightBlock = field(init=False)
    stored: str = field(init=False)
    stand_in: nn.Parameter = field(init=False)
    origin: nn.Parameter | None = None

    def __post_init__(self) -> None:
        self.stored = self.name

    @property
    def numel(self) -> int:
        return self.shape.numel()


@dataclass(eq=False, slots=True)
class WeightBlock:
    """Parameters that move together.

    Attributes:
        name: The block's name in the store.
        weights: In the order of `model.parameters()`; either all trainable or all frozen.
    """

    name: str
    weights: list[Weight]

    @property
    def trainable(self) -> bool:
        return self.weights[0].requires_grad


@dataclass(eq=False, slots=True)
class Unit:
    """A module whose forward leases what it needs.

    Attributes:
        name: The module's full name.
        flat: Modules among them that keep a second list of their parameters (recurrent ones).
        inside: Ids of the module and all below it: those whose parameters are in place while the unit runs.
        census: The modules below each of them, and how many parameters it has: where these are computed again, none may come or go.
        batch_norms: Modules among them, by name, that in training take statistics over the batch.
        inner: Units for the modules below, for when one of them is called without this one.
        places: (module, attribute, weight) of every parameter to be put in its place while the unit runs.
        blocks: What it leases, each once.
        buffers: Those of the module and what is below it: (module, attribute).
    """

    name: str
    module: nn.Module
    kind: Kind
    places: list[tuple[nn.Module, str, Weight]]
    blocks: list[WeightBlock] = field(default_factory=list)
    buffers: list[tuple[nn.Module, str]] = field(default_factory=list)
    inner: list[Unit] = field(default_factory=list)
    flat: list[nn.Module] = field(default_factory=list)
    batch_norms: list[tuple[str, nn.Module]] = field(default_factory=list)
    census: list[tuple[nn.Module, tuple[nn.Module | None, ...], int]] = field(default_factory=list)
    inside: frozenset[int] = frozenset()

    @property
    def trainable(self) -> bool:
        return any(block.trainable for block in self.blocks)

    @property
    def weights(self) -> list[Weight]:
        return [weight for block in self.blocks for weight in block.weights]


@dataclass(eq=False, slots=True)
class Structure:
    """All of a model.

    Attributes:
        weights: In the order of `model.parameters()`.
    """

    units: list[Unit]
    blocks: list[WeightBlock]
    weights: list[Weight]

    @property
    def layers(self) -> list[Unit]:
        return [unit for unit in self.units if unit.kind is Kind.LAYER]

    @property
    def groups(self) -> list[list[Weight]]:
        """The parameters by the unit that owns them, in the order of their first parameters. What is shared belongs to the first layer."""
        owners: dict[Weight, Unit] = {}
        for unit in sorted(self.units, key=lambda unit: unit.kind is not Kind.LAYER):
            for _, _, weight in unit.places:
                owners.setdefault(weight, unit)
        found: dict[Unit, list[Weight]] = {}
        for weight in self.weights:
            found.setdefault(owners[weight], []).append(weight)
        return list(found.values())


def find_layers(model: nn.Module, layers: object) -> list[nn.Module]:
    """The modules that `layers=` means: a list, a name pattern, or None for the largest `ModuleList` and its like.

    Raises:
        OptionError: It means none, modules of another model, or one inside another.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if layers is None:
        found = _largest_lists(model)
    elif isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        found = [layers]
    elif isinstance(layers, nn.ModuleDict):
        found = list(layers.values())
    else:
        given: list[Any] = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [layers]
        found = [module for each in given for module in (_matching(model, each) if isinstance(each, str) else [each])]
    found = list(dict.fromkeys(module for each in found for module in _callable(each)))
    strange = [module for module in found if not isinstance(module, nn.Module) or id(module) not in names]
    if strange or (not found and layers is not None):
        raise OptionError(
            "layers= has what is no module of this model" if strange else "layers= matches no module of this model",
            need="modules of this model, or a pattern of their names such as 'model.layers.*'",
            have=(f"a {type(strange[0]).__name__}" if strange else repr(layers)) + _lists_of(names, model),
            remedy="give such, or leave it out to have the largest ModuleList taken",
        )
    chosen = {id(module) for module in found}
    for module in found:
        inner = next((below for below in module.modules() if below is not module and id(below) in chosen), None)
        if inner is not None:
            raise OptionError(
                f"layer {names[id(inner)]!r} is inside layer {names[id(module)]!r}", remedy="give the outer ones, or the inner ones"
            )
        if module is model:
            raise OptionError("the model itself cannot be a layer", remedy="give the modules it is built of")
    called = list(dict.fromkeys(each for module in found for each in _called(module)))
    return [module for module in called if any(True for _ in module.parameters())]


def _is_container(module: nn.Module) -> bool:
    """Whether a module is never called: what is in it is used by whoever has it."""
    has_forward = "forward" in module.__dict__ or getattr(type(module), "forward", None) is not nn.Module.forward
    return not has_forward or isinstance(module, nn.ModuleList | nn.ModuleDict)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or in place of a mere container what is in it."""
    if _is_container(module):
        for child in module.children():
            yield from _called(child)
    else:
        yield module


def _loose(module: nn.Module) -> Iterator[nn.Module]:
    """Containers (a `ParameterList`) whose parameters the module uses in its own forward."""
    for child in module.children():
        if _is_container(child):
            yield child
            yield from _loose(child)


def _matching(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The outermost modules of such a name: a * also stands for dots."""
    found = [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
    inside = {id(below) for module in found for below in module.modules() if below is not module}
    return [module for module in found if id(module) not in inside]


def _callable(module: nn.Module) -> list[nn.Module]:
    """The module itself; of a mere list, which is never called, what is in it."""
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).forward is nn.Module.forward
    return [below for child in module.children() for below in _callable(child)] if is_list else [module]


def _lists_of(names: Mapping[int, str], model: nn.Module) -> str:
    lists = [f"{names[id(module)]}.*" for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return f"; there is {', '.join(lists[:3])}" if lists else ""


def _largest_lists(model: nn.Module) -> list[nn.Module]:
    lists = [
        module for _, module in _outermost(model, lambda module: isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1)
    ]
    sizes = {id(module): sum(parameter.numel() for parameter in module.parameters()) for module in lists}
    lists = [module for module in lists if sizes[id(module)]]
    if not lists:
        return []
    largest = max(lists, key=lambda module: (isinstance(module, nn.ModuleList), sizes[id(module)]))
    kinds = {type(layer) for layer in largest.children()}
    alike = [
        module
        for module in lists
        if module is largest
        or (
            isinstance(module, nn.ModuleList)
            and (kinds & {type(layer) for layer in module} or sizes[id(module)] >= ALIKE * sizes[id(largest)])
        )
    ]
    names = {id(module): name for name, module in model.named_modules()}
    log.info("layers: %s", ", ".join(f"{names[id(module)] or ROOT} ({len(list(module.children()))})" for module in alike))
    return [layer for module in alike for layer in module.children()]


def _outermost(module: nn.Module, wanted: object, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules below `module` that are wanted."""
    assert callable(wanted)
    for key, child in module.named_children():
        path = f"{name}.{key}" if name else key
        if wanted(child):
            yield path, child
        else:
            yield from _outermost(child, wanted, path)


def read_structure(model: nn.Module, layers: Sequence[nn.Module]) -> Structure:
    """Find units and blocks.

    Args:
        model: Not attached.
        layers: As `find_layers` returns them.

    Raises:
        TrainingError: A parameter that is no ordinary dense tensor.
    """
    weights = _weights(model)
    units = _units(model, layers, weights)
    users: dict[Weight, list[Unit]] = {}
    for unit in units:
        for weight in dict.fromkeys(weight for _, _, weight in unit.places):
            users.setdefault(weight, []).append(unit)
    homeless = [weight.name for weight in weights.values() if weight not in users]
    if homeless:
        raise AssertionError(f"parameters that no unit has: {homeless}")
    blocks: dict[str, WeightBlock] = {}
    for weight in weights.values():
        owner = users[weight][0]
        mixed = len({other.requires_grad for _, _, other in owner.places if len(users[other]) == 1}) > 1
        if len(users[weight]) > 1:
            name = weight.name
        else:
            name = (owner.name or ROOT) + (FROZEN_SUFFIX if mixed and not weight.requires_grad else "")
        block = blocks.setdefault(name, WeightBlock(name, []))
        block.weights.append(weight)
        weight.block = block
    for unit in units:
        for each in (unit, *unit.inner):
            each.blocks = list(dict.fromkeys(weight.block for _, _, weight in each.places))
    return Structure(units, list(blocks.values()), list(weights.values()))


def _weights(model: nn.Module) -> dict[int, Weight]:
    """Every parameter by its id, in the order of `model.parameters()`."""
    found: dict[int, Weight] = {}
    memory: dict[int, tuple[str, torch.Tensor]] = {}
    for prefix, module in model.named_modules():
        _check_module(prefix or ROOT, module)
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            _check_memory(f"{prefix}.{name}" if prefix else name, tensor, memory)
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise TrainingError(f"parameter {name!r} has no shape yet", remedy="run the model once on a small batch before attach()")
            if parameter.layout is not torch.strided or parameter.is_complex():
                remedy = "only dense real parameters can be attached"
                raise TrainingError(f"parameter {name!r} is {parameter.layout}, {parameter.dtype}", remedy=remedy)
            weight = found.get(id(parameter))
            if weight is None:
                weight = found[id(parameter)] = Weight(name, len(found), parameter.shape, parameter.dtype, parameter.requires_grad)
            weight.slots.append((module, attribute))
            weight.aliases.append(name)
    return found


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse what could be attached, but not trained.

    Raises:
        TrainingError: Such a module.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TrainingError(f"module {name!r} is compiled by torch.jit", remedy="attach the module that it was made of")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        if module.max_norm is not None:
            remedy = "build it without, and bound the norms in the forward pass"
            raise TrainingError(f"module {name!r} has max_norm=: it rewrites its weights whenever it runs", remedy=remedy)
        if module.sparse and module.weight.requires_grad:
            raise TrainingError(f"module {name!r} has sparse gradients", remedy="build it with sparse=False")


def _check_memory(name: str, tensor: torch.Tensor | None, memory: dict[int, tuple[str, torch.Tensor]]) -> None:
    """Refuse tensors that share memory without being one object: each would go on with values of its own.

    Raises:
        TrainingError: It shares that of another.
    """
    if tensor is None or tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return
    other, first = memory.setdefault(tensor.data_ptr(), (name, tensor))
    if first is not tensor and isinstance(tensor, nn.Parameter) | isinstance(first, nn.Parameter):
        raise TrainingError(
            f"{name!r} and {other!r} share memory, but are two tensors",
            need="one parameter in both places, or two with values of their own",
            remedy="tie them by assigning the parameter itself: module.weight = other.weight",
            tensor=name,
        )


def _units(model: nn.Module, layers: Sequence[nn.Module], weights: dict[int, Weight]) -> list[Unit]:
    chosen = {id(layer) for layer in layers}
    above: set[int] = set()
    for _, module in model.named_modules():
        if any(id(below) in chosen for below in module.modules() if below is not module):
            above.add(id(module))
    above.add(id(model))
    units: list[Unit] = []

    def unit_of(name: str, module: nn.Module, kind: Kind, within: list[nn.Module]) -> Unit | None:
        places = [
            (owner, attribute, weights[id(parameter)])
            for owner in within
            for attribute, parameter in owner._parameters.items()
            if parameter is not None
        ]
        if not places:
            return None
        buffers = [(owner, attribute) for owner in within for attribute in owner._buffers]
        flat = [owner for owner in within if hasattr(owner, "_flat_weights_names")]
        watched = within if kind is not Kind.SCOPE else []
        census = [(owner, tuple(owner._modules.values()), len(owner._parameters)) for owner in watched]
        norms: list[tuple[str, nn.Module]] = [
            (path, owner) for path, owner in module.named_modules() if isinstance(owner, _BatchNorm) and owner in within
        ]
        inside = frozenset(map(id, within))
        return Unit(name, module, kind, places, buffers=buffers, flat=flat, batch_norms=norms, census=census, inside=inside)

    def add(name: str, module: nn.Module, kind: Kind, within: list[nn.Module]) -> None:
        unit = unit_of(name, module, kind, within)
        if unit is None:
            return
        units.append(unit)
        if kind is Kind.OUTER:
            below = [(path, each) for path, each in module.named_modules() if path and len(within) > 1]
            found = [unit_of(f"{name}.{path}", each, kind, list(each.modules())) for path, each in below]
            unit.inner = [each for each in found if each is not None]

    seen: set[int] = set()
    held: set[int] = set()

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if _is_container(module) and module is not model:
            for key, child in module.named_children():
                walk(f"{name}.{key}" if name else key, child)
        elif id(module) in chosen:
            add(name, module, Kind.LAYER, list(module.modules()))
        elif id(module) in above:
            owners = [owner for owner in (module, *_loose(module)) if owner is module or id(owner) not in held]
            held.update(map(id, owners))
            add(name, module, Kind.SCOPE, owners)
            for key, child in module.named_children():
                walk(f"{name}.{key}" if name else key, child)
        else:
            add(name, module, Kind.OUTER, list(module.modules()))

    walk("", model)
    return units


def together(units: Sequence[Unit]) -> Unit:
    """Several units as one, that a function runs."""
    return Unit(
        name=" + ".join(unit.name for unit in units),
        module=units[0].module,
        kind=Kind.OUTER,
        places=[place for unit in units for place in unit.places],
        blocks=list(dict.fromkeys(block for unit in units for block in unit.blocks)),
        buffers=[buffer for unit in units for buffer in unit.buffers],
        flat=[module for unit in units for module in unit.flat],
        census=[each for unit in units for each in unit.census],
        inside=frozenset().union(*(unit.inside for unit in units)),
    )
