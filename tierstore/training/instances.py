"""Instances of an optimizer class: made with the options of a group, given those of a step, and what a step changes of them.

[Note: What steps change beside parameters]
Some optimizers count their steps in the group's options, or in an attribute of the instance. One instance for all would change these once
in a step, also where no parameter has a gradient. Ours are one per chunk: each begins a step with what the values were before it, and what
they are after it is found by one more instance per group, which takes the same steps on a parameter of a few elements. So it is known in
`step()` already, when updates are put off: a schedule goes on from it. What follows from gradients couples parameters, if updates use it:
the probe refuses that.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tierstore.training.probe import OF_TORCH, PLAIN, changed, has_hooks, name_of, same, snapshot

log = logging.getLogger("tierstore")

Factory = Callable[..., torch.optim.Optimizer]

CONTAINERS = (list, dict, set, np.ndarray)
"""Values of these types may be changed in place."""


@dataclass(frozen=True, slots=True)
class Hyper:
    """What instances are given for a step.

    Attributes:
        options: Of the groups.
        attributes: Those of an instance that steps have changed.
    """

    options: list[dict[str, Any]]
    attributes: dict[str, Any]


def in_group(factory: Factory, options: Mapping[str, Any]) -> Factory:
    """A factory of instances with these options in their group: some make state by them, before the first step."""
    if not options:
        return factory

    @functools.wraps(factory, assigned=("__name__", "__qualname__"), updated=())
    def make(params: Iterable[Tensor], **others: Any) -> torch.optim.Optimizer:
        return factory([{**own_options(options), "params": list(params)}], **others)

    if isinstance(factory, functools.partial):
        make.__name__ = make.__qualname__ = name_of(factory)
    return make


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group, or attributes, for one who may change them in place."""

    def own(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        return copy.deepcopy(value) if isinstance(value, CONTAINERS) else value

    return {key: own(value) for key, value in options.items()}


def give(instance: torch.optim.Optimizer, options: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Have an instance begin a step with these. Returns the options, which are its own now."""
    given = own_options(options)
    instance.param_groups[0].update(given)
    for key, value in own_options(attributes).items():
        setattr(instance, key, value)
    return given


def may_change(instance: torch.optim.Optimizer) -> bool:
    """Whether steps may change more than parameters and state. Torch's own classes, without hooks, do not."""
    return not type(instance).__module__.startswith("torch.optim.") or has_hooks(instance)


class Rehearsal:
    """Takes each step on a small parameter of each group. See [Note: What steps change beside parameters].

    Args:
        factories: By group: what makes an instance.
        options: For each of them.
        samples: By group: a parameter that the class is known to take.
    """

    def __init__(self, factories: Sequence[Factory], options: Mapping[str, Any], samples: Sequence[Tensor]) -> None:
        self._factories = factories
        self._options = options
        self._samples = samples
        self._instances: dict[int, tuple[torch.optim.Optimizer, nn.Parameter]] = {}
        self._told: set[str] = set()
        self._goes_on = False

    def go_on(self) -> None:
        """The parameters have state of earlier steps. Some classes make it when a count is 0: the small ones have to have it, too."""
        self._goes_on = True

    def step(self, hyper: Hyper, stepped: Collection[int]) -> Hyper:
        """Take a step.

        Args:
            hyper: What all instances begin it with.
            stepped: The groups that have gradients.

        Returns:
            The options and attributes that it has changed.
        """
        options: list[dict[str, Any]] = [{} for _ in hyper.options]
        attributes: dict[str, Any] = {}
        with torch.inference_mode(False), torch.no_grad():  # else a later step could not change what is new
            for group in sorted(range(len(hyper.options)), key=lambda group: group not in stepped):
                options[group], found = self._step(group, hyper, has_gradient=group in stepped)
                attributes = {**found, **attributes}
        return Hyper(options, attributes)

    def _step(self, group: int, hyper: Hyper, *, has_gradient: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        if group not in self._instances:
            self._instances[group] = self._made(group)
        instance, leaf = self._instances[group]
        given = give(instance, hyper.options[group], hyper.attributes)
        now = instance.param_groups[0]
        others = own_options({key: value for key, value in now.items() if key not in given and key != "params"})
        versions = {key: value._version for key, value in given.items() if isinstance(value, Tensor)}
        before = snapshot(vars(instance))
        leaf.fill_(1.0)
        leaf.grad = torch.ones_like(leaf) if has_gradient else None
        instance.step()

        def is_changed(key: str, value: Any) -> bool:
            if key not in given:
                return key not in others or not same(others[key], value)
            if value is not given[key]:
                return True
            if isinstance(value, Tensor):  # not by its value, for which a device would be waited for
                return value._version != versions[key]
            return isinstance(value, CONTAINERS) and not same(value, hyper.options[group][key])

        attributes = {key: getattr(instance, key) for key in changed(before, vars(instance)) - OF_TORCH}
        self._tell({key for key, value in attributes.items() if not _is_data(value)}, type(instance).__name__)
        return (
            {key: value for key, value in now.items() if key != "params" and is_changed(key, value)},
            {key: value for key, value in attributes.items() if _is_data(value)},
        )

    def _made(self, group: int) -> tuple[torch.optim.Optimizer, nn.Parameter]:
        leaf = nn.Parameter(self._samples[group].clone())
        instance = self._factories[group]([leaf], **self._options)
        if self._goes_on:
            now, before = instance.param_groups[0], snapshot(vars(instance))
            options = own_options({key: value for key, value in now.items() if key != "params"})
            attributes = own_options({key: value for key, value in vars(instance).items() if key not in OF_TORCH and _is_data(value)})
            leaf.grad = torch.ones_like(leaf)
            instance.step()
            now.clear()
            now.update(options, params=[leaf])
            for key in changed(before, vars(instance)) - OF_TORCH:
                if key in attributes:
                    setattr(instance, key, attributes[key])
                elif key not in before:
                    delattr(instance, key)
        return instance, leaf

    def _tell(self, opaque: Collection[str], name: str) -> None:
        new = sorted(set(opaque) - self._told)
        if new:
            self._told.update(new)
            log.warning(
                "%s changes attributes of its own in step() that are no plain data (%s): each part of the parameters has its own, and no "
                "commit has them. Keep such values in param_groups or in the state",
                name,
                ", ".join(new),
            )


def _is_data(value: Any) -> bool:
    """Whether a value means the same to another instance: no table of parameters, say."""
    if isinstance(value, dict):
        return all(isinstance(key, PLAIN) and _is_data(inner) for key, inner in value.items())
    if isinstance(value, list | tuple | set):
        return all(map(_is_data, value))
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return isinstance(value, (*PLAIN, np.ndarray, np.generic))
