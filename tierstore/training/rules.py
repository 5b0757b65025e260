"""What must be known of an optimizer class before it is driven chunk by chunk.

[Note: Flat ranges]
Where a class is elementwise, a large parameter may be cut into flat ranges, `parameter.view(-1)[start:stop]` with `start` a multiple of 64
elements, and each range handed to the class as a parameter of its own. That takes a contiguous parameter, with gradient and state laid out
likewise: `view(-1)` raises for others, and state made by `zeros_like` follows the strides of what it is made like. The 64 elements are
whole vectors of every kernel of torch, in every dtype, so that an element is computed by the same instructions in a range as in the whole.
0-d tensors in the state (`step`, say) are the parameter's, and the same in each of its ranges.

There is one exception. On CPUs torch shares out a tensor of more than 32,768 elements among its threads wherever that falls, and computes
what is less than a vector at the end of each share one by one. In float32 and float64 that gives the same numbers (the sign of a NaN may
differ). 16-bit dtypes are rounded at other points then, so that a range, which is shared out differently, gets other numbers. The fused
kernels share out whole cache lines, and are not affected.

There is another on GPUs: the fused kernels compute four elements at a time where a parameter has a multiple of four, and one by one where
it has not; the compiler rounds the two differently (seen of Adam with weight decay). A range has a multiple of four, but for the last of a
parameter that has not: such parameters stay whole.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from tierstore.errors import OptionError
from tierstore.training.probe import MAX_NDIM, PLAIN, Factory, Kind, Probe, StateEntry, name_of, probe

Class = TypeVar("Class", bound=type[Optimizer])


@dataclass(frozen=True, slots=True)
class Known:
    """What we know of a class of torch.optim, and the tests prove."""

    elementwise: bool = True
    foreach_by_default: bool = True  # where the device has the kernels
    fused: bool = False  # has that option


KNOWN: Mapping[str, Known] = {
    "ASGD": Known(),
    "Adadelta": Known(),
    "Adafactor": Known(elementwise=False, foreach_by_default=False),  # norms and means of the whole parameter
    "Adagrad": Known(fused=True),
    "Adam": Known(fused=True),
    "AdamW": Known(fused=True),
    "Adamax": Known(),
    "LBFGS": Known(elementwise=False, foreach_by_default=False),  # refused: a closure, and state of the whole set
    "Muon": Known(elementwise=False, foreach_by_default=False),  # orthogonalises the whole matrix
    "NAdam": Known(),
    "RAdam": Known(),
    "RMSprop": Known(),
    "Rprop": Known(),
    "SGD": Known(fused=True),
    "SparseAdam": Known(elementwise=False, foreach_by_default=False),  # refused: sparse gradients only
}
# A class that this version of torch lacks is no class of it.
_CLASSES: Mapping[type[Optimizer], Known] = {
    getattr(torch.optim, name): known for name, known in KNOWN.items() if hasattr(torch.optim, name)
}
_ADAMS = tuple(cls for cls in _CLASSES if issubclass(cls, torch.optim.Adam | torch.optim.AdamW))

_declared: weakref.WeakSet[type[Optimizer]] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Rules:
    """What a driver may do with a class, given its options, on one kind of device and for one dtype."""

    name: str  # the class's, for messages
    elementwise: bool  # flat ranges of a parameter get the bits that the whole parameter gets: see the Note above
    multiple: int  # of parameters of a multiple of so many elements only
    mixed_dtypes: bool  # parameters of several dtypes may be spread over instances that have one each
    state_bytes_per_element: float  # of state of the parameter's shape, at most, per element of a parameter
    entries: tuple[StateEntry, ...]  # the state, by the parameter's number of dimensions
    ndims: frozenset[int]  # of 0 to MAX_NDIM: numbers of dimensions of parameters that the class accepts
    state_at_construction: bool  # state is there before the first step
    # Keys of the parameter group that step() changes, a counter, say: they are the instance's own, to be saved with it and not to be
    # overwritten from outside. Every instance must step whenever one does, also when none of its parameters has a gradient.
    changed_options: tuple[str, ...]
    changed_attributes: tuple[str, ...]  # the same of attributes of the instance; state_dict() loses these, in plain torch too
    replaced_state: tuple[str, ...]  # keys whose tensors step() replaces: take them anew from the instance after each step
    replaces_parameters: bool  # step() gives parameters another storage, from which the values must be copied back
    writes_gradients: bool  # step() leaves other values in the gradients

    def keys(self, kind: Kind) -> tuple[str, ...]:
        """The keys of one kind of state."""
        return tuple(sorted({entry.key for entry in self.entries if entry.kind is kind}))

    def accepts(self, shape: Iterable[int]) -> bool:
        """Whether the class takes parameters of this shape; more dimensions than were tried are taken to go as the most that were."""
        return min(len(tuple(shape)), MAX_NDIM) in self.ndims

    def may_cut(self, shape: Iterable[int]) -> bool:
        """Whether flat ranges of a parameter of this shape get the bits that the whole parameter gets."""
        return self.elementwise and math.prod(shape) % self.multiple == 0

    def state_bytes(self, shape: Iterable[int]) -> int | None:
        """Bytes of all state tensors of a parameter, None where only a step can tell."""
        sizes = tuple(shape)
        total = 0
        for entry in self.entries:
            if entry.ndim != min(len(sizes), MAX_NDIM) or entry.dtype is None:
                continue
            if entry.kind is Kind.OTHER and (entry.dims is None or len(sizes) != entry.ndim):
                return None
            num_elements = {
                Kind.SAME: math.prod(sizes),
                Kind.OTHER: math.prod(1 if dim is None else sizes[dim] for dim in entry.dims or ()),
            }.get(entry.kind, 1)
            total += num_elements * entry.dtype.itemsize
        return total


def rules_of(factory: Factory, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Rules:
    """What may be done with what `factory(parameters, **options)` makes.

    `factory` is a class, a partial of one, or a function that returns an instance. Global random numbers stay as they are.

    Raises:
        OptionError: It cannot be driven chunk by chunk.
    """
    if not dtype.is_floating_point:
        raise OptionError(
            f"{name_of(factory)} cannot be driven on parameters of {dtype}",
            need="parameters of a real floating-point dtype",
            have=str(dtype),
            remedy="keep complex parameters as real ones (torch.view_as_real), and leave integers out of params=",
            optimizer=name_of(factory),
        )
    seen = probe(factory, options, dtype, device)
    name, elementwise = seen.cls.__name__, _is_elementwise(seen)
    if elementwise and not seen.ranges_agree:
        if _anchor(seen.cls) not in _CLASSES:
            raise OptionError(
                f"{name} is declared elementwise, and is not",
                need="a class that gives flat ranges of a parameter the same bits as the whole parameter",
                have=f"{name}, which gives others, or takes no vectors",
                remedy="remove the declaration: each parameter is then updated whole",
                optimizer=name,
            )
        elementwise = False  # a function that looks at shapes, to choose options, say
    if device.type == "cpu" and dtype.itemsize < torch.float32.itemsize and not seen.group.get("fused"):
        elementwise = False  # see the Note
    same = [entry for entry in seen.entries if entry.kind is Kind.SAME and entry.dtype is not None]
    per_ndim = {ndim: sum(entry.dtype.itemsize for entry in same if entry.ndim == ndim and entry.dtype) for ndim in seen.ndims}
    return Rules(
        name=name,
        elementwise=elementwise,
        multiple=seen.multiple,
        mixed_dtypes=not _takes_epsilon_from_first_dtype(seen),
        state_bytes_per_element=float(max(per_ndim.values())),
        entries=seen.entries,
        ndims=seen.ndims,
        state_at_construction=seen.state_at_construction,
        changed_options=seen.changed_options,
        changed_attributes=seen.changed_attributes,
        replaced_state=seen.replaced_state,
        replaces_parameters=seen.replaces_parameters,
        writes_gradients=seen.writes_gradients,
    )


def declare_elementwise(cls: Class) -> Class:
    """Declare that a class updates each element from that element and scalars alone, so that large parameters may be cut. Also a decorator.

    The class attribute `tierstore_elementwise = True` says the same. Either holds for the class as it is, and for subclasses that change
    nothing but `__init__`. It is tried on a small parameter before it is believed.
    """
    _declared.add(cls)
    return cls


def resolved_implementation(
    factory: Factory, options: Mapping[str, Any], parameters: Iterable[torch.Tensor], *, device: torch.device | None = None
) -> dict[str, bool]:
    """The options with which every chunk's instance takes the implementation that one instance for all `parameters` of a group would take.

    Left to itself, torch chooses between `foreach` and one tensor at a time anew in each step, by what it is given. The bits differ.

    Args:
        factory: As for `rules_of`.
        options: Those of the group.
        parameters: All parameters of the group.
        device: Where they will be when they are updated, if they are elsewhere now.

    Returns:
        Explicit `foreach` and `fused`, as far as the class has them. Empty for classes of which it is not known how they choose.
    """
    group = list(parameters)
    first = next((one for one in group if one.is_floating_point()), None)
    if first is None:
        return {}
    seen = probe(factory, options, first.dtype, first.device if device is None else device)
    anchor = _anchor(seen.cls)
    known = _CLASSES.get(anchor) if anchor is not None else None
    if known is None or "foreach" not in seen.group:
        return {}
    foreach, fused = seen.group["foreach"], seen.group.get("fused")
    if foreach is None and fused is None:
        foreach = known.foreach_by_default and _foreach_by_default(group, device)
        # Adam and AdamW keep to one tensor at a time where a learning rate in a tensor would be read back.
        if anchor in _ADAMS and isinstance(seen.group["lr"], torch.Tensor) and not seen.group["capturable"]:
            foreach = False
    return {"foreach": bool(foreach), **({"fused": bool(fused)} if known.fused else {})}


FOREACH_DEVICES = frozenset({"cuda", "xpu", "mtia"})  # for a torch whose private helper is gone


def _foreach_by_default(parameters: Iterable[torch.Tensor], device: torch.device | None) -> bool:
    """What torch would choose for a set of parameters, were they all on the device."""
    ordinary = (torch.Tensor, torch.nn.Parameter)

    def moved(parameter: torch.Tensor) -> torch.Tensor:
        # Torch looks at types, devices and dtypes only.
        if device is None or type(parameter) not in ordinary:
            return parameter
        return torch.empty(0, dtype=parameter.dtype, device=device)

    tensors = [moved(parameter) for parameter in parameters]
    choose = getattr(torch_optimizer, "_default_to_fused_or_foreach", None)
    if choose is not None:
        return bool(choose(tensors, differentiable=False, use_fused=False)[1])
    return all(type(one) in ordinary and one.device.type in FOREACH_DEVICES for one in tensors)


# -- whose rules hold for a class ---------------------------------------------------------------------------------------

# What a subclass may define and still be the class that it inherits from.
_HARMLESS = frozenset(
    {
        *("__module__", "__qualname__", "__doc__", "__init__", "__repr__", "__annotations__", "__annotate__", "__annotate_func__"),
        *("__annotations_cache__", "__firstlineno__", "__static_attributes__", "__dict__", "__weakref__", "__slots__", "__orig_bases__"),
    }
)


def _is_elementwise(seen: Probe) -> bool:
    anchor = _anchor(seen.cls)
    if anchor is None:
        return False
    if anchor in _declared or "tierstore_elementwise" in vars(anchor):
        return anchor in _declared or bool(vars(anchor)["tierstore_elementwise"])
    # A hook that __init__ or a factory registered may do anything.
    return _CLASSES[anchor].elementwise and not seen.has_hooks


def _anchor(cls: type[Optimizer]) -> type[Optimizer] | None:
    """The class whose rules hold for `cls`: known or declared, with nothing of substance added below it."""
    for one in cls.__mro__:
        if one in _declared or one in _CLASSES or "tierstore_elementwise" in vars(one):
            return one
        if not all(_is_harmless(one, name) for name in vars(one)):
            return None
    return None


def _is_harmless(cls: type, name: str) -> bool:
    value = vars(cls)[name]
    if name != "step":
        return name in _HARMLESS or isinstance(value, PLAIN)
    # Torch puts a step() into whichever class of a family is instantiated first: the inherited one, with hooks around it.
    inherited = getattr(super(cls, cls), "step", None)
    return _without_hooks(value) is _without_hooks(inherited) is not None


def _without_hooks(step: Any) -> Any:
    """A step() as it was written. By code, since `functools.wraps` in a user's override would copy every mark that torch leaves."""
    while getattr(step, "__code__", None) is _HOOKED:
        step = step.__wrapped__
    return step


_HOOKED = Optimizer.profile_hook_step(lambda self: None).__code__


def _takes_epsilon_from_first_dtype(seen: Probe) -> bool:
    """Adafactor takes the epsilon that it is not given from the first parameter with a gradient, for all parameters of the group."""
    adafactor = getattr(torch.optim, "Adafactor", None)
    return adafactor is not None and issubclass(seen.cls, adafactor) and seen.group["eps"][0] is None
