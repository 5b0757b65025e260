"""Optimizers of users, coupled ones, groups and schedules, state that goes to torch's and back, and what is refused, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.harness import same
from tests.training.models import batches, build
from tierstore import TierStore
from tierstore.errors import CapacityError, OptionError, TrainingError
from tierstore.testing.reference import resident_reference
from tierstore.training import Tiered, TieredOptimizer, attach

GPU = 44 << 10
"""Less than half of what the model `stack` has."""
RAM = 160 << 10
LAYERS = 8

# -- optimizers as users write them --------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures("one_thread")


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum; state of its own, made at the first step."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["average"] = torch.zeros_like(parameter)
                one, two = group["betas"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.sign(state["average"] * one + parameter.grad * (1 - one)), alpha=-group["lr"])
                state["average"].mul_(two).add_(parameter.grad, alpha=1 - two)


class Counting(torch.optim.Optimizer):
    """Keeps how often it stepped in the group, as some published ones do."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"] / group["count"])


class Replacing(torch.optim.Optimizer):
    """Puts new tensors in the place of its state, and a number beside them."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad
                state["times"] = state.get("times", 0) + 1
                parameter.sub_(group["lr"] / state["times"] * state["mean"])


class Anchored(torch.optim.Optimizer):
    """Makes its state, a copy of the parameter, when it is made."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["anchor"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * (parameter.grad + parameter - self.state[parameter]["anchor"]))


class Normalising(torch.optim.Optimizer):
    """Coupled: each step looks at the norm of the whole parameter. Writes into the gradients, too."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(parameter.grad.norm() + 1e-6)
                    parameter.add_(parameter.grad, alpha=-group["lr"])


class Wavering(torch.optim.Optimizer):
    """State that is None at first, then a tensor, then gone, and a tensor again."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["times"] = state.get("times", 0) + 1
                if state["times"] == 4:
                    del state["mean"]
                elif state["times"] in (1, 6):
                    state["mean"] = None
                elif state.get("mean") is None:
                    state["mean"] = parameter.grad.clone()
                else:
                    state["mean"].mul_(0.9).add_(parameter.grad)
                mean = state.get("mean")
                parameter.add_(parameter.grad if mean is None else mean, alpha=-group["lr"])


class Exchanging(torch.optim.Optimizer):
    """Two tensors of the state change places in each step."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["now"], state["before"] = parameter.grad.clone(), parameter.grad * 2
                state["now"], state["before"] = state["before"], state["now"]
                state["now"].mul_(0.7).add_(parameter.grad)
                parameter.add_(state["now"] + 0.1 * state["before"], alpha=-group["lr"])


class Remembering(torch.optim.Optimizer):
    """Keeps the gradient itself, where others would keep a copy."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    before = self.state[parameter].get("before", parameter.grad)
                    parameter.add_(parameter.grad + before, alpha=-group["lr"])
                    self.state[parameter]["before"] = parameter.grad


