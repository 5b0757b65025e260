"""Runs an optimizer class on tiny parameters, and tells what it does: which state it keeps, and what it changes when it steps.

[Note: What a chunk needs]
A driver gives each chunk of parameters an instance of its own, and puts parameters and state into that instance just before it steps.
The weights are those of one instance for all parameters only if

- no parameter's update looks at another parameter, nor at how many there are (`_same_when_alone` compares bit for bit);
- all that an update remembers lies in `state[parameter]` under names, as tensors or plain numbers, and shares memory with nothing,
  so that it can be taken out, stored and put back;
- `step()` can be called without a closure, and draws no random numbers, whose order chunks would change.

What fails one of these is refused by name, with what to do. What merely has to be known (options that `step()` counts up, tensors that
it replaces, gradients that it overwrites) is told to the driver.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from tierstore.errors import OptionError

Factory = Callable[..., Optimizer]

# Sizes that tell dimensions apart, so that a state tensor's shape can be read as the parameter's. Two matrices and two vectors, because
# coupling takes two, and not every class accepts more than one kind.
SHAPES: tuple[tuple[int, ...], ...] = ((4, 29), (3, 11), (133,), (13,), (2, 3, 7), (2, 3, 5, 7), ())
MAX_NDIM = 4  # of SHAPES
# Steps, and in which of them every second parameter has no gradient.
NUM_STEPS, STEP_WITH_MISSING = 3, 1
RANGE = 64  # elements: flat ranges begin at multiples of it
FUSED_ON_GPU = 4  # elements that the fused kernels compute at a time there, of parameters of a multiple of it

PLAIN = (bool, int, float, str, type(None))

# What torch's base class keeps on an instance for itself.
OF_TORCH = frozenset({"state", "param_groups", "defaults", "_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured"})


class Kind(Enum):
    """What an entry of a parameter's state is."""

    SAME = "a tensor of the parameter's shape"
    SCALAR = "a 0-d tensor"
    OTHER = "a tensor of another shape"
    PLAIN = "a number, a string or None"


@dataclass(frozen=True, slots=True)
class StateEntry:
    """One entry of the state that a class keeps for a parameter of `ndim` dimensions."""

    key: str
    ndim: int
    kind: Kind
    dtype: torch.dtype | None = None  # of a tensor
    device_type: str | None = None  # of a tensor
    dims: tuple[int | None, ...] | None = (
        None  # of OTHER: each is the parameter's dimension of that size, None is size 1; None: no such reading
    )


@dataclass(frozen=True, slots=True)
class Probe:
    """What was seen of a class with given options, on one kind of device and for one dtype."""

    cls: type[Optimizer]
    entries: tuple[StateEntry, ...]  # by number of dimensions, then by key
    ndims: frozenset[int]  # of 0 to MAX_NDIM: numbers of dimensions that the class accepts
    group: Mapping[str, Any]  # its parameter group, as constructed, without the parameters
    state_at_construction: bool  # not only at the first step
    changed_options: tuple[str, ...]  # keys of the parameter group that step() changes
    changed_attributes: tuple[str, ...]  # of the instance, that step() changes; torch's own state_dict() loses them
    replaced_state: tuple[str, ...]  # keys whose tensors step() replaces instead of changing them in place
    replaces_parameters: bool  # step() gives parameters another storage
    writes_gradients: bool  # step() changes gradients in place
    has_hooks: bool  # on this instance, or a step() of its own
    multiple: int  # elements: of parameters of a multiple of it only is the following said
    ranges_agree: bool  # flat ranges gave the bits that whole parameters gave


