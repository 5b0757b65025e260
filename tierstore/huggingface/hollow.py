"""Parameters without values, for as long as a model is changed before its weights are there: by `peft.get_peft_model`, or by hand.

They say that they are on the CPU, so that adapters made beside them are made there, with the random numbers that they would have drawn
beside a loaded model. Whatever looks at their values raises. A copy of one is another parameter with the same origin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tierstore.errors import PlaceholderError, TrainingError
from tierstore.training.placeholders import Placeholder

_SET_GRAD = torch.Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_OF_GRAD = (_SET_GRAD, torch.Tensor.requires_grad_)


class Hollow(Placeholder):
    """In place of a parameter whose values are in a file still.

    Attributes:
        origin: What they are to be, for whoever fills it.
    """

    origin: Any

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"<parameter {self.__dict__['parameter_name']} {tuple(self.shape)} {self.dtype}: its values are in a file>"

    __str__ = __repr__

    def __deepcopy__(self, memo: dict[int, Any]) -> Hollow:
        if id(self) not in memo:
            memo[id(self)] = hollow(self.__dict__["parameter_name"], self, self.__dict__["origin"])
        copy: Hollow = memo[id(self)]
        return copy

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_GRAD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func is torch.Tensor.detach:  # `state_dict()` does that to everything, before it is known what is wanted of it
            fields = args[0].__dict__
            alias = hollow(fields["parameter_name"], args[0], fields["origin"])
            return alias.requires_grad_(False)
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except PlaceholderError as error:
            raise TrainingError(
                f"{error.problem.removesuffix(' outside a lease')} before its values are there",
                need="changes that look at no weights",
                remedy="freeze, add adapters, tie; of PEFT, leave out what begins from the weights (DoRA, PiSSA, OLoRA, LoftQ)",
            ) from error


def hollow(name: str, like: torch.Tensor, origin: object) -> Hollow:
    """A parameter of the shape, dtype and `requires_grad` of `like`."""
    made = Hollow(name, tuple(like.shape), like.dtype, like.requires_grad, torch.device("cpu"))
    made.__dict__["origin"] = origin
    return made


def solid(parameter: nn.Parameter) -> nn.Parameter:
    """What a `Hollow` becomes: a parameter on the meta device."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