class Tallying(torch.optim.Optimizer):
    """Writes into the options of a group: into a tensor, into a list, and under a key that was not there."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr, "count": torch.zeros(()), "seen": []})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            group["seen"].append(len(group["seen"]))
            group["sum"] = group.get("sum", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * (group["lr"] / group["count"] / len(group["seen"]) / group["sum"]))


class Started(torch.optim.Optimizer):
    """Makes its state when it is made, by an option of the group."""

    def __init__(self, params: Any, lr: float = 1e-2, start: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "start": start})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["sum"] = torch.full_like(parameter, group["start"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    total = self.state[parameter]["sum"].addcmul_(parameter.grad, parameter.grad)
                    parameter.addcdiv_(parameter.grad, total.sqrt() + 1e-3, value=-group["lr"])


# -- training with several optimizers, streamed and resident ---------------------------------------------------------------

Names = Callable[[str, Tensor], bool]
Part = tuple[Any, dict[str, Any], Names | None]
Make = Callable[[torch.optim.Optimizer], Any]


@contextlib.contextmanager
def streamed(directory: Path, name: str = "stack", gpu: int = GPU, ram: int = RAM) -> Iterator[tuple[nn.Module, Tiered]]:
    model = build(name, LAYERS)
    with TierStore(gpu=gpu, ram=ram, nvme=directory, device="cpu") as store:
        tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
        yield model, tiered


def loop(model: nn.Module, optimizers: list[Any], schedules: list[Any], steps: int, name: str = "stack", seed: int = 1) -> list[float]:
    losses: list[float] = []
    for batch in batches(name, steps, 4, seed):
        loss = model(*batch)
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return losses


def groups(model: nn.Module, which: Names | None) -> list[str] | None:
    return None if which is None else [name for name, parameter in model.named_parameters() if which(name, parameter)]


def both(
    directory: Path, parts: list[Part], *, name: str = "stack", when: str = "deferred", schedule: Make | None = None, steps: int = 3
) -> None:
    """Train streamed and resident, and compare all that comes out."""
    plain = build(name, LAYERS)
    reference = resident_reference(plain, list(plain.layers))  # type: ignore[arg-type]
    theirs = []
    named = dict(plain.named_parameters())
    for factory, options, which in parts:
        names = groups(plain, which)
        theirs.append(reference.optimizer(factory, params=None if names is None else [named[each] for each in names], **options))
    wanted = loop(plain, theirs, [schedule(each.inner) for each in theirs] if schedule else [], steps, name)
    with streamed(directory, name) as (model, tiered):
        chosen = [groups(model, which) for _, _, which in parts]
        ours = [
            TieredOptimizer(tiered, factory, params=names, when=when, **options)  # type: ignore[arg-type]
            for (factory, options, _), names in zip(parts, chosen, strict=True)
        ]
        losses = loop(model, ours, [schedule(each) for each in ours] if schedule else [], steps, name)
        assert losses == wanted
        for mine, other in zip(ours, theirs, strict=True):
            compare_states(mine.state_dict(), other.inner.state_dict())
        assert tiered.store.stats().tiers["gpu"].evictions > 0
        tiered.detach()
    for weight, value in named.items():
        assert same(dict(model.named_parameters())[weight].detach(), value.detach()), weight


def compare_states(mine: dict[str, Any], other: dict[str, Any]) -> None:
    assert mine["param_groups"] == other["param_groups"]
    assert mine["state"].keys() == other["state"].keys()
    for number, state in other["state"].items():
        assert mine["state"][number].keys() == state.keys()
        for key, value in state.items():
            assert same(mine["state"][number][key], value), (number, key)


USERS: list[Part] = [
    (Lion, {"lr": 1e-3, "weight_decay": 0.1}, None),
    (Counting, {}, None),
    (Replacing, {}, None),
    (Anchored, {}, None),
    (Normalising, {}, None),
    (lambda params, **options: torch.optim.SGD(params, momentum=0.9, **options), {"lr": 0.05}, None),
]


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
@pytest.mark.parametrize("part", USERS, ids=["lion", "counting", "replacing", "anchored", "normalising", "function"])
def test_optimizers_of_users(part: Part, when: str, tmp_path: Path) -> None:
    both(tmp_path, [part], when=when)


@pytest.mark.parametrize("when", ["deferred", "backward"])
@pytest.mark.parametrize("factory", [Wavering, Exchanging, Tallying])
def test_state_and_options_that_change_what_they_are(factory: Any, when: str, tmp_path: Path) -> None:
    """State may come, go and change places, and options of a group may be written into, as in plain torch."""
    parts: list[Part] = [(factory, {}, lambda name, _: "layers.0" not in name), (factory, {"lr": 1e-3}, lambda name, _: "layers.0" in name)]
    both(tmp_path, parts, when=when, steps=7)


class Scaled(nn.Module):
    """With a parameter of one element, whose state is kept outside the store."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (x * self.scale).square().mean()


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
def test_a_gradient_kept_as_state_is_that_of_then(when: str) -> None:
    """Of one element too: as a view of the store's memory it was whatever came to lie there."""

    def run(model: nn.Module, optimizer: Any) -> None:
        for step in range(4):
            model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, plain = Scaled(), Scaled()
    run(plain, Remembering(plain.parameters()))
    with TierStore("32KiB", "1MiB", device="cpu") as store:
        tiered = attach(model, store, model.layers)
        run(model, TieredOptimizer(tiered, Remembering, when=when))  # type: ignore[arg-type]
        tiered.detach()
    assert all(same(one.detach(), other.detach()) for one, other in zip(model.parameters(), plain.parameters(), strict=True))


def matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2


def rest(name: str, parameter: Tensor) -> bool:
    return parameter.dim() != 2


@pytest.mark.parametrize(
    "parts",
    [
        [(torch.optim.Muon, {"lr": 0.02}, matrix), (torch.optim.AdamW, {"lr": 0.01}, rest)],
        [(torch.optim.Adafactor, {"lr": 0.02}, None)],
        [(torch.optim.SGD, {"lr": 0.1}, lambda name, _: "layers.0" in name), (Lion, {}, lambda name, _: "layers.0" not in name)],
    ],
    ids=["muon-adamw", "adafactor", "sgd-lion"],
)
def test_coupled_optimizers_and_several_on_one_model(parts: list[Part], tmp_path: Path) -> None:
    both(tmp_path, parts)


def test_experts_without_tokens(tmp_path: Path) -> None:
    """The state of an optimizer that makes it when it is made is there for those that were never updated, too."""
    both(tmp_path, [(torch.optim.Adagrad, {"lr": 0.05, "initial_accumulator_value": 0.1}, None)], name="experts")


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=6),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [2],
        ),
    ],
    ids=["one-cycle", "cosine", "sequential"],
)
def test_schedules_move_on_before_updates_are_carried_out(schedule: Make, when: str, tmp_path: Path) -> None:
    both(tmp_path, [(torch.optim.AdamW, {"lr": 0.01}, None)], when=when, schedule=schedule, steps=5)


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
@pytest.mark.parametrize("factory", [torch.optim.Adafactor, torch.optim.AdamW])
def test_an_update_is_not_carried_out_under_what_a_forward_pass_is_run_under(factory: Any, when: str, tmp_path: Path) -> None:
    """A deferred one comes in the middle of a forward pass: of training under autocast, or of an evaluation in inference mode."""

    def run(model: nn.Module, optimizer: Any) -> list[float]:
        losses = []
        for inputs, targets in batches("stack", 4, 4):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = model(inputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.inference_mode():
                losses += [loss.item(), model(inputs, targets).item()]
        return losses

    plain = build("stack", LAYERS)
    wanted = run(plain, factory(plain.parameters(), lr=0.02))
    with streamed(tmp_path) as (model, tiered):
        assert run(model, TieredOptimizer(tiered, factory, when=when, lr=0.02)) == wanted  # type: ignore[arg-type]
        tiered.detach()
    for name, value in plain.named_parameters():
        assert same(dict(model.named_parameters())[name].detach(), value.detach()), name


# -- groups --------------------------------------------------------------------------------------------------------------


def test_groups_by_names_patterns_and_parameters(tmp_path: Path) -> None:
    model = build("stack", LAYERS)
    before = dict(model.named_parameters())
    with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
        params = [
            {"params": ["into.weight", "layers.0.*"], "lr": 0.1},
            {"params": [before["out.weight"]], "lr": 0.2},
            {"params": [model.out.bias, *model.layers[1].named_parameters()], "momentum": 0.5},  # type: ignore[union-attr, index]
            {"params": "layers.[2-7].*"},
        ]
        optimizer = TieredOptimizer(tiered, torch.optim.SGD, params=params, lr=0.3)
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        layer = len(list(model.layers[0].parameters()))  # type: ignore[index]
        assert sizes == [1 + layer, 1, 1 + layer, 6 * layer]
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3, 0.3]
        assert optimizer.param_groups[2]["momentum"] == 0.5
        loop(model, [optimizer], [], 2)
        tiered.detach()
    plain = build("stack", LAYERS)
    named = dict(plain.named_parameters())
    layers = [[name for name in named if name.startswith(f"layers.{number}.")] for number in range(LAYERS)]
    members = [["into.weight", *layers[0]], ["out.weight"], ["out.bias", *layers[1]], [name for layer in layers[2:] for name in layer]]
    options: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": 0.2}, {"momentum": 0.5}, {}]
    torch_optimizer = torch.optim.SGD(
        [{"params": [named[name] for name in names], **more} for names, more in zip(members, options, strict=True)], lr=0.3
    )
    loop(plain, [torch_optimizer], [], 2)
    for name, value in plain.named_parameters():
        assert same(dict(model.named_parameters())[name].detach(), value.detach()), name