def probe(factory: Factory, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Probe:
    """See what `factory(parameters, **options)` makes, by letting it take a few steps.

    Leaves all random number generators as they were. Waits for the device. Remembered where the options can be hashed.

    Raises:
        OptionError: What it makes cannot be driven chunk by chunk, or cannot be made at all.
    """
    key = _key(factory, options, dtype, device)
    if key is None:
        return _look(factory, options, dtype, device)
    with _lock:
        found = _seen.get(key)
    if found is None:
        found = _look(factory, options, dtype, device)
        with _lock:
            _seen[key] = found
            while len(_seen) > MAX_REMEMBERED:
                _seen.popitem(last=False)
    return found


def name_of(factory: Factory) -> str:
    """What messages call a factory."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__qualname__", type(factory).__qualname__).rpartition("<locals>.")[2]


# -- remembering --------------------------------------------------------------------------------------------------------

MAX_REMEMBERED = 128
_seen: OrderedDict[Hashable, Probe] = OrderedDict()
_lock = threading.Lock()


def _key(factory: Factory, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Hashable | None:
    """All that a probe's answer depends on, or None where that cannot be hashed."""
    try:
        # Scalars of state take torch's default dtype and device.
        key = (_hashable(factory), _hashable(dict(options)), dtype, device.type, torch.get_default_dtype(), torch.get_default_device())
        hash(key)
    except TypeError:
        return None
    return key


def _hashable(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        raise TypeError("a tensor hashes by identity, and its value may change")
    if isinstance(value, functools.partial):
        return (functools.partial, _hashable(value.func), _hashable(value.args), _hashable(value.keywords))
    if isinstance(value, Mapping):
        return (type(value), tuple(sorted((name, _hashable(inner)) for name, inner in value.items())))
    if isinstance(value, list | tuple):
        return (type(value), tuple(_hashable(inner) for inner in value))
    return (type(value), value)  # 1, 1.0 and True are equal


# -- looking ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sample:
    """A tiny parameter: its first value, and its gradient in each step (None where it has none)."""

    value: torch.Tensor
    gradients: list[torch.Tensor | None]

    def ranges(self) -> list[_Sample]:
        cuts = [slice(start, start + RANGE) for start in range(0, self.value.numel(), RANGE)]
        return [
            _Sample(self.value.view(-1)[cut], [None if gradient is None else gradient.view(-1)[cut] for gradient in self.gradients])
            for cut in cuts
        ]


@dataclass(slots=True)
class _Run:
    """An instance after its steps, and what was seen on the way."""

    instance: Optimizer
    parameters: list[torch.Tensor]
    group: Mapping[str, Any]
    state_at_construction: bool
    changed_options: frozenset[str] = frozenset()
    changed_attributes: frozenset[str] = frozenset()
    replaced_state: frozenset[str] = frozenset()
    replaces_parameters: bool = False
    writes_gradients: bool = False
    moves_without_gradient: bool = False

    def state(self, number: int) -> Mapping[Any, Any]:
        found: Mapping[Any, Any] = self.instance.state.get(self.parameters[number], {})
        return found


def _look(factory: Factory, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Probe:
    name = name_of(factory)
    # Whatever the caller is in the middle of: inference mode would make tensors that no optimizer may change.
    # A model is often built on `meta`; 0-d state made there would have no value.
    default = torch.get_default_device()
    with (
        _random_numbers_kept(device) as drawn,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu") if default.type == "meta" else nullcontext(),
    ):
        samples = _samples(dtype, device)
        alone = _each_alone(factory, options, samples, name)
        run = _run(factory, options, [samples[number] for number in alone], name, watch=True)
        name = type(run.instance).__name__
        if drawn():
            raise OptionError(
                f"{name} draws random numbers when it steps",
                need="an optimizer whose update follows from parameters, gradients and state",
                have=f"{name}, whose numbers depend on the order in which parameters come, which chunks change",
                remedy="use an optimizer without randomness",
                optimizer=name,
            )
        if run.moves_without_gradient:
            raise OptionError(
                f"{name} changes parameters that have no gradient",
                need="an optimizer that passes by a parameter without a gradient, and its state",
                have=f"{name}, which changes one of them: nothing is fetched of layers that had no part in a backward pass",
                remedy="skip parameters whose grad is None",
                optimizer=name,
            )
        _check_updates_are_not_lost(run.instance, dtype, device, name)
        _check_state(run, name)
        if not _same_when_alone(run, alone):
            again = {number: _run(factory, options, [samples[number]], name) for number in alone}
            raise _couples(name) if all(_same_run(alone[number], again[number]) for number in alone) else _varies(name)
        multiple = FUSED_ON_GPU if device.type == "cuda" and run.group.get("fused") else 1
        ranges_agree = all(
            _ranges_agree(factory, options, samples[number], alone[number], name)
            for number in alone
            if samples[number].value.numel() > RANGE and samples[number].value.numel() % multiple == 0
        )
    instance = run.instance
    return Probe(
        cls=type(instance),
        entries=_entries(run),
        ndims=frozenset(samples[number].value.ndim for number in alone),
        group=run.group,
        state_at_construction=run.state_at_construction,
        changed_options=tuple(sorted(run.changed_options)),
        changed_attributes=tuple(sorted(run.changed_attributes)),
        replaced_state=tuple(sorted(run.replaced_state)),
        replaces_parameters=run.replaces_parameters,
        writes_gradients=run.writes_gradients,
        has_hooks=has_hooks(instance),
        multiple=multiple,
        ranges_agree=ranges_agree,
    )


def _samples(dtype: torch.dtype, device: torch.device) -> list[_Sample]:
    """Values from no random number generator, of different sizes, so that one parameter's norm says nothing about another's."""

    def wave(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
        length = int(np.prod(shape))
        values = scale * np.sin(np.arange(1, length + 1) * 1.7 + phase)
        return torch.from_numpy(values).reshape(shape).to(device=device, dtype=dtype)

    samples = []
    for number, shape in enumerate(SHAPES):
        gradients = [wave(shape, 0.9 * step + number, 0.5 + number) for step in range(NUM_STEPS)]
        missing = {STEP_WITH_MISSING} if number % 2 else set()
        samples.append(_Sample(wave(shape, 0.3 * number, 1.0), [None if step in missing else gradients[step] for step in range(NUM_STEPS)]))
    return samples


def _each_alone(factory: Factory, options: Mapping[str, Any], samples: Sequence[_Sample], name: str) -> dict[int, _Run]:
    """An instance for each sample that the class accepts (Muon, for one, takes matrices only), by the sample's number."""
    runs: dict[int, _Run] = {}
    failed: list[Exception] = []
    for number, sample in enumerate(samples):
        try:
            runs[number] = _run(factory, options, [sample], name)
        except OptionError:
            raise  # what is wrong with the class is wrong for every shape
        except Exception as error:
            failed.append(error)
    if not runs:
        raise _explained(factory, options, samples[0], name, failed[0]) from failed[0]
    return runs


def _explained(factory: Factory, options: Mapping[str, Any], sample: _Sample, name: str, failure: Exception) -> OptionError:
    """Why no sample was accepted: what the class asks for that a chunk cannot give, or what it says itself."""

    def steps(gradient: torch.Tensor | None, *arguments: Any) -> bool:
        try:
            instance, parameters = _make(factory, options, [sample], name)
            parameters[0].grad = gradient
            instance.step(*arguments)
        except Exception:
            return False
        return True

    dense = sample.gradients[0]
    assert dense is not None
    device = sample.value.device.type
    if steps(dense.clone(), lambda: 0.0):
        return needs_closure(name)
    if steps(dense.to_sparse()):
        return OptionError(
            f"{name} takes sparse gradients only",
            need="an optimizer of dense gradients, since gradients are kept as blocks of fixed size",
            have=f"{name}: {failure}",
            remedy="use embeddings with sparse=False, and a dense optimizer such as torch.optim.Adam",
            optimizer=name,
        )
    given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
    remedy = "correct the options, or try them with the optimizer itself"
    if options.get("capturable"):
        remedy = f"leave capturable=False: it serves the capture of device graphs, which {device} does not have"
    return OptionError(
        f"{name} takes no step: {type(failure).__name__}: {failure}",
        need=f"an optimizer that these options make, and that steps on parameters of {sample.value.dtype} on {device}",
        have=f"{name} with {given}",
        remedy=remedy,
        optimizer=name,
    )


def needs_closure(name: str) -> OptionError:
    """The error for a class that evaluates the model again while it steps."""
    return OptionError(
        f"{name}.step() requires a closure",
        need="an optimizer that updates each parameter from its gradient alone, since no chunk can run the whole model again",
        have=f"{name}, which evaluates the model while it steps",
        remedy="use an optimizer whose step() needs no closure, such as torch.optim.AdamW",
        optimizer=name,
    )


def _make(factory: Factory, options: Mapping[str, Any], samples: Sequence[_Sample], name: str) -> tuple[Optimizer, list[torch.Tensor]]:
    """An instance on copies of the samples, checked for what every use of it relies on."""
    parameters = [sample.value.clone().requires_grad_() for sample in samples]
    instance = factory(list(parameters), **options)
    if not isinstance(instance, Optimizer):
        raise OptionError(
            f"{name} makes no optimizer",
            need="a torch.optim.Optimizer class, or a function of parameters and options that returns an instance",
            have=f"a {type(instance).__name__}",
            remedy="pass the optimizer's class and its options",
            optimizer=name,
        )
    groups = instance.param_groups
    if len(groups) != 1 or [id(one) for one in groups[0]["params"]] != [id(one) for one in parameters]:
        raise OptionError(
            f"{name} does not put the parameters it is given into one group",
            need="one parameter group of exactly the given parameters, in their order",
            have=f"{len(groups)} group(s) of {[len(group['params']) for group in groups]} parameters, for {len(parameters)} given",
            remedy="let the factory build on the parameters it is given, and pass groups through params=",
            optimizer=name,
        )
    if groups[0].get("differentiable"):
        raise OptionError(
            f"{name} with differentiable=True records its steps for autograd",
            need="differentiable=False: a recorded step keeps every parameter and all state alive, on the device",
            have="differentiable=True",
            remedy="leave differentiable=False",
            optimizer=name,
        )
    required = [
        one.name
        for one in list(inspect.signature(type(instance).step).parameters.values())[1:]
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if required:
        raise needs_closure(type(instance).__name__)
    return instance, parameters


def _run(factory: Factory, options: Mapping[str, Any], samples: Sequence[_Sample], name: str, *, watch: bool = False) -> _Run:
    """Let an instance take all steps; `watch` notes what each changes."""
    instance, parameters = _make(factory, options, samples, name)
    run = _Run(instance, parameters, snapshot(instance.param_groups[0]), state_at_construction=bool(instance.state))
    for step in range(NUM_STEPS):
        for parameter, sample in zip(parameters, samples, strict=True):
            parameter.grad = _copy(sample.gradients[step])
        if watch:
            _watched_step(run, [sample.gradients[step] for sample in samples])
        else:
            instance.step()
    return run


def _watched_step(run: _Run, gradients: Sequence[torch.Tensor | None]) -> None:
    instance = run.instance
    places = [_place(parameter) for parameter in run.parameters]
    before = {(number, key): (value, _place(value)) for number in range(len(places)) for key, value in run.state(number).items()}
    group, attributes = snapshot(instance.param_groups[0]), snapshot(vars(instance))
    idle = [number for number, gradient in enumerate(gradients) if gradient is None]
    values, states = [_copy(run.parameters[number].detach()) for number in idle], [snapshot(run.state(number)) for number in idle]
    instance.step()
    for number, value, state in zip(idle, values, states, strict=True):
        present = run.state(number)
        kept = all(key in present and same(present[key], state[key]) for key in state)
        run.moves_without_gradient |= not (kept and same(run.parameters[number], value))
    run.changed_options |= changed(group, instance.param_groups[0])
    run.changed_attributes |= changed(attributes, vars(instance)) - OF_TORCH
    for number, parameter in enumerate(run.parameters):
        run.replaces_parameters |= _place(parameter) != places[number]
        run.writes_gradients |= not same(parameter.grad, gradients[number])
        for key, value in run.state(number).items():
            old, place = before.get((number, key), (value, _place(value)))
            if isinstance(value, torch.Tensor) and (old is not value or place != _place(value)):
                run.replaced_state |= {key}


def _place(value: Any) -> int:
    """The address of a tensor's memory, 0 for what is none."""
    return value.data_ptr() if isinstance(value, torch.Tensor) else 0


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def snapshot(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options or attributes as they are now, for `changed`."""

    def kept(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, list | tuple):
            return [kept(inner) for inner in value]
        if isinstance(value, dict):
            return {key: kept(inner) for key, inner in value.items()}
        return copy.copy(value) if isinstance(value, set | np.ndarray) else value

    return {key: kept(value) for key, value in values.items() if key != "params" and key not in OF_TORCH}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> frozenset[str]:
    """Which have come or have another value since the snapshot."""
    return frozenset(key for key in after if key != "params" and (key not in before or not same(before[key], after[key])))


def same(one: Any, other: Any) -> bool:
    """Bit for bit, so that NaN equals itself and -0.0 is not 0.0."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return False
        return torch.equal(*(tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


def _check_state(run: _Run, name: str) -> None:
    """State must be such that it can be taken out of the instance, stored, and put back."""
    own = {id(parameter) for parameter in run.parameters}
    for key in run.instance.state:
        if id(key) not in own:
            raise OptionError(
                f"{name} keeps state that belongs to no parameter",
                need="all state in state[parameter]",
                have=f"state under {key!r}" if not isinstance(key, torch.Tensor) else "state under another tensor",
                remedy="keep it in the parameter group or in each parameter's state",
                optimizer=name,
            )
    memory = {parameter.untyped_storage().data_ptr() for parameter in run.parameters if parameter.numel()}
    for number in range(len(run.parameters)):
        for key, value in run.state(number).items():
            if not isinstance(key, str) or not isinstance(value, (torch.Tensor, *PLAIN)):
                raise OptionError(
                    f"{name} keeps state that cannot be stored by name",
                    need="tensors, numbers, strings or None under names",
                    have=f"a {type(value).__name__} under {key!r}",
                    remedy="keep each tensor under a name of its own",
                    optimizer=name,
                )
            if isinstance(value, torch.Tensor) and value.numel():
                place = value.untyped_storage().data_ptr()
                if place in memory:
                    raise OptionError(
                        f"{name} lets state share memory with a parameter or with other state",
                        need="state tensors of their own, since each is stored and brought back by itself",
                        have=f"{key!r}, which is also another tensor",
                        remedy="clone it when it is created",
                        optimizer=name,
                    )
                memory.add(place)


def _check_updates_are_not_lost(instance: Optimizer, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Torch up to 2.13: the fused SGD for CPUs changes no whole vector of 16-bit weights, and its momentum is what lies about in memory."""
    fused = isinstance(instance, torch.optim.SGD) and instance.param_groups[0].get("fused")
    if not fused or device.type != "cpu" or dtype.itemsize >= torch.float32.itemsize:
        return
    parameter = torch.zeros(64, dtype=dtype, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0, fused=True).step()
    if not parameter.all():
        raise OptionError(
            f"{name} with fused=True leaves weights of {dtype} as they are on CPUs, in this version of torch",
            need="fused=False, or a version of torch whose fused SGD works in 16 bits",
            have=f"fused=True and torch {torch.__version__}",
            remedy="leave fused=True out, or keep fp32 master weights",
            optimizer=name,
        )


def _same_when_alone(run: _Run, alone: Mapping[int, _Run]) -> bool:
    return all(
        same(run.parameters[position], single.parameters[0]) and same(run.state(position), single.state(0))
        for position, single in enumerate(alone.values())
    )


def _same_run(one: _Run, other: _Run) -> bool:
    return same(one.parameters, other.parameters) and same(one.state(0), other.state(0))


def _couples(name: str) -> OptionError:
    return OptionError(
        f"{name} couples parameters",
        need="an optimizer that updates each parameter as if it were the only one",
        have=f"{name}, which gives a parameter other weights or state when it is updated beside others",
        remedy="use an optimizer that treats parameters separately; clip the global norm with clip_grad_norm_(), not in step()",
        optimizer=name,
    )


def _varies(name: str) -> OptionError:
    return OptionError(
        f"{name} does not repeat itself",
        need="an optimizer that gives the same weights and state for the same parameters, gradients and options",
        have=f"{name}, which gives others the second time",
        remedy="use an optimizer without randomness, or another implementation of it (foreach=, fused=)",
        optimizer=name,
    )


def _ranges_agree(factory: Factory, options: Mapping[str, Any], sample: _Sample, whole: _Run, name: str) -> bool:
    """Whether a parameter cut into flat ranges gets the same weights and state; 0-d state is the same in each range."""
    try:
        run = _run(factory, options, sample.ranges(), name)
    except Exception:  # it takes no vectors, say
        return False
    pieces = range(len(run.parameters))
    if not same(torch.cat([run.parameters[piece].detach() for piece in pieces]), whole.parameters[0].detach().view(-1)):
        return False
    for key, value in whole.state(0).items():
        parts = [run.state(piece).get(key) for piece in pieces]
        tensors = [part for part in parts if isinstance(part, torch.Tensor)]
        if isinstance(value, torch.Tensor) and value.shape == sample.value.shape:
            if len(tensors) != len(parts) or not same(torch.cat(tensors), value.reshape(-1)):
                return False
        elif not all(same(part, value) for part in parts):
            return False
    return all(run.state(piece).keys() == whole.state(0).keys() for piece in pieces)


def _entries(run: _Run) -> tuple[StateEntry, ...]:
    found: dict[tuple[int, str], StateEntry] = {}
    for number, parameter in enumerate(run.parameters):
        for key, value in run.state(number).items():
            # Of a 0-d parameter, all state is 0-d: what it is, parameters of other dimensions tell.
            if (parameter.ndim, key) not in found:
                found[parameter.ndim, key] = _entry(key, value, parameter)
    kinds = {key: entry.kind for (ndim, key), entry in found.items() if ndim}
    for (ndim, key), entry in found.items():
        if ndim == 0 and kinds.get(key) is Kind.SCALAR:
            found[ndim, key] = StateEntry(key, 0, Kind.SCALAR, entry.dtype, entry.device_type)
    return tuple(found[place] for place in sorted(found))


def _entry(key: str, value: Any, parameter: torch.Tensor) -> StateEntry:
    if not isinstance(value, torch.Tensor):
        return StateEntry(key, parameter.ndim, Kind.PLAIN)
    tensor = (value.dtype, value.device.type)
    if value.shape == parameter.shape:
        return StateEntry(key, parameter.ndim, Kind.SAME, *tensor)
    if value.ndim == 0:
        return StateEntry(key, parameter.ndim, Kind.SCALAR, *tensor)
    sizes = list(parameter.shape)
    known = all(size == 1 or size in sizes for size in value.shape)
    dims = tuple(None if size == 1 else sizes.index(size) for size in value.shape) if known else None
    return StateEntry(key, parameter.ndim, Kind.OTHER, *tensor, dims)


def has_hooks(instance: Optimizer) -> bool:
    """Whether more is called in a step than the class says."""
    return bool(instance._optimizer_step_pre_hooks or instance._optimizer_step_post_hooks or "step" in vars(instance))


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Puts every global random number generator back; yields a function that tells whether any has moved."""
    module = torch.get_device_module(device)
    has_generator = hasattr(module, "get_rng_state")

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([module.get_rng_state(device)] if has_generator else [])]

    before, python, numpy = states(), random.getstate(), np.random.get_state(legacy=False)
    try:
        yield lambda: not (same(before, states()) and python == random.getstate() and same(numpy, np.random.get_state(legacy=False)))
    finally:
        torch.set_rng_state(before[0])
        if has_generator:
            module.set_rng_state(before[1], device)
        random.setstate(python)
        np.random.set_state(numpy)
