"""A model of transformers without its weights, and where each of these comes from.

Names, conversions, tied weights, buffers, missing weights and the report of all these are transformers' own: this follows its
`PreTrainedModel.from_pretrained` step by step, but where that reads a tensor, this notes where it is.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from tierstore.errors import OptionError, TensorError
from tierstore.huggingface.checkpoint import CONFIG, GENERATION, Checkpoint

log = logging.getLogger("tierstore")
logger = transformers_logging.get_logger("transformers.modeling_utils")

INITIALISED = "_is_hf_initialized"
"""What transformers marks with this, its initialisation leaves alone."""

COMPARED_ELEMENTS = 1 << 22
"""Of two tensors in files that should be one, so many are compared at a time."""


@dataclass(eq=False, slots=True)
class Conversion:
    """Several tensors of the files that become one or more of the model's, all at once.

    Attributes:
        mapping: transformers' recipe, without tensors.
        first: The first name that it makes.
        parts: (name in the files, pattern that it matched), in order.
        dtype: What tensors are converted to before.
    """

    mapping: WeightConverter
    first: str
    dtype: torch.dtype
    parts: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Carry it out. Returns tensors by the model's names."""
        mapping = copy.deepcopy(self.mapping)
        for key, pattern in self.parts:
            mapping.add_tensor(self.first, key, pattern, lambda key=key: read(key).to(self.dtype))
        made: Mapping[str, Any] = mapping.convert(self.first, model=model, config=model.config, hf_quantizer=None)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a parameter's values are.

    Attributes:
        name: The parameter's name in transformers' model.
        key: The tensor's name in the files; None: a conversion makes it.
        conversion: Which.
    """

    name: str
    key: str | None
    conversion: Conversion | None = None


@dataclass(slots=True)
class Skeleton:
    """A model whose parameters are on the meta device, but for those that no file has.

    Attributes:
        origins: By the parameter's id.
        conversions: How many tensors of the files do not become a parameter as they are.
    """

    model: PreTrainedModel
    origins: dict[int, Origin]
    num_converted: int


def build(checkpoint: Checkpoint, model_class: Any, dtype: torch.dtype | str | None, attn_implementation: str | None) -> Skeleton:
    """Make the model and find all its weights.

    Args:
        checkpoint: The folder.
        model_class: A class of transformers, or an auto class; None: `AutoModelForCausalLM`.
        dtype: As in transformers; None is "auto".
        attn_implementation: As in transformers.

    Raises:
        OptionError: The model needs code that is in the folder, or is none of this class.
        TensorError: A tensor does not fit the configuration.
    """
    config = _config(checkpoint, attn_implementation)
    dtype = _dtype(dtype, config, checkpoint)
    options = {"attn_implementation": attn_implementation} if attn_implementation is not None else {}
    make = model_class if model_class is not None else AutoModelForCausalLM
    make = getattr(make, "from_config", None) or make._from_config
    config.name_or_path = str(checkpoint.path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(init.no_tie_weights())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(init.meta_device_safe_creation_ops())
        try:
            model: PreTrainedModel = make(config, dtype=dtype, **options)
        except Exception as error:  # a configuration is anybody's, and each model says in its own way what it cannot be
            if "Unrecognized configuration class" not in str(error):
                raise _no_model(checkpoint, error) from error
            name = getattr(model_class, "__name__", "AutoModelForCausalLM")
            remedy = "give model_class= a class of transformers that does, such as transformers.AutoModelForSeq2SeqLM"
            raise OptionError(f"{name} has no model of type {config.model_type!r}", remedy=remedy) from error
    origins, info, num_converted = _match(model, checkpoint, dtype)
    _finish(model, checkpoint, origins, info)
    by_id = {
        id(parameter): origins[name]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in origins and parameter.is_meta
    }
    return Skeleton(model, by_id, num_converted)


OWN = {"attn": ("eager", "sdpa", "flex_attention"), "experts": ("eager", "grouped_mm", "batched_mm")}
"""What transformers and torch compute with themselves. Any other name may stand for code of the Hub: with the package `kernels`
transformers downloads and runs a kernel for `flash_attention_2`, too, where that is not installed."""


def _config(checkpoint: Checkpoint, attn_implementation: str | None) -> Any:
    """The configuration, without what may be fetched, unless the caller himself asks for it."""
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        own = " and brings code of its own, which is never run" if checkpoint.config.get("auto_map") else ""
        remedy = "use a transformers that has this model, and build the model yourself where none has: attach(model, store, init=FOLDER)"
        raise OptionError(f"transformers does not know the model type {kind!r} of {checkpoint.path}{own}", remedy=remedy)
    overruled = {"attn"} if attn_implementation is not None else set()
    named = [name for kind, name in _implementations(checkpoint.config) if kind not in overruled and name not in OWN[kind]]
    kernel = next((name for name in named if "/" in name), None)
    if kernel is not None:
        raise OptionError(
            f"{checkpoint.path / CONFIG} wants {kernel[:200]!r}, code of the Hub, which is never run",
            remedy="give attn_implementation='sdpa' or 'eager', or take that out of the file",
        )
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in `build`
        raise _no_model(checkpoint, error) from error
    if named:
        message = "%s wants %r, which may be code of the Hub: transformers' own is used instead"
        log.warning(message, checkpoint.path / CONFIG, named[0][:200])
    _take_own(config)
    return config


def _take_own(config: Any) -> None:
    """Leave to transformers what to compute with, in a configuration and those within it, where it is none of its own."""
    for kind, own in OWN.items():
        key = f"_{kind}_implementation_internal"
        if getattr(config, key, None) not in (None, *own):
            setattr(config, key, None)
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            _take_own(part)


def _implementations(part: object) -> Iterator[tuple[str, str]]:
    """What a configuration, or one within it, has transformers compute with: of its own, or a kernel to be downloaded."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            stem = str(key).strip("_").removesuffix("_internal")
            kind = stem.removesuffix("_implementation")
            if kind in OWN and kind != stem:
                yield from ((kind, each) for each in (value.values() if isinstance(value, Mapping) else [value]) if isinstance(each, str))
            else:
                yield from _implementations(value)
    elif isinstance(part, list):
        for value in part:
            yield from _implementations(value)


