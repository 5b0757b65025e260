"""What `tierstore.training.rules` claims of optimizer classes, against what the classes do: every claim about bits is tried bit for bit."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from tierstore.errors import OptionError
from tierstore.training import rules as module
from tierstore.training.probe import Kind, Probe, probe
from tierstore.training.rules import KNOWN, declare_elementwise, resolved_implementation, rules_of

NUM_STEPS = 4
DTYPES = [torch.float32, torch.bfloat16]

# Options by class, beside the defaults. A tensor stands for a learning rate in a tensor, made anew for each instance.
WITH_STATE_OF_ALL_KINDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "ASGD": [{"lambd": 0.1, "alpha": 0.5, "t0": 2.0, "weight_decay": 0.1}, {"maximize": True}, {"lr": torch.tensor(0.05)}],
    "Adadelta": [{"lr": 0.5, "rho": 0.8, "weight_decay": 0.1}, {"maximize": True, "eps": 1e-3}, {"lr": torch.tensor(0.5)}],
    "Adafactor": [{"weight_decay": 0.1}, {"maximize": True}, {"eps": (1e-8, 1e-2), "d": 2.0, "beta2_decay": -0.5}],
    "Adagrad": [{"lr_decay": 0.1, "weight_decay": 0.1}, {"initial_accumulator_value": 0.3}, {"maximize": True}, {"lr": torch.tensor(0.05)}],
    "Adam": [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "eps": 1e-3}, {"lr": torch.tensor(0.05)}],
    "AdamW": [{"lr": 0.05, "betas": (0.5, 0.7)}, {"amsgrad": True, "weight_decay": 0.3}, {"maximize": True}, {"lr": torch.tensor(0.05)}],
    "Adamax": [{"weight_decay": 0.1}, {"maximize": True}, {"lr": torch.tensor(0.05)}],
    "Muon": [{"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3, "ns_steps": 2}],
    "NAdam": [{"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"momentum_decay": 0.1, "maximize": True}],
    # RAdam rectifies once 2 / (1 - beta2) - 1 > 5, as from step 4 on with this one.
    "RAdam": [{"betas": (0.5, 0.8)}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}],
    "RMSprop": [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.5, "centered": True, "weight_decay": 0.1}, {"maximize": True}],
    "Rprop": [{"etas": (0.3, 1.7), "step_sizes": (1e-3, 0.1)}, {"maximize": True}, {"lr": torch.tensor(0.05)}],
    "SGD": [
        *({"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        *({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}, {"lr": torch.tensor(0.05), "momentum": 0.9}),
    ],
}
REFUSED = ("LBFGS", "SparseAdam")


def exported() -> dict[str, type[Optimizer]]:
    """Every optimizer class of this version of torch."""
    found = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type) and issubclass(value, Optimizer)}
    return {name: found[name] for name in sorted(found) if found[name] is not Optimizer}


CLASSES = exported()


def implementations(cls: type[Optimizer]) -> list[dict[str, bool]]:
    """One tensor at a time, all at once, fused: as far as the class has them."""
    names = inspect.signature(cls).parameters
    every: list[dict[str, bool]] = [{}]
    every += [{"foreach": True}] if "foreach" in names else []
    every += [{"fused": True}] if "fused" in names else []
    return every


def settings() -> list[Any]:
    """Every class that is not refused, with every row of the table, with every implementation."""
    cases = []
    for name, cls in CLASSES.items():
        if name in REFUSED:
            continue
        for row in ({}, *WITH_STATE_OF_ALL_KINDS.get(name, ())):
            for how in implementations(cls):
                if how.get("foreach") and isinstance(row.get("lr"), torch.Tensor) and name in ("Adam", "AdamW"):
                    continue  # torch refuses these
                options = {**row, **how}
                text = ",".join(f"{key}={value}" for key, value in options.items()) or "defaults"
                cases.append(pytest.param(cls, options, id=f"{name}-{text}"))
    return cases


SETTINGS = settings()
ELEMENTWISE = [case for case in SETTINGS if case.values[0].__name__ not in ("Adafactor", "Muon")]


def make(cls: Callable[..., Optimizer], parameters: Sequence[torch.Tensor], options: Mapping[str, Any]) -> Optimizer:
    own = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    return cls(list(parameters), **own)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state_bits(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: (value.dtype, value.shape, bits(value)) if isinstance(value, torch.Tensor) else value for key, value in state.items()}


@pytest.fixture
def threads() -> Iterator[None]:
    """Two threads, whatever the machine has, so that large tensors are shared out between them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def loses_updates(cls: type[Optimizer], options: Mapping[str, Any], dtype: torch.dtype, device: str) -> bool:
    """Torch up to 2.13: the fused SGD for CPUs leaves whole vectors of 16-bit weights as they are, and writes what lies about into the momentum."""
    if not options.get("fused") or cls is not torch.optim.SGD:
        return False
    parameter = torch.zeros(64, dtype=dtype, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=1.0, fused=True).step()
    return not parameter.all()


