"""First values of parameters that have none yet: a model on the meta device, block by block.

A model larger than memory is built on `torch.device("meta")`. Each unit in turn is given memory on the CPU, filled, moved into the store,
and its memory freed again.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tierstore.errors import OptionError, TensorError, TrainingError
from tierstore.sync import TierStore
from tierstore.training.structure import Structure, Unit, Weight


class ModelFiles(ABC):
    """Files that a model's values lie in, where they need more than to be found by the parameters' names."""

    @abstractmethod
    def name(self, structure: Structure) -> None:
        """Set the names that weights have in their blocks (`Weight.stored`), always the same for the same model and files."""

    @abstractmethod
    def adopt(self, structure: Structure, store: TierStore) -> Collection[str]:
        """Register with the store the blocks that can be read from the files as they are. Returns their names."""

    @abstractmethod
    def fill(self, modules: list[tuple[str, nn.Module]], weights: list[Weight]) -> None:
        """As `Fill`, for all others."""


Source = str | os.PathLike[str] | Callable[[str, nn.Module], None] | ModelFiles | None
"""A safetensors file or a directory of them; a function called with (name, module); None."""

Fill = Callable[[list[tuple[str, nn.Module]], list[Weight]], None]
"""Fills what was on the meta device: the modules that own some of it, and the parameters."""


@contextmanager
def given_memory(unit: Unit, weights: list[Weight]) -> Iterator[list[Weight]]:
    """Hang parameters on the CPU in the places of those on the meta device.

    Places whose parameter is in the store already get memory for the time being: who fills the module may fill it too, for nothing.

    Args:
        unit: Whose.
        weights: Those of it that are not in the store.

    Yields:
        The parameters among `weights` that had no values.
    """
    empty = [weight for weight in weights if _of(weight).is_meta]
    had_none = [_of(weight) for weight in empty]
    for weight in empty:
        given = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
        for module, attribute in weight.slots:
            module._parameters[attribute] = given
    there = [place for place in unit.places if place[2] not in weights] if empty else []
    before = [module._parameters[attribute] for module, attribute, _ in there]
    for module, attribute, weight in there:
        module._parameters[attribute] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
    try:
        yield empty
    except BaseException:
        for weight, valueless in zip(empty, had_none, strict=True):
            for module, attribute in weight.slots:
                module._parameters[attribute] = valueless
        raise
    finally:
        for (module, attribute, _), parameter in zip(there, before, strict=True):
            module._parameters[attribute] = parameter


def _of(weight: Weight) -> nn.Parameter:
    module, attribute = weight.slots[0]
    parameter = module._parameters[attribute]
    assert parameter is not None
    return parameter


def owners(unit: Unit, names: dict[int, str]) -> list[tuple[str, nn.Module]]:
    """The modules whose parameters are the unit's, with their full names, each once."""
    return [(names[id(module)], module) for module in dict.fromkeys(module for module, _, _ in unit.places)]


def filler(model: nn.Module, init: Source) -> Fill:
    """What `init=` means.

    Raises:
        OptionError: It means nothing.
        TensorError: No such file.
    """
    if init is None:
        return _ByItself(model)
    if isinstance(init, ModelFiles):
        return init.fill
    if isinstance(init, str | os.PathLike):
        return _Files(Path(init))
    if callable(init):
        return _Function(init)
    raise OptionError("init= is not understood", need="a path, a function, or None", have=type(init).__name__, remedy="give one of these")


class _Function:
    def __init__(self, function: Callable[[str, nn.Module], None]) -> None:
        self._function = function

    @torch.no_grad()
    def __call__(self, modules: list[tuple[str, nn.Module]], weights: list[Weight]) -> None:
        for name, module in modules:
            self._function(name, module)


class _ByItself:
    """The model's own way, as models of transformers have it, or each module's `reset_parameters`."""

    def __init__(self, model: nn.Module) -> None:
        self._init: Callable[[nn.Module], None] | None = getattr(model, "_init_weights", None)

    @torch.no_grad()
    def __call__(self, modules: list[tuple[str, nn.Module]], weights: list[Weight]) -> None:
        for name, module in modules:
            if self._init is not None:
                self._init(module)
                continue
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is None:
                raise TrainingError(
                    f"module {name!r} ({type(module).__name__}) is on the meta device and does not say how to initialise it",
                    need="a method reset_parameters()",
                    remedy="give attach() init=, a function of (name, module) or a safetensors file",
                )
            reset()


class _Files:
    """Values by name, from files that stay closed between two units."""

    def __init__(self, path: Path) -> None:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self._file_of: dict[str, Path] = {}
        for file in files:
            if not file.is_file():
                raise TensorError(f"init= names no file: {file}", remedy="give a safetensors file, or a directory of them")
            with safe_open(file, framework="pt") as opened:
                self._file_of.update(dict.fromkeys(opened.keys(), file))
        if not self._file_of:
            raise TensorError(f"init= names a directory without safetensors files: {path}", remedy="give another")

    def __call__(self, modules: list[tuple[str, nn.Module]], weights: list[Weight]) -> None:
        wanted: dict[Path, list[tuple[str, Tensor, Weight]]] = {}
        for weight in weights:
            name = next((name for name in weight.aliases if name in self._file_of), None)
            if name is None:
                raise TensorError(
                    f"init= has no values for parameter {weight.name!r}", remedy="give a file of this model", tensor=weight.name
                )
            wanted.setdefault(self._file_of[name], []).append((name, _of(weight), weight))
        for file, tensors in wanted.items():
            with safe_open(file, framework="pt") as opened:
                for name, parameter, weight in tensors:
                    value = opened.get_tensor(name)
                    if value.shape != weight.shape:
                        raise TensorError(
                            f"init= has parameter {weight.name!r} in another shape",
                            need=str(tuple(weight.shape)),
                            have=str(tuple(value.shape)),
                            remedy="give a file of this model",
                            tensor=weight.name,
                        )
                    with torch.no_grad():
                        parameter.copy_(value)


def check_buffers(model: nn.Module) -> None:
    """Refuse buffers on the meta device: nothing says what they should hold.

    Raises:
        TrainingError: A buffer without values.
    """
    for name, module in model.named_modules():
        lacking = [attribute for attribute, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if lacking:
            raise TrainingError(
                f"buffer {lacking[0]!r} of {name or 'the model'!r} is on the meta device and has no values",
                remedy="build the model under tierstore.training.empty_parameters() instead of torch.device('meta'), or set it in init=",
            )


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Build models within whose parameters have no values and take no memory, while their buffers are made as always.

        with empty_parameters():
            model = LargeModel(config)

    As `torch.device("meta")`, which leaves buffers (tables of positions) without values too.
    """
    register = nn.Module.register_parameter

    emptied = WeakIdKeyDictionary()  # one that is registered in several places stays one

    def register_empty(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            if parameter not in emptied:
                emptied[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            self._parameters[name] = emptied[parameter]

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
