"""What `tierstore.training.rules` claims of optimizer classes, against what the classes do: every claim about bits is tried bit for bit."""

from __future__ import annotations

import functools
import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from tests.torch_threads import torch_threads
from tierstore.errors import OptionError
from tierstore.training import rules as module
from tierstore.training.probe import Kind, Probe, probe
from tierstore.training.rules import KNOWN, declare_elementwise, resolved_implementation, rules_of

NUM_STEPS = 4
SEED = int(os.environ.get("TIERSTORE_SIMULATION_BASE", os.environ.get("GITHUB_RUN_NUMBER", "0")))
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
ELEMENTWISE = [case for case in SETTINGS if case.values[0].__name__ not in ("Adafactor", "Muon")]  # on most devices, in most dtypes


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
    with torch_threads(2):
        yield


def is_broken(cls: type[Optimizer], options: Mapping[str, Any], dtype: torch.dtype, device: str) -> bool:
    """Whether torch has no fused kernel here, or one that loses updates.

    Up to 2.13 the fused SGD for CPUs changes no whole vector of 16-bit weights, and puts what lies about in memory into the momentum.
    """
    if not options.get("fused"):
        return False
    parameter = torch.zeros(64, dtype=dtype, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    try:
        cls([parameter], lr=1.0, fused=True).step()
    except RuntimeError:
        return True
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
    """Parameters after each step and state at the end, with an instance for each group."""
    parameters = [value.requires_grad_() for value in values(shapes, dtypes, device, 0)]
    instances = [make(cls, [parameters[number] for number in group], options) for group in groups]
    history = []
    for step in range(NUM_STEPS):
        for number, gradient in enumerate(values(shapes, dtypes, device, 1 + step)):
            parameters[number].grad = gradient if has_gradient(number, step) else None
        for instance in instances:
            instance.step()
        history.append([bits(parameter) for parameter in parameters])
    owner = {number: instance for group, instance in zip(groups, instances, strict=True) for number in group}
    return [*history, [state_bits(owner[number].state.get(parameter, {})) for number, parameter in enumerate(parameters)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), SETTINGS)
def test_instances_for_a_few_parameters_give_the_bits_of_one_for_all(
    cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    if is_broken(cls, options, dtype, device):
        refused(cls, options, dtype, device)
        return
    shapes = shapes_for(cls)
    dtypes = [dtype for _ in shapes]
    one = train(cls, options, [list(range(len(shapes)))], shapes, dtypes, device)
    assert one[0] != one[NUM_STEPS - 1]
    assert train(cls, options, [[0], [2, 1], list(range(3, len(shapes)))], shapes, dtypes, device) == one


@pytest.mark.parametrize("how", [{}, {"foreach": True}], ids=str)
def test_adafactor_takes_its_epsilon_from_the_first_dtype_of_a_group(how: dict[str, bool], device: str) -> None:
    """What `mixed_dtypes` is for: gradients this small are clamped to an epsilon that belongs to another parameter."""
    cls, shapes, dtypes = torch.optim.Adafactor, [(6, 5), (7, 3)], [torch.bfloat16, torch.float32]

    def trained(options: Mapping[str, Any], groups: list[list[int]]) -> list[bytes]:
        parameters = [value.requires_grad_() for value in values(shapes, dtypes, device, 0)]
        for parameter, gradient in zip(parameters, values(shapes, dtypes, device, 1), strict=True):
            parameter.grad = gradient * 1e-6
        for group in groups:
            make(cls, [parameters[number] for number in group], options).step()
        return [bits(parameter) for parameter in parameters]

    assert trained(how, [[0, 1]]) != trained(how, [[0], [1]])
    assert not rules_of(cls, how, torch.float32, torch.device(device)).mixed_dtypes
    given = {**how, "eps": (1e-7, 1e-3)}
    assert trained(given, [[0, 1]]) == trained(given, [[0], [1]])
    assert rules_of(cls, given, torch.float32, torch.device(device)).mixed_dtypes


@pytest.mark.parametrize(("cls", "options"), [case for case in ELEMENTWISE if len(case.values[1]) < 2])
def test_mixed_dtypes_may_be_spread_over_instances(cls: type[Optimizer], options: dict[str, Any], device: str) -> None:
    if is_broken(cls, options, torch.bfloat16, device):
        refused(cls, options, torch.bfloat16, device)
        return
    assert rules_of(cls, options, torch.float32, torch.device(device)).mixed_dtypes
    dtypes = [DTYPES[number % 2] for number in range(len(SHAPES))]
    one = train(cls, options, [list(range(len(SHAPES)))], SHAPES, dtypes, device)
    assert train(cls, options, [[0, 2, 4], [1, 3, 5]], SHAPES, dtypes, device) == one


# -- ranges -------------------------------------------------------------------------------------------------------------

# More than the 32,768 elements that torch gives a thread at least, as has one of the ranges, and no whole number of vectors a thread.
LENGTH = 37_001
RAGGED = [0, 64, 36_992]


def slices(length: int, starts: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]


@functools.cache
def awkward(length: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Normal numbers among zeros of both signs, subnormal, tiny and huge ones, infinities and NaN, at each place of a vector."""
    tensor = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    odd = torch.tensor([0.0, -0.0, 1e-40, -3e-42, 1e-20, 1e18, -1e30, float("inf"), float("nan")])
    places = torch.arange(seed % 7, length, 37)
    tensor[places] = odd[torch.arange(len(places)) % len(odd)]
    return tensor.to(device, dtype)


def in_ranges(
    cls: type[Optimizer], options: Mapping[str, Any], cuts: Sequence[slice], length: int, dtype: torch.dtype, device: str
) -> list[torch.Tensor]:
    """Bits of a parameter after each step, and of its state at the end, with an instance for each range."""
    whole = awkward(length, dtype, device, 0).clone()
    parameters = [whole[cut].detach().requires_grad_() for cut in cuts]
    instances = [make(cls, [parameter], options) for parameter in parameters]
    history = []
    for step in range(4 if cls.__name__ in ("ASGD", "RAdam") else 2):  # these begin to average and to rectify late
        gradient = awkward(length, dtype, device, 1 + step).clone()
        for parameter, cut, instance in zip(parameters, cuts, instances, strict=True):
            parameter.grad = gradient[cut]
            instance.step()
        history.append(whole.clone())
    states = [instance.state.get(parameter, {}) for parameter, instance in zip(parameters, instances, strict=True)]
    for key in sorted(states[0]):
        tensors = [state[key] for state in states]
        if tensors[0].ndim:
            history.append(torch.cat(tensors))
        else:
            assert len({bits(tensor) for tensor in tensors}) == 1
            history.append(tensors[0].view(1))
    # A NaN is a NaN: on CPUs its sign depends on whether it came out of a vector, which nothing that compares numbers can see.
    return [tensor.masked_fill(tensor.isnan(), float("nan")).view(torch.uint8) for tensor in history]


def equal(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "options"), SETTINGS)
def test_ranges_give_the_bits_of_whole_parameters(cls: type[Optimizer], options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    if is_broken(cls, options, dtype, device):
        refused(cls, options, dtype, device)
        return
    rules = rules_of(cls, options, dtype, torch.device(device))
    elementwise = rules.elementwise
    assert rules.may_cut((LENGTH,)) == (elementwise and not (device == "cuda" and options.get("fused")))
    length = LENGTH // rules.multiple * rules.multiple
    sixteen_on_cpu = device == "cpu" and dtype is torch.bfloat16 and not options.get("fused")
    assert elementwise == (cls.__name__ not in ("Adafactor", "Muon") and not sixteen_on_cpu)
    if elementwise:
        whole = in_ranges(cls, options, [slice(0, length)], length, dtype, device)
        assert not torch.equal(whole[0], whole[1])
        assert equal(in_ranges(cls, options, slices(length, RAGGED), length, dtype, device), whole)


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="longer: HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_any_ranges_give_the_bits_of_whole_parameters(num_threads: int, device: str) -> None:
    draw = random.Random(f"{num_threads} {SEED}")
    with torch_threads(num_threads):
        for cls, options in (case.values for case in SETTINGS):
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                if is_broken(cls, options, dtype, device):
                    continue
                rules = rules_of(cls, options, dtype, torch.device(device))
                if not rules.elementwise:
                    continue
                length = draw.choice([draw.randrange(1, 5_000), draw.randrange(30_000, 300_000)])
                length = -(-length // rules.multiple) * rules.multiple
                starts = sorted({0, *(64 * draw.randrange(-(-length // 64)) for _ in range(draw.randrange(1, 6)))})
                whole = in_ranges(cls, options, [slice(0, length)], length, dtype, device)
                assert equal(in_ranges(cls, options, slices(length, starts), length, dtype, device), whole), (
                    cls,
                    options,
                    dtype,
                    length,
                    starts,
                )
                awkward.cache_clear()


@pytest.mark.usefixtures("threads")
def test_sixteen_bits_on_cpus_need_the_exception() -> None:
    """Elements that a thread computes one by one in the whole parameter are computed as vectors in a range."""
    options = {"lr": 0.1}
    whole = in_ranges(torch.optim.SGD, options, [slice(0, LENGTH)], LENGTH, torch.bfloat16, "cpu")
    if equal(in_ranges(torch.optim.SGD, options, slices(LENGTH, RAGGED), LENGTH, torch.bfloat16, "cpu"), whole):
        pytest.skip(f"the kernels for {torch.backends.cpu.get_cpu_capability()} round alike")


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"eps": (1e-8, 1e-2)}], ids=str)
@pytest.mark.parametrize("shape", [(128,), (32, 16)], ids=str)
def test_adafactor_needs_whole_parameters(shape: tuple[int, ...], options: dict[str, Any], device: str) -> None:
    assert not rules_of(torch.optim.Adafactor, options, torch.float32, torch.device(device)).elementwise
    assert differs_in_ranges(torch.optim.Adafactor, options, shape, device, lambda tensor: list(tensor.view(-1).split(64)))


def test_muon_needs_whole_parameters(device: str) -> None:
    """It takes no vectors, and of rows it makes something else."""
    assert not rules_of(torch.optim.Muon, {}, torch.float32, torch.device(device)).elementwise
    assert differs_in_ranges(torch.optim.Muon, {}, (32, 16), device, lambda tensor: list(tensor.split(16)))
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([torch.zeros(64, requires_grad=True)])


def differs_in_ranges(
    cls: type[Optimizer], options: Mapping[str, Any], shape: tuple[int, ...], device: str, cut: Callable[[torch.Tensor], list[torch.Tensor]]
) -> bool:
    def trained(cut: Callable[[torch.Tensor], list[torch.Tensor]]) -> bytes:
        whole, gradient = values([shape, shape], [torch.float32] * 2, device, 0)
        for piece, part in zip(cut(whole), cut(gradient), strict=True):
            piece.requires_grad_().grad = part
            make(cls, [piece], options).step()
        return bits(whole)

    return trained(cut) != trained(lambda tensor: [tensor])


def test_ranges_need_contiguous_parameters() -> None:
    with pytest.raises(RuntimeError, match="view"):
        torch.zeros(8, 16).t().view(-1)
    strided = torch.zeros(8, 16).t().requires_grad_()
    strided.grad = torch.ones(16, 8)
    optimizer = torch.optim.AdamW([strided])
    optimizer.step()
    assert optimizer.state[strided]["exp_avg"].stride() == strided.stride() != strided.grad.stride()


# -- what is known of torch's classes -----------------------------------------------------------------------------------

# same-shaped state, 0-d state, for the defaults
STATE: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ASGD": (("ax",), ("eta", "mu", "step")),
    "Adadelta": (("acc_delta", "square_avg"), ("step",)),
    "Adafactor": (("variance",), ("step",)),
    "Adagrad": (("sum",), ("step",)),
    "Adam": (("exp_avg", "exp_avg_sq"), ("step",)),
    "AdamW": (("exp_avg", "exp_avg_sq"), ("step",)),
    "Adamax": (("exp_avg", "exp_inf"), ("step",)),
    "Muon": (("momentum_buffer",), ()),
    "NAdam": (("exp_avg", "exp_avg_sq"), ("mu_product", "step")),
    "RAdam": (("exp_avg", "exp_avg_sq"), ("step",)),
    "RMSprop": (("square_avg",), ("step",)),
    "Rprop": (("prev", "step_size"), ("step",)),
    "SGD": ((), ()),
}


def test_the_table_knows_every_class_of_torch() -> None:
    assert set(CLASSES) <= set(KNOWN), "decide, by its source and by these tests, whether the new class is elementwise"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_what_is_found_of_a_class(name: str, dtype: torch.dtype, device: str) -> None:
    found = rules_of(CLASSES[name], {}, dtype, torch.device(device))
    same, scalars = STATE[name]
    assert found.name == name
    assert found.keys(Kind.SAME) == same
    assert found.keys(Kind.SCALAR) == scalars
    assert found.keys(Kind.OTHER) == (("col_var", "row_var") if name == "Adafactor" else ())
    assert found.keys(Kind.PLAIN) == ()
    assert found.state_bytes_per_element == len(same) * dtype.itemsize
    assert found.state_at_construction == (name == "Adagrad")
    assert (found.changed_options, found.changed_attributes, found.replaced_state) == ((), (), ())
    assert not found.replaces_parameters
    assert not found.writes_gradients
    assert found.ndims == ({2} if name == "Muon" else {0, 1, 2, 3, 4})
    assert all(entry.dtype is torch.float32 for entry in found.entries if entry.kind is Kind.SCALAR)
    # Only ASGD has its scalars on the device, unless capturable= or fused= asks for it.
    where = {entry.device_type for entry in found.entries if entry.kind is Kind.SCALAR}
    assert where <= {device if name == "ASGD" else "cpu"}


@pytest.mark.parametrize(("cls", "options"), [case for case in SETTINGS if not {"foreach", "fused"} & set(case.values[1])])
def test_the_size_of_state_is_told_beforehand(cls: type[Optimizer], options: dict[str, Any], device: str) -> None:
    found = rules_of(cls, options, torch.float32, torch.device(device))
    for shape in ((6, 10), (70,), (), (3, 4, 5), (3, 4, 5, 6), (2, 2, 2, 2, 3)):
        if not found.accepts(shape):
            assert cls.__name__ == "Muon"
            continue
        parameter = torch.ones(shape, device=device, requires_grad=True)
        parameter.grad = torch.ones_like(parameter)
        instance = make(cls, [parameter], options)
        instance.step()
        state = instance.state.get(parameter, {})
        told = found.state_bytes(shape)
        if cls.__name__ == "Adafactor" and len(shape) > 4:
            assert told is None
            continue
        assert told == sum(value.numel() * value.itemsize for value in state.values())
        if cls.__name__ != "Adafactor":
            per_parameter = sum(value.itemsize for value in state.values() if value.shape == shape) if shape else None
            assert per_parameter in (None, found.state_bytes_per_element)


def test_options_that_add_state_are_noticed() -> None:
    def same(cls: type[Optimizer], **options: Any) -> tuple[str, ...]:
        return rules_of(cls, options, torch.float32, torch.device("cpu")).keys(Kind.SAME)

    assert same(torch.optim.SGD) == ()
    assert same(torch.optim.SGD, momentum=0.9) == ("momentum_buffer",)
    assert same(torch.optim.AdamW, amsgrad=True) == ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    assert same(torch.optim.RMSprop, momentum=0.9, centered=True) == ("grad_avg", "momentum_buffer", "square_avg")


@pytest.mark.parametrize(
    ("how", "writes"), [({"foreach": True}, True), ({}, False), ({"foreach": True, "weight_decay": 0.1}, False)], ids=str
)
def test_nesterov_sgd_overwrites_gradients_in_its_foreach_form(how: dict[str, Any], writes: bool, device: str) -> None:
    options = {"momentum": 0.9, "nesterov": True, "foreach": False, **how}
    assert rules_of(torch.optim.SGD, options, torch.float32, torch.device(device)).writes_gradients == writes


@pytest.mark.parametrize("fused", [False, True])
def test_adagrad_goes_on_from_state_given_after_construction(fused: bool) -> None:
    """How a driver brings state from elsewhere into a class that makes its own, when it is constructed (up to torch 2.11) or later."""

    def step(instance: Optimizer, parameter: torch.Tensor, seed: int) -> None:
        parameter.grad = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        instance.step()

    options = {"initial_accumulator_value": 0.3, "fused": fused}
    reference = torch.ones(40, requires_grad=True)
    whole = torch.optim.Adagrad([reference], **options)
    driven = torch.ones(40, requires_grad=True)
    first = torch.optim.Adagrad([driven], **options)
    made = dict(first.state[driven])
    first.state.clear()
    first.state[driven] = made
    for instance, parameter in ((whole, reference), (first, driven)):
        step(instance, parameter, 1)
    assert state_bits(whole.state[reference]) == state_bits(first.state[driven])
    second = torch.optim.Adagrad([driven], **options)
    second.state[driven] = {key: value.clone() for key, value in first.state[driven].items()}
    for instance, parameter in ((whole, reference), (second, driven)):
        step(instance, parameter, 2)
    assert bits(reference) == bits(driven)
    assert state_bits(whole.state[reference]) == state_bits(second.state[driven])


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name in CLASSES if "capturable" in inspect.signature(CLASSES[name]).parameters])
def test_capturable_keeps_scalars_on_the_device(name: str) -> None:
    found = rules_of(CLASSES[name], {"capturable": True}, torch.float32, torch.device("cuda"))
    assert {entry.device_type for entry in found.entries} == {"cuda"}


# -- what is refused ----------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def refused(
    factory: Callable[..., Any], options: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> OptionError:
    """The error, which says all that an error must."""
    with pytest.raises(OptionError) as caught:
        rules_of(factory, options or {}, dtype, torch.device(device))
    error = caught.value
    assert error.need
    assert error.have
    assert error.remedy
    assert error.optimizer in str(error)
    return error


@pytest.mark.parametrize(("name", "why"), [("LBFGS", "requires a closure"), ("SparseAdam", "sparse gradients only")])
def test_classes_that_cannot_be_driven_are_refused_by_name(name: str, why: str) -> None:
    for factory in (CLASSES[name], functools.partial(CLASSES[name], lr=0.1), lambda parameters: CLASSES[name](list(parameters))):
        error = refused(factory)
        assert why in str(error)
    assert name in str(refused(CLASSES[name]))


def test_refused_options() -> None:
    assert "differentiable" in str(refused(torch.optim.AdamW, {"differentiable": True}))
    assert "differentiable" in str(refused(functools.partial(torch.optim.SGD, differentiable=True)))
    assert "Invalid learning rate" in str(refused(torch.optim.AdamW, {"lr": -1.0}))
    assert "'learning_rate'" in str(refused(torch.optim.AdamW, {"learning_rate": 0.1}))
    assert "cannot be `True` together" in str(refused(torch.optim.AdamW, {"foreach": True, "fused": True}))
    for dtype in (torch.complex64, torch.int64, torch.bool):
        assert str(dtype) in str(refused(torch.optim.AdamW, dtype=dtype))


@pytest.mark.parametrize("name", [name for name in CLASSES if "capturable" in inspect.signature(CLASSES[name]).parameters])
def test_capturable_is_refused_where_nothing_can_be_captured(name: str) -> None:
    error = refused(CLASSES[name], {"capturable": True})
    assert "capturable=False" in error.remedy
    assert error.__cause__ is not None  # torch's own refusal


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_sgd_is_refused_where_it_is_broken(momentum: float) -> None:
    options = {"fused": True, "momentum": momentum}
    for dtype in (torch.bfloat16, torch.float16):
        if is_broken(torch.optim.SGD, options, dtype, "cpu"):
            assert "leaves weights" in str(refused(torch.optim.SGD, options, dtype))
        else:
            assert rules_of(torch.optim.SGD, options, dtype, CPU).elementwise
    assert rules_of(torch.optim.SGD, options, torch.float32, CPU).elementwise


# -- users' classes -----------------------------------------------------------------------------------------------------


class Momentum(Optimizer):
    """A user's SGD with momentum, an average, and a Python counter in the state."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(group, parameter, self.state[parameter])

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        if not state:
            state.update(calls=0, buffer=torch.zeros_like(parameter), slow=parameter.detach().float().clone())
        state["calls"] += 1
        state["buffer"].mul_(0.9).add_(parameter.grad)
        state["slow"].lerp_(parameter.float(), 1 / (1 + state["calls"]))
        parameter.sub_(state["buffer"], alpha=group["lr"] / state["calls"])


class CountsInTheGroup(Momentum):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            group["history"] = [*group.get("history", []), group["calls"]]
        super().step()


class CountsOnItself(Momentum):
    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        super().step()


class Replaces(Momentum):
    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state["buffer"] = state.get("buffer", torch.zeros_like(parameter)) * 0.9 + parameter.grad
        parameter.data = parameter.data - group["lr"] * state["buffer"]
        parameter.grad.zero_()


class PerParameterNorm(Momentum):
    """Separate for parameters, but not for elements."""

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        parameter.sub_(parameter.grad / parameter.grad.norm(), alpha=group["lr"])


class GlobalNorm(Momentum):
    def step(self, closure: Any = None) -> None:
        gradients = [one.grad for group in self.param_groups for one in group["params"] if one.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else None
        for gradient in gradients:
            gradient.div_(norm)
        super().step()


class CountsParameters(Momentum):
    """Couples only through a counter, which parameters without a gradient do not move."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.updates = 0

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        self.updates += 1
        parameter.sub_(parameter.grad, alpha=0.1 / self.updates)


class NeedsClosure(Momentum):
    def step(self, closure: Any = None) -> None:
        closure()
        super().step()


class DemandsClosure(Momentum):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step()


class Noisy(Momentum):
    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        parameter.sub_(torch.rand_like(parameter))


class NoisyElsewhere(Momentum):
    generator = np.random.default_rng(0)

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        parameter.sub_(float(self.generator.random()))


class KeepsLooseState(Momentum):
    def step(self, closure: Any = None) -> None:
        self.state["calls"] = self.state.get("calls", 0) or {}
        super().step()


class KeepsLists(Momentum):
    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state.setdefault("history", []).append(parameter.grad)


class KeepsTheParameter(Momentum):
    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state["anchor"] = parameter.data
        parameter.sub_(parameter.grad)


class SharesState(Momentum):
    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.calls = torch.zeros(())

    def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
        state["calls"] = self.calls
        parameter.sub_(parameter.grad)


def test_a_users_class_is_driven_whole_unless_it_is_declared() -> None:
    found = rules_of(Momentum, {"lr": 0.2}, torch.bfloat16, CPU)
    assert found.name == "Momentum"
    assert not found.elementwise
    assert found.keys(Kind.SAME) == ("buffer", "slow")
    assert found.keys(Kind.PLAIN) == ("calls",)
    assert found.state_bytes_per_element == 6.0
    assert found.state_bytes((4, 8)) == 6 * 32
    assert resolved_implementation(Momentum, {}, [torch.zeros(3)]) == {}


def test_declarations() -> None:
    class Declared(Momentum):
        tierstore_elementwise = True

    class Subclass(Declared):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.3)

    class Changed(Declared):
        def update(self, group: dict[str, Any], parameter: torch.Tensor, state: dict[str, Any]) -> None:
            parameter.sub_(parameter.grad / parameter.grad.norm())

    class Withdrawn(Declared):
        tierstore_elementwise = False

    class Called(Momentum):
        pass

    def elementwise(cls: type[Optimizer]) -> bool:
        return rules_of(cls, {}, torch.float32, CPU).elementwise

    assert elementwise(Declared)
    assert elementwise(Subclass)
    assert not elementwise(Changed)
    assert not elementwise(Withdrawn)
    assert not elementwise(Called)
    assert declare_elementwise(Called) is Called
    assert elementwise(Called)
    assert not elementwise(Momentum)


def test_a_false_declaration_is_refused() -> None:
    class Wrong(PerParameterNorm):
        tierstore_elementwise = True

    assert not rules_of(PerParameterNorm, {}, torch.float32, CPU).elementwise
    assert "is declared elementwise, and is not" in str(refused(Wrong))


@pytest.mark.parametrize("first", ["parent", "child"])
def test_subclasses_of_torchs_classes(first: str) -> None:
    """Torch wraps step() where the first instance of a family is made: in the subclass, if that comes first."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # from here on, `functools.wraps` copies torch's mark

    class Parent(torch.optim.AdamW):
        pass

    class Defaults(Parent):
        """Only other defaults."""

        def __init__(self, params: Any, lr: float = 0.5) -> None:
            super().__init__(params, lr=lr)

    class Overrides(Parent):
        @functools.wraps(torch.optim.AdamW.step)
        def step(self, *arguments: Any) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter.numel() > 1_000:  # more than any that the probe tries
                        parameter.grad = parameter.grad / parameter.grad.norm()
            return super().step(*arguments)

    class Helps(Parent):
        def _init_group(self, *arguments: Any) -> Any:
            return super()._init_group(*arguments)

    class Hooks(Parent):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.register_step_pre_hook(lambda *_: None)

    raw = torch.optim.Adam.step.__wrapped__ if hasattr(torch.optim.Adam.step, "hooked") else torch.optim.Adam.step
    hooked = torch.optim.Adam.step
    try:
        torch.optim.Adam.step = raw  # type: ignore[method-assign]
        order = [Parent, Defaults] if first == "parent" else [Defaults, Parent]
        for cls in order:
            assert rules_of(cls, {}, torch.float32, CPU).elementwise, cls
        for cls in (Overrides, Helps, Hooks):
            assert not rules_of(cls, {}, torch.float32, CPU).elementwise, cls
    finally:
        torch.optim.Adam.step = hooked  # type: ignore[method-assign]
    assert resolved_implementation(Defaults, {}, [torch.zeros(3)]) == {"foreach": False, "fused": False}


def test_what_a_driver_must_know_of_users_classes() -> None:
    counts = rules_of(CountsInTheGroup, {}, torch.float32, CPU)
    assert counts.changed_options == ("calls", "history")
    assert counts.changed_attributes == ()
    assert rules_of(CountsOnItself, {}, torch.float32, CPU).changed_attributes == ("calls",)
    replaces = rules_of(Replaces, {}, torch.float32, CPU)
    assert replaces.replaced_state == ("buffer",)
    assert replaces.replaces_parameters
    assert replaces.writes_gradients
    quiet = rules_of(Momentum, {}, torch.float32, CPU)
    assert (quiet.changed_options, quiet.changed_attributes, quiet.replaced_state) == ((), (), ())
    assert not quiet.replaces_parameters
    assert not quiet.writes_gradients


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (GlobalNorm, "couples parameters"),
        (CountsParameters, "couples parameters"),
        (NeedsClosure, "requires a closure"),
        (DemandsClosure, "requires a closure"),
        (Noisy, "draws random numbers"),
        (NoisyElsewhere, "does not repeat itself"),
        (KeepsLooseState, "belongs to no parameter"),
        (KeepsLists, "cannot be stored by name"),
        (KeepsTheParameter, "share memory"),
        (SharesState, "share memory"),
    ],
)
def test_users_classes_that_cannot_be_driven(cls: type[Optimizer], why: str) -> None:
    error = refused(cls)
    assert why in str(error)
    assert cls.__name__ in str(error)


def test_factories_that_make_something_else() -> None:
    elsewhere = torch.nn.Linear(3, 3)
    assert "makes no optimizer" in str(refused(lambda parameters: parameters))
    assert "one group" in str(refused(lambda parameters: torch.optim.AdamW(elsewhere.parameters())))
    assert "one group" in str(refused(lambda parameters: torch.optim.AdamW([{"params": [one]} for one in parameters] + [{"params": []}])))


def test_factories() -> None:
    def no_decay_on_vectors(parameters: list[torch.Tensor], lr: float = 0.1) -> Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0 if parameters[0].ndim < 2 else 0.1)

    def clipping(parameters: list[torch.Tensor]) -> Optimizer:
        optimizer = torch.optim.AdamW(parameters)
        optimizer.register_step_pre_hook(lambda *_: None)
        return optimizer

    assert rules_of(lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr), {"lr": 0.1}, torch.float32, CPU).elementwise
    assert rules_of(functools.partial(torch.optim.AdamW, amsgrad=True), {}, torch.float32, CPU).state_bytes_per_element == 12.0
    assert "couples" in str(refused(no_decay_on_vectors))  # it looks at the first of its parameters
    assert not rules_of(clipping, {}, torch.float32, CPU).elementwise

    def decay_by_shape(parameters: list[torch.Tensor]) -> Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        optimizer.step = lambda: [one.data.sub_(one.grad * (0.1 if one.ndim > 1 else 0.2)) for one in parameters if one.grad is not None]
        return optimizer

    assert not rules_of(decay_by_shape, {}, torch.float32, CPU).elementwise