@pytest.mark.parametrize(
    ("factory", "options", "own"),
    [(Started, {}, {"start": 0.5}), (torch.optim.RMSprop, {}, {"momentum": 0.9, "centered": True})],
    ids=["state", "room"],
)
@pytest.mark.parametrize("when", ["deferred", "backward"])
def test_state_that_options_of_a_group_decide_on(factory: Any, options: Any, own: Any, when: str, tmp_path: Path) -> None:
    """What it begins as, and how much room it takes: an update found none in the middle of training."""
    plain = build("stack", LAYERS)
    names = [name for name, _ in plain.named_parameters()]
    members = [[name for name in names if "layers" in name], [name for name in names if "layers" not in name]]
    named = dict(plain.named_parameters())
    theirs = factory([{"params": [named[name] for name in members[0]], **own}, {"params": [named[name] for name in members[1]]}], **options)
    loop(plain, [theirs], [], 2)
    for gpu in range(5, 14):  # the least that is not refused
        model = build("stack", LAYERS)
        with TierStore(gpu=gpu * 4096, ram=RAM, nvme=tmp_path / str(gpu), device="cpu") as store:
            try:
                tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
                params = [{"params": members[0], **own}, {"params": members[1]}]
                optimizer = TieredOptimizer(tiered, factory, params=params, when=when, **options)  # type: ignore[arg-type]
            except CapacityError:
                assert gpu < 12, "this is enough"
                continue
            loop(model, [optimizer], [], 2)
            compare_states(optimizer.state_dict(), theirs.state_dict())
            tiered.detach()
            break
    assert all(same(dict(model.named_parameters())[name].detach(), value.detach()) for name, value in named.items())


# -- state from here to torch and back -------------------------------------------------------------------------------------

INTERCHANGE = [
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    (torch.optim.Adagrad, {"lr": 0.05}),
    (torch.optim.Adafactor, {"lr": 0.02}),
    (Replacing, {}),
    (Counting, {}),
]


