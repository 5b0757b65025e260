"""What stands in an attached model where a parameter stood.

[Note: Placeholders]
While a model is attached, its parameters have no values of their own: those are in the store, and on the device only within a lease. A
bare parameter on the meta device will not do in their place: `F.linear` on the CPU takes one without a word and computes rubbish. A
placeholder knows shape and dtype and names the store's device as its own, so that code which asks for these goes on; whatever would
need its values raises.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tierstore.errors import PlaceholderError, TrainingError

_TOLD = {
    "dtype",
    "shape",
    "ndim",
    "layout",
    "is_leaf",
    "is_sparse",
    "is_meta",
    "is_quantized",
    "itemsize",
    "nbytes",
    "requires_grad",
    "grad_fn",
    "_backward_hooks",
    "names",
    "output_nr",
    "is_nested",
    "retains_grad",
    "_version",
}
"""Attributes that have nothing to do with values."""

_ANSWERED = {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.stride,
    torch.Tensor.is_contiguous,
    torch.Tensor.__len__,
    torch.Tensor.__hash__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


_CONVERSIONS = ("to", "cpu", "cuda", "half", "float", "double", "bfloat16", "type")


def _getters() -> dict[Any, str]:
    found: dict[Any, str] = {}
    for name in [*_TOLD, "device", "is_cpu", "is_cuda", "grad", "data"]:
        attribute: Any = getattr(torch.Tensor, name, None)
        if hasattr(attribute, "__get__") and not callable(attribute):
            found[attribute.__get__] = name
    return found


_GETTERS = _getters()
_SET_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_SETTERS = {_SET_GRAD: "requires_grad", torch.Tensor.requires_grad_: "requires_grad"}


class Placeholder(nn.Parameter):
    """A parameter whose values are in a store. See [Note: Placeholders].

    Attributes:
        parameter_name: Its full name in the model.
        store_device: Where a lease has its values.
        attached: False once the model is detached: then whoever still has this has a parameter of no model.
    """

    parameter_name: str
    store_device: torch.device
    attached: bool

    @staticmethod
    def __new__(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, device: torch.device) -> Placeholder:
        """A stand-in on the meta device."""
        empty = torch.empty(shape, dtype=dtype, device="meta")
        self: Placeholder = torch.Tensor._make_subclass(cls, empty, requires_grad)
        self.__dict__.update(parameter_name=name, store_device=device, attached=True)
        return self

    def __init__(self, *_: object) -> None:
        """All is done by `__new__`."""

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        fields = self.__dict__
        with torch._C.DisableTorchFunctionSubclass():
            return f"<parameter {fields['parameter_name']} {tuple(self.shape)} {self.dtype}: its values are in the store>"

    __str__ = __repr__

    def __deepcopy__(self, memo: dict[int, Any]) -> Placeholder:
        raise _untouchable(self, "copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _untouchable(self, "pickled")

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _GETTERS.get(func)
        if name == "device":
            return args[0].__dict__["store_device"]
        if name in ("is_cpu", "is_cuda"):
            return bool(args[0].__dict__["store_device"].type == name.removeprefix("is_"))
        if name == "is_meta":
            return False
        if (name is not None and name in _TOLD) or func in _ANSWERED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        me = next((value for value in (*args, *(kwargs or {}).values()) if isinstance(value, cls)), None)
        if me is None:  # in a list of tensors
            found = [item for value in args if isinstance(value, list | tuple) for item in value]
            me = next((value for value in found if isinstance(value, cls)), None)
        if func in _SETTERS:
            raise _frozen_at_attach(me)
        raise _untouchable(me, _how(func) if name is None else f"asked for .{name}")


def _name(me: Placeholder | None) -> str:
    return repr(me.__dict__["parameter_name"]) if me is not None else "of an attached model"


def _how(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):  # of an attribute: the name is that of the slot
        attribute = getattr(getattr(func, "__self__", None), "__name__", "an attribute")
        return f"asked for .{attribute}" if name == "__get__" else f"given another .{attribute}"
    return f"used by {name}"


def refuse_saving(module: nn.Module, *_: object) -> None:
    """For `state_dict()` of an attached model, which would end at the first parameter by a name that says little."""
    me = next((parameter for parameter in module.parameters() if isinstance(parameter, Placeholder)), None)
    if me is not None:
        raise PlaceholderError(
            "state_dict() of an attached model, whose parameters are in the store",
            need="its values",
            have=f"placeholders, such as {_name(me)}",
            remedy="store.commit() keeps the training; for the weights, detach() the model at the end, or `tierstore export` a commit",
        )


def _untouchable(me: Placeholder | None, how: str) -> PlaceholderError:
    if how in ("asked for .grad", "given another .grad"):
        remedy = (
            "gradients are in the store: read one with gradient(name) of what attach() returned; update with a TieredOptimizer, clip with "
            "TieredOptimizer.clip_grad_norm_(), erase with TieredOptimizer.zero_grad()"
        )
    elif how.removeprefix("used by ") in _CONVERSIONS:
        remedy = "leave it out: parameters are on the device when they are needed; convert them before attach(), or detach()"
    else:
        remedy = (
            "only the module that owns it may use it, in its forward; let that module be called, or name it in layers=. Used elsewhere "
            "too, as by a head that is tied to an embedding: have a module there with the same parameter (head.weight = embedding.weight), "
            "and call that. For its values: store.read(), or detach() the model"
        )
    return PlaceholderError(f"parameter {_name(me)} was {how} outside a lease", need="its values", have="a placeholder", remedy=remedy)


def _frozen_at_attach(me: Placeholder | None) -> PlaceholderError:
    remedy = "set it before attach(); to freeze from here on, detach(), set it, and attach() to a store on another directory"
    return PlaceholderError(f"parameter {_name(me)}: requires_grad is fixed while the model is attached", remedy=remedy)


# -- optimizers that were made too early -----------------------------------------------------------------------------------

_ORIGINS: set[int] = set()
"""Ids of the parameters that attached models had before: whoever updates these updates nothing."""


def refuse_optimizers_of(owner: object, origins: Iterable[nn.Parameter]) -> Callable[[], None]:
    """Have steps of optimizers raise that were made of these parameters. Until the function returned is called, or `owner` is gone."""
    _watch_steps()
    ids = [id(origin) for origin in origins]
    _ORIGINS.update(ids)
    undo: Callable[[], None] = weakref.finalize(owner, _ORIGINS.difference_update, ids)
    return undo


@functools.cache
def _watch_steps() -> None:
    register_optimizer_step_pre_hook(_refuse_unless_alive)


def _refuse_unless_alive(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if not _ORIGINS:
        return
    for group in optimizer.param_groups:
        if any(id(parameter) in _ORIGINS for parameter in group["params"]):
            name = type(optimizer).__name__
            raise TrainingError(
                f"{name} was made of the model's parameters before attach(), and would update nothing",
                need="an optimizer of the parameters in the store",
                have="one of what they were before",
                remedy=f"make TieredOptimizer(tiered, torch.optim.{name}, ...) after attach(), or detach() the model",
            )