# -- the probe ----------------------------------------------------------------------------------------------------------


def random_states(device: str) -> list[Any]:
    states: list[Any] = [bits(torch.get_rng_state()), random.getstate(), repr(np.random.get_state())]
    return [*states, bits(torch.cuda.get_rng_state())] if device == "cuda" else states


@pytest.mark.parametrize("cls", [torch.optim.AdamW, Noisy, torch.optim.LBFGS])
def test_random_numbers_stay_as_they_were(cls: type[Optimizer], device: str) -> None:
    before = random_states(device)
    try:
        probe(cls, {}, torch.float32, torch.device(device))
    except OptionError:
        assert cls is not torch.optim.AdamW
    assert random_states(device) == before


def test_what_was_seen_is_remembered() -> None:
    made = []

    class Counted(Momentum):
        def __init__(self, params: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(params, **options)

    def look(**options: Any) -> Probe:
        return probe(functools.partial(Counted), options, torch.float32, CPU)

    assert look(lr=1) is look(lr=1)
    first = len(made)
    assert look(lr=1.0) is not look(lr=1)
    assert len(made) == 2 * first
    assert look(lr=torch.tensor(0.1).item()) is not look(lr=1)
    tensor = torch.tensor(0.1)
    assert look(lr=tensor) is not look(lr=tensor)  # its value may have changed
    with_doubles = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert {entry.dtype for entry in rules_of(torch.optim.AdamW, {}, torch.float32, CPU).entries if entry.kind is Kind.SCALAR} == {
            torch.float64
        }
    finally:
        torch.set_default_dtype(with_doubles)
    assert {entry.dtype for entry in rules_of(torch.optim.AdamW, {}, torch.float32, CPU).entries} == {torch.float32}


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.device("meta")])
def test_the_probe_works_wherever_it_is_called(around: Callable[[], Any]) -> None:
    with around():
        found = rules_of(torch.optim.NAdam, {"momentum_decay": 0.123}, torch.float32, CPU)
    assert {entry.device_type for entry in found.entries} == {"cpu"}


