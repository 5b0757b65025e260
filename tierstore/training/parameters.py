"""What `params=` of an optimizer means."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from tierstore.errors import OptionError
from tierstore.training.layers import Tiered
from tierstore.training.structure import Weight


def grouped(tiered: Tiered, params: Iterable[Any] | None) -> tuple[list[dict[str, Any]], dict[Weight, int]]:
    """Parameter groups as torch has them, of the parameters that stand in the attached model.

    Args:
        tiered: The model.
        params: None: one group of all that is trainable. Else names, patterns of names or parameters, or dicts of a group's options
            with such
            as "params".

    Returns:
        The groups, and the number of its group for each weight.

    Raises:
        OptionError: What is not in the model, is frozen, is named twice, or a group of nothing.
    """
    weights = tiered.structure.weights
    if params is None and not any(weight.requires_grad for weight in weights):
        raise OptionError("no parameter of the model is trainable", remedy="set requires_grad before attach()")
    if params is None:
        items: list[Any] = [{"params": [weight for weight in weights if weight.requires_grad]}]
    else:
        items = [params] if isinstance(params, str | nn.Parameter) else list(params)
    if not all(isinstance(item, dict) for item in items):
        if any(isinstance(item, dict) for item in items):
            raise OptionError("params= mixes groups and parameters", remedy="give group dicts only, or parameters only")
        items = [{"params": items}]
    by_object = {id(weight.stand_in): weight for weight in weights}
    by_object.update((id(weight.origin), weight) for weight in weights if weight.origin is not None)
    groups: list[dict[str, Any]] = []
    found: dict[Weight, int] = {}
    for number, item in enumerate(items):
        given = item.get("params")
        members = [given] if isinstance(given, str | nn.Parameter) else list(given or ())
        chosen: dict[Weight, None] = {}
        for member in members:
            chosen.update(dict.fromkeys(_meant(member, weights, by_object)))
        for weight in chosen:
            if weight in found:
                raise OptionError(f"parameter {weight.name!r} is in two groups", remedy="name each parameter once")
            found[weight] = number
        if not chosen:
            raise OptionError(f"group {number} of params= has no parameters", remedy="leave it out")
        groups.append({**{key: value for key, value in item.items() if key != "params"}, "params": [weight.stand_in for weight in chosen]})
    return groups, found


def _meant(member: object, weights: list[Weight], by_object: dict[int, Weight]) -> list[Weight]:
    if isinstance(member, Weight):
        return [member]
    if isinstance(member, str):
        chosen = [
            weight
            for weight in weights
            if any(fnmatch.fnmatchcase(name, member) for name in weight.aliases) and (weight.requires_grad or member in weight.aliases)
        ]
    elif isinstance(member, tuple) and len(member) == 2:  # as of named_parameters()
        return _meant(member[1], weights, by_object)
    else:
        chosen = [by_object[id(member)]] if id(member) in by_object else []
    if not chosen:
        have = repr(member) if isinstance(member, str) else type(member).__name__
        raise OptionError(
            "params= names nothing in the model", have=have, remedy="give parameters of the model, or patterns of their names"
        )
    frozen = next((weight for weight in chosen if not weight.requires_grad), None)
    if frozen is not None:
        remedy = "leave it out, or detach(), have it require a gradient and attach() again"
        raise OptionError(f"parameter {frozen.name!r} is frozen and cannot be updated", remedy=remedy)
    return chosen