# -- grouping -----------------------------------------------------------------------------------------------------------

SHAPES = [(64, 33), (7,), (5, 3, 3, 3), (1, 130), (), (9, 8)]
MATRICES = [(16, 8), (5, 40), (33, 7), (8, 8)]


def shapes_for(cls: type[Optimizer]) -> list[tuple[int, ...]]:
    return MATRICES if cls.__name__ == "Muon" else SHAPES


def values(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], device: str, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


def has_gradient(number: int, step: int) -> bool:
    """Parameters miss the gradient in different steps. All have one in the first: torch's fused SGD fails otherwise."""
    return step == 0 or (number + step) % 3 != 0


def train(
    cls: Callable[..., Optimizer],
    options: Mapping[str, Any],
    groups: Sequence[Sequence[int]],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype],
    device: str,
) -> list[Any]:
    """Parameters and state after each step, with an instance for each group."""
    parameters = [value.requires_grad_() for value in values(shapes, dtypes, device, 0)]
    instances = [make(cls, [parameters[number] for number in group], options) for group in groups]
    history = []
    for step in range(NUM_STEPS):
        for number, gradient in enumerate(values(shapes, dtypes, device, 1 + step)):
            parameters[number].grad = gradient if has_gradient(number, step) else None
        for instance in instances:
            instance.step()
        owner = {number: instance for group, instance in zip(groups, instances, strict=True) for number in group}
        history.append([(bits(one), state_bits(owner[number].state.get(one, {}))) for number, one in enumerate(parameters)])
    return history


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), SETTINGS)
def test_instances_for_a_few_parameters_give_the_bits_of_one_for_all(
    cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    if loses_updates(cls, options, dtype, device):
        pytest.skip("refused, see below")
    shapes = shapes_for(cls)
    everything = range(len(shapes))
    dtypes = [dtype for _ in everything]
    one = train(cls, options, [list(everything)], shapes, dtypes, device)
    assert one[0] != one[-1]
    assert train(cls, options, [[number] for number in everything], shapes, dtypes, device) == one
    assert train(cls, options, [list(everything[start : start + 2]) for start in everything[::2]], shapes, dtypes, device) == one


# -- ranges -------------------------------------------------------------------------------------------------------------

LENGTHS = [99_937, 65_536 + 8, 4_000]  # across the grain of torch's threads (32,768 elements), none of them whole vectors for each thread
CUTS = [0, 64, 4_096, 32_768 + 64, 49_984, 65_536, 99_840]


def pieces(length: int) -> list[slice]:
    starts = [cut for cut in CUTS if cut < length]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]


def awkward(length: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Normal numbers among zeros of both signs, subnormal, tiny and huge ones, infinities and NaN, at each place of a vector."""
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    odd = torch.tensor([0.0, -0.0, 1e-40, -3e-42, 1e-20, 1e18, -1e30, float("inf"), float("nan")])
    places = torch.arange(seed % 7, length, 37)
    tensor[places] = odd[torch.arange(len(places)) % len(odd)]
    return tensor.to(device, dtype)


def in_ranges(
    cls: Callable[..., Optimizer], options: Mapping[str, Any], length: int, cuts: Sequence[slice], dtype: torch.dtype, device: str
) -> list[Any]:
    """Bits of a parameter and of its state of the same shape after each step, the other state, and how many instances made them."""
    whole = awkward(length, dtype, device, 0)
    parameters = [whole[cut].detach().requires_grad_() for cut in cuts]
    instances = [make(cls, [parameter], options) for parameter in parameters]
    history = []
    for step in range(NUM_STEPS):
        gradient = awkward(length, dtype, device, 1 + step)
        for parameter, cut, instance in zip(parameters, cuts, instances, strict=True):
            parameter.grad = gradient[cut]
            instance.step()
        states = [instance.state.get(parameter, {}) for parameter, instance in zip(parameters, instances, strict=True)]
        same = {key for key, value in states[0].items() if isinstance(value, torch.Tensor) and value.ndim}
        history.append(
            (
                bits(whole),
                {key: b"".join(bits(state[key]) for state in states) for key in same},
                {repr(state_bits({key: value for key, value in state.items() if key not in same})) for state in states},
            )
        )
    return history


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), ELEMENTWISE)
def test_ranges_give_the_bits_of_whole_parameters(cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    if loses_updates(cls, options, dtype, device):
        pytest.skip("refused, see below")
    assert rules_of(cls, options, dtype, torch.device(device)).elementwise
    for length in LENGTHS:
        whole = in_ranges(cls, options, length, [slice(0, length)], dtype, device)
        assert whole[0] != whole[-1]
        assert in_ranges(cls, options, length, pieces(length), dtype, device) == whole