def _no_model(checkpoint: Checkpoint, error: Exception) -> OptionError:
    said = " ".join(str(error).split())[:500]
    return OptionError(
        f"transformers makes no model of {checkpoint.path / CONFIG}: {type(error).__name__}: {said}",
        remedy="download the file again, correct it, or give another dtype= or attn_implementation=",
    )


def _dtype(dtype: torch.dtype | str | None, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        found = getattr(config, "dtype", None)
        if found is None:
            kinds = (checkpoint.tensors[key].dtype for key in sorted(checkpoint.tensors))
            found = next((kind for kind in kinds if kind is not None and kind.is_floating_point), torch.get_default_dtype())
        dtype = found
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise OptionError("dtype= is not understood", need="a dtype of torch, its name, or 'auto'", have=repr(dtype), remedy="give such")
    return dtype


def _match(model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[dict[str, Origin], LoadStateDictInfo, int]:
    """Find what each tensor of the files becomes. Parameters of the model get the dtype and the shape that they will have."""
    expected = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [each for each in rules if isinstance(each, WeightRenaming)]
    converters = [each for each in rules if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    plan = {re.compile(name.replace("*", ".*")): kept for name, kept in model._get_dtype_plan(dtype).items()}

    def dtype_of(name: str) -> torch.dtype:
        found: torch.dtype = next((kept for pattern, kept in plan.items() if pattern.search(name)), expected[name].dtype)
        return found

    origins: dict[str, Origin] = {}
    conversions: dict[str, Conversion] = {}
    info = LoadStateDictInfo(set(expected), set(), set(), [], {}, set())
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, expected)
        if name not in expected:
            targets = of_pattern[pattern].target_patterns if pattern is not None else [name]
            info.unexpected_keys.update(name.replace(targets[0], target) for target in targets)
        elif pattern is None:
            origins[name] = Origin(name, key)
        else:
            conversion = conversions.get(name)
            if conversion is None:
                conversion = conversions[name] = Conversion(copy.deepcopy(of_pattern[pattern]), name, dtype_of(name))
            conversion.parts.append((key, pattern))
    for conversion in conversions.values():
        made = conversion.run(model, lambda key: torch.empty(checkpoint.tensors[key].shape, device="meta"))
        for name, value in made.items():
            if name not in expected:
                info.unexpected_keys.add(name)
                continue
            _check_shape(name, tuple(value.shape), expected[name], checkpoint, conversion.parts[0][0])
            origins[name] = Origin(name, None, conversion)
    for name, origin in origins.items():
        if origin.key is not None:
            _check_shape(name, checkpoint.tensors[origin.key].shape, expected[name], checkpoint, origin.key)
        _place(model, name, dtype_of(name))
    info.missing_keys -= origins.keys()
    model._weight_conversions = [each for each in rules if each.was_used()]
    return origins, info, sum(len(each.parts) for each in conversions.values())


def _check_shape(name: str, have: tuple[int, ...], expected: Tensor, checkpoint: Checkpoint, key: str) -> None:
    if have != tuple(expected.shape):
        raise TensorError(
            f"tensor {key!r} of {checkpoint.tensors[key].file} does not fit the model of {checkpoint.path / 'config.json'}",
            need=f"{name!r} of shape {tuple(expected.shape)}",
            have=have,
            remedy="give the files and the configuration of one model",
            tensor=key,
        )


def _place(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    """Have the parameter as it will be, and marked as one that needs no initialisation."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(attribute)
    if parameter is None:
        return
    if parameter.dtype != dtype:
        requires_grad = parameter.requires_grad
        parameter = module._parameters[attribute] = nn.Parameter(parameter.to(dtype), requires_grad=requires_grad)
    parameter.__dict__[INITIALISED] = True


def _finish(model: PreTrainedModel, checkpoint: Checkpoint, origins: dict[str, Origin], info: LoadStateDictInfo) -> None:
    """Buffers, what no file has, tied weights, and the report."""
    with checkpoint.reading() as files:
        for name, buffer in list(model.named_buffers()):
            origin = origins.pop(name, None)
            if origin is None:
                continue
            value = files[origin.key] if origin.key is not None else origin.conversion.run(model, files.__getitem__)[name]  # type: ignore[union-attr]
            path, _, attribute = name.rpartition(".")
            value = value.to(buffer.dtype)
            value.__dict__[INITIALISED] = True
            model.get_submodule(path)._buffers[attribute] = value
        pairs = [(target, source) for target, source in model.all_tied_weights_keys.items() if {target, source} <= origins.keys()]
        # Of two that are on the meta device both, transformers would tie none.
        tied = {target: source for target, source in pairs if _tie_if_equal(model, target, source, origins, files)}
        for target, _ in pairs:
            del model.all_tied_weights_keys[target]
    loading = LoadStateDictConfig(pretrained_model_name_or_path=str(checkpoint.path))
    type(model)._finalize_model_loading(model, loading, info)
    model.all_tied_weights_keys.update(tied)
    model.eval()
    if model.can_generate() and (checkpoint.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)


def _tie_if_equal(model: PreTrainedModel, target: str, source: str, origins: dict[str, Origin], files: Mapping[str, Tensor]) -> bool:
    """As transformers does where the files hold a tied weight twice, which it finds out by looking at both."""
    first, second = origins[source], origins[target]
    if first.key is None or second.key is None or not _same_values(files[first.key], files[second.key]):
        logger.warning(f"The configuration ties {target} to {source}, but both are in the files, with different values: they are NOT tied.")
        return False
    path, _, attribute = target.rpartition(".")
    model.get_submodule(path)._parameters[attribute] = model.get_parameter(source)
    del origins[target]
    return True


def _same_values(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    pairs = zip(first.flatten().split(COMPARED_ELEMENTS), second.flatten().split(COMPARED_ELEMENTS), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def convert(model: PreTrainedModel, origins: Iterable[Origin], files: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of parameters that conversions make, by their names in transformers' model."""
    found: dict[str, Tensor] = {}
    for conversion in dict.fromkeys(origin.conversion for origin in origins):
        assert conversion is not None
        found.update(conversion.run(model, files.__getitem__))
    return found