@pytest.mark.parametrize(("factory", "options"), INTERCHANGE, ids=[factory.__name__ for factory, _ in INTERCHANGE])
@pytest.mark.parametrize("model", ["stack", "experts"])
def test_state_goes_from_resident_to_tiered_and_back(model: str, factory: Any, options: dict[str, Any], tmp_path: Path) -> None:
    plain = build(model, LAYERS)
    optimizer = factory(plain.parameters(), **options)
    wanted = [loop(plain, [optimizer], [], 2, model, seed) for seed in (1, 2, 3)]

    here = build(model, LAYERS)
    resident = factory(here.parameters(), **options)
    losses = [loop(here, [resident], [], 2, model, 1)]
    with TierStore(gpu=GPU, ram=RAM, nvme=tmp_path, device="cpu") as store:
        tiered = attach(here, store, list(here.layers))  # type: ignore[arg-type]
        mine = TieredOptimizer(tiered, factory, when="deferred", **options)
        mine.load_state_dict(resident.state_dict())
        compare_states(mine.state_dict(), resident.state_dict())
        losses.append(loop(here, [mine], [], 2, model, 2))
        state = mine.state_dict()
        tiered.detach()
    again = factory(here.parameters(), **options)
    again.load_state_dict(state)
    losses.append(loop(here, [again], [], 2, model, 3))
    assert losses == wanted
    for name, value in plain.named_parameters():
        assert same(dict(here.named_parameters())[name].detach(), value.detach()), name
    compare_states(again.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("factory", [torch.optim.NAdam, torch.optim.ASGD])
def test_loaded_state_has_the_dtypes_that_torch_gives_it(factory: Any, tmp_path: Path) -> None:
    """Also numbers: torch keeps those of a double parameter in single precision until they are loaded."""
    x, targets = next(batches("stack", 1, 4))
    batch = x.double(), targets

    def advance(model: nn.Module, optimizer: Any) -> None:
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    plain, model = build("stack", LAYERS).double(), build("stack", LAYERS).double()
    theirs = factory(plain.parameters())
    with TierStore("256KiB", "4MiB", tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
        mine = TieredOptimizer(tiered, factory, when="deferred")
        for here, optimizer in ((model, mine), (plain, theirs)):
            advance(here, optimizer)
            optimizer.load_state_dict(optimizer.state_dict())
            advance(here, optimizer)
        compare_states(mine.state_dict(), theirs.state_dict())
        tiered.detach()


def test_a_schedule_does_not_reach_into_what_was_loaded(tmp_path: Path) -> None:
    """It writes into a learning rate that is a tensor."""
    with streamed(tmp_path) as (_, tiered):
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=torch.tensor(0.25))
        loaded = torch.optim.AdamW([torch.zeros(3)], lr=torch.tensor(0.25)).state_dict()
        loaded["param_groups"][0]["params"] = list(range(len(optimizer.param_groups[0]["params"])))
        optimizer.load_state_dict(loaded)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.125
        assert loaded["param_groups"][0]["lr"] == 0.25


def test_state_of_other_groups_is_refused(tmp_path: Path) -> None:
    with streamed(tmp_path) as (_, tiered):
        optimizer = TieredOptimizer(tiered, torch.optim.SGD, lr=0.1)
        other = torch.optim.SGD([torch.zeros(3)], lr=0.1)
        with pytest.raises(TrainingError, match="other groups") as raised:
            optimizer.load_state_dict(other.state_dict())
        assert all([raised.value.need, raised.value.have, raised.value.remedy])


# -- what is refused -------------------------------------------------------------------------------------------------------


def refused(tiered: Tiered, factory: Any, error: type[Exception], text: str, **options: Any) -> Any:
    before = list(tiered.optimizers)
    with pytest.raises(error, match=text) as raised:
        TieredOptimizer(tiered, factory, **options)
    assert tiered.optimizers == before
    assert raised.value.remedy  # type: ignore[attr-defined]
    return raised.value


def test_classes_that_cannot_work_are_refused_by_name(tmp_path: Path) -> None:
    with streamed(tmp_path) as (_, tiered):
        for name in ("LBFGS", "SparseAdam"):
            error = refused(tiered, getattr(torch.optim, name), OptionError, name)
            assert all([error.need, error.have])
        refused(tiered, torch.optim.Muon, OptionError, "Muon does not take parameter 'into.bias'", lr=0.1)
        refused(tiered, torch.optim.AdamW, OptionError, "when= is not understood", when="later")
        refused(tiered, torch.optim.AdamW, OptionError, "where= is not understood", where="cpu")
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW)
        with pytest.raises(OptionError, match="no closure"):
            optimizer.step(lambda: 0.0)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="set_to_none"):
            optimizer.zero_grad(set_to_none=False)