# -- which implementation -----------------------------------------------------------------------------------------------


def taken(cls: type[Optimizer], options: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> dict[str, bool]:
    """What torch itself does with a set of parameters, by which of its functions it calls."""
    names = inspect.unwrap(cls.step).__globals__
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in list(names):
            if name.startswith(("_single_tensor_", "_multi_tensor_", "_fused_")):
                patch.setitem(names, name, functools.partial(lambda name, *_, **__: called.append(name), name))
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        make(cls, parameters, options).step()
    (name,) = called
    found = {"foreach": name.startswith("_multi")}
    return {**found, "fused": name.startswith("_fused")} if "fused" in inspect.signature(cls).parameters else found


ASKED = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}, {"lr": torch.tensor(0.1)}]
CHOICES = [
    pytest.param(cls, asked, id=f"{cls.__name__}-{asked}")
    for cls in CLASSES.values()
    for asked in ASKED
    if "foreach" in inspect.signature(cls).parameters and ("fused" not in asked or "fused" in inspect.signature(cls).parameters)
]


@pytest.fixture(params=[False, True], ids=["as it is", "as on a GPU"])
def has_kernels(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Torch asks a list which devices have the foreach kernels."""
    if request.param:
        monkeypatch.setattr(module.torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: [device])
    return bool(request.param) or device == "cuda"


@pytest.mark.parametrize(("cls", "asked"), CHOICES)
def test_the_implementation_is_the_one_torch_takes(cls: type[Optimizer], asked: dict[str, Any], has_kernels: bool, device: str) -> None:
    if is_broken(cls, asked, torch.float32, device):
        refused(cls, asked, torch.float32, device)
        return
    parameters = [torch.nn.Parameter(torch.ones(3, 4, device=device)), torch.ones(5, device=device, requires_grad=True)]
    expected = taken(cls, asked, parameters)
    found = resolved_implementation(cls, asked, parameters)
    assert found == expected
    if not asked:
        assert found["foreach"] == (has_kernels and cls is not torch.optim.Adafactor)
    # The same for parameters that are elsewhere now, and torch accepts it.
    elsewhere = [torch.nn.Parameter(torch.empty(3, 4, device="meta"))]
    assert resolved_implementation(cls, asked, elsewhere, device=torch.device(device)) == expected
    assert taken(cls, {**asked, **found}, parameters) == expected


@pytest.mark.parametrize("helper", [True, False], ids=["torch's helper", "without it"])
def test_one_parameter_of_another_type_decides_for_all(helper: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(torch.Tensor):
        pass

    monkeypatch.setattr(module.torch_optimizer, "_get_foreach_kernels_supported_devices", lambda: [device])
    monkeypatch.setattr(module, "FOREACH_DEVICES", frozenset({device}))
    if not helper:
        monkeypatch.delattr(module.torch_optimizer, "_default_to_fused_or_foreach")
    ordinary, special = torch.nn.Parameter(torch.ones(3, device=device)), torch.ones(3, device=device).as_subclass(Special)
    for where in (None, torch.device(device)):
        assert resolved_implementation(torch.optim.AdamW, {}, [ordinary], device=where) == {"foreach": True, "fused": False}
        assert resolved_implementation(torch.optim.AdamW, {}, [ordinary, special], device=where) == {"foreach": False, "fused": False}
    assert resolved_implementation(functools.partial(torch.optim.SGD, foreach=False), {}, [ordinary]) == {"foreach": False, "fused": False}
    assert resolved_implementation(torch.optim.AdamW, {}, []) == {}


def test_classes_without_the_choice() -> None:
    assert resolved_implementation(torch.optim.Muon, {}, [torch.ones(3, 4)]) == {}