def test_parameters_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with streamed(tmp_path, "twice") as (_, tiered):
        sgd = torch.optim.SGD
        refused(tiered, sgd, OptionError, "names nothing in the model", params=["layers.99.*"])
        refused(tiered, sgd, OptionError, "names nothing in the model", params=[nn.Parameter(torch.zeros(3))])
        refused(tiered, sgd, OptionError, "is frozen", params=["layers.4.up.weight"])
        refused(tiered, sgd, OptionError, "in two groups", params=[{"params": ["into.*"]}, {"params": ["into.bias"]}])
        refused(tiered, sgd, OptionError, "has no parameters", params=[{"params": []}])
        refused(tiered, sgd, OptionError, "mixes groups", params=["into.*", {"params": ["out.*"]}])
        TieredOptimizer(tiered, sgd, params=["into.*"], lr=0.1, name="mine")
        error = refused(tiered, sgd, TrainingError, "belongs to another optimizer", params=["into.weight"])
        assert "'into.weight'" in str(error)
        refused(tiered, sgd, OptionError, "two optimizers named 'mine'", params=["out.*"], name="mine")


def test_an_optimizer_that_comes_after_gradients_finds_them(tmp_path: Path) -> None:
    """They are cut anew, as it wants them."""
    with streamed(tmp_path) as (model, tiered):
        model(*next(batches("stack", 1, 4))).backward()
        names = [name for name, _ in model.named_parameters()]
        before = {name: tiered.gradient(name) for name in names}
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW)
        for name, gradient in before.items():
            assert gradient is not None
            after = tiered.gradient(name)
            assert after is not None
            assert torch.equal(after, gradient)
        values = {name: value.clone() for name, value in tiered.store.read("into").items()}  # type: ignore[union-attr]
        optimizer.step()
        changed = tiered.store.read("into")
        assert all(not torch.equal(changed[name], value) for name, value in values.items())  # type: ignore[index, call-overload]


def test_a_coupled_optimizer_on_a_parameter_too_large_for_the_device(tmp_path: Path) -> None:
    """What is elementwise takes it in ranges; what is not is refused when it is made, not in the middle of a step."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 128))
    with TierStore(gpu=56 << 10, ram=400 << 10, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model))
        error = refused(tiered, torch.optim.Adafactor, CapacityError, "Adafactor of '0.weight' does not fit the device")
        assert all([error.need, error.have])
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW)
        for _ in range(2):
            model(torch.randn(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        tiered.detach()


@pytest.mark.parametrize("gpu", range(5, 14))
@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop])
def test_what_is_not_refused_when_it_is_made_does(gpu: int, factory: Any, tmp_path: Path) -> None:
    """An update that did not find its room in one piece failed in the middle of training."""
    model = build("stack", LAYERS)
    with TierStore(gpu=gpu * 4096, ram=RAM, nvme=tmp_path, device="cpu") as store:
        try:
            tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
            optimizer = TieredOptimizer(tiered, factory)
        except CapacityError:
            assert gpu < 12, "this is enough"
            return
        assert gpu > 5, "this cannot be enough"
        loop(model, [optimizer], [], 2)
        tiered.detach()


def test_an_epsilon_that_the_first_parameters_dtype_decides(tmp_path: Path) -> None:
    """Adafactor's: of a group with two dtypes, parameters that are updated apart from the first would get another."""
    torch.manual_seed(0)
    model = build("stack")
    model.layers[1].to(torch.bfloat16)  # type: ignore[index]
    with TierStore("1MiB", "8MiB", tmp_path / "swap", device="cpu") as store:
        tiered = attach(model, store, model.layers)  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="epsilon") as caught:
            TieredOptimizer(tiered, torch.optim.Adafactor)
        assert "eps=" in str(caught.value.remedy)
        TieredOptimizer(tiered, torch.optim.Adafactor, eps=(1e-8, 1e-3))
