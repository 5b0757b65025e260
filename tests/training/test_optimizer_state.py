"""What optimizers may do beside changing parameters in place, and still come to the bits of one instance for all; steps that fail."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.harness import same
from tests.training.models import batches, build
from tests.training.pair import Pair, opened
from tests.training.test_optimizers import Counting, Started, both
from tierstore import TierStore
from tierstore.errors import OptionError, TrainingError
from tierstore.training import Tiered, TieredOptimizer, attach

LAYERS = 3


pytestmark = pytest.mark.usefixtures("one_thread")

Options = dict[str, Any]


class Separate(torch.optim.Optimizer):
    """Treats each parameter by `update`."""

    def __init__(self, params: Any, lr: float = 1e-2, **more: Any) -> None:
        super().__init__(params, {"lr": lr, **more})

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        raise NotImplementedError

    def with_gradient(self) -> Iterator[tuple[Options, Tensor]]:
        for group in self.param_groups:
            yield from ((group, parameter) for parameter in group["params"] if parameter.grad is not None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in self.with_gradient():
            state = self.state[parameter]
            self.update(group, parameter, state)
            if not state:
                del self.state[parameter]


# -- counts in groups and attributes -------------------------------------------------------------------------------------


class LateOption(Separate):
    """Puts a count into the group when it first steps, as timm's and others do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        for group, parameter in self.with_gradient():
            parameter.add_(parameter.grad, alpha=-group["lr"] / group["step"])


class TensorOption(Separate):
    """Counts in a tensor, in place."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr, count=torch.zeros(()))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
        for group, parameter in self.with_gradient():
            parameter.sub_(parameter.grad * (group["lr"] / group["count"]))


class ListOption(Separate):
    """Appends to a list of the group."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr, history=[])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["history"].append(group["lr"])
        for group, parameter in self.with_gradient():
            parameter.add_(parameter.grad, alpha=-group["lr"] / len(group["history"]))


class AttributeCount(Separate):
    """Counts its steps in an attribute of its own."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group, parameter in self.with_gradient():
            parameter.add_(parameter.grad, alpha=-group["lr"] / self.count)


COUNTING = [Counting, LateOption, TensorOption, ListOption, AttributeCount]


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
@pytest.mark.parametrize("factory", COUNTING)
def test_what_an_optimizer_counts_is_counted_once_in_a_step(factory: Any, when: str, tmp_path: Path) -> None:
    """However many chunks there are, and also for those without a gradient."""
    both(tmp_path, [(factory, {}, None)], name="experts", when=when, steps=4)


@pytest.mark.parametrize("when", ["step", "deferred"])
@pytest.mark.parametrize("factory", COUNTING)
def test_steps_without_any_gradient_are_counted_too(factory: Any, when: str) -> None:
    with opened() as store:
        pair = Pair(store, when=when, factory=factory)
        for _ in range(2):
            pair.step()
            pair.advance()
        pair.assert_same()
        assert pair.optimizer.param_groups[0].get("count") == pair.other.param_groups[0].get("count")


def run(model: nn.Module, optimizer: Any, steps: list[tuple[Tensor, Tensor]], schedule: Any = None) -> None:
    for batch in steps:
        model(*batch).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def stacked() -> nn.Module:
    return build("stack", LAYERS)


def attached(
    store: TierStore, factory: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Tiered, TieredOptimizer]:
    model = stacked().to(dtype)
    tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
    return model, tiered, TieredOptimizer(tiered, factory, **options)


def assert_equal(tiered: Tiered, plain: nn.Module) -> None:
    mine = dict(tiered.detach().named_parameters())
    for name, parameter in plain.named_parameters():
        assert same(mine[name].detach(), parameter.detach()), name


@pytest.mark.parametrize("when", ["step", "deferred"])
@pytest.mark.parametrize("factory", COUNTING)
def test_what_an_optimizer_counts_goes_on_from_a_commit(factory: Any, when: str, tmp_path: Path) -> None:
    steps = list(batches("stack", 4, 4))
    plain = stacked()
    run(plain, factory(plain.parameters()), steps)
    for last, part in enumerate((steps[:2], steps[2:])):
        with opened(tmp_path) as store:
            model, tiered, optimizer = attached(store, factory, when=when)
            tiered.resume()
            run(model, optimizer, part)
            store.commit()
            if last:
                assert_equal(tiered, plain)


class CountingAsMade(Separate):
    """Has an option that is no default, but put into the group when it is made."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["made"] = [0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["made"][0] += 1
        for group, parameter in self.with_gradient():
            parameter.add_(parameter.grad, alpha=-group["lr"] / group["made"][0])


class Late(Separate):
    """Changes nothing of a group or of itself for so long that nobody looks any more."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        state["times"] = state.get("times", 0) + 1
        parameter.add_(parameter.grad, alpha=-group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            if any(state.get("times") == 4 for state in self.state.values()):
                group["lr"] *= 0.1
                self.late = True


class MadeAtCountZero(Separate):
    """Makes state in the first step only, as its count tells."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr, count=0)
        self.calls: dict[str, int] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls["all"] = self.calls.get("all", 0) + 1
        for group, parameter in self.with_gradient():
            if group["count"] == 0:
                self.state[parameter]["mean"] = torch.zeros_like(parameter)
            mean = self.state[parameter]["mean"].mul_(0.9).add_(parameter.grad)
            parameter.add_(mean, alpha=-group["lr"] / self.calls["all"])
        for group in self.param_groups:
            group["count"] += 1


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
@pytest.mark.parametrize("factory", [CountingAsMade, Late, MadeAtCountZero])
def test_what_is_changed_is_found_whenever_and_wherever_it_is(factory: Any, when: str, tmp_path: Path) -> None:
    both(tmp_path, [(factory, {}, None)], when=when, steps=6)


@pytest.mark.parametrize("load", [False, True])
def test_state_made_in_the_first_step_only(load: bool, tmp_path: Path) -> None:
    """Going on from a commit, or from state that is loaded, there is no first step any more."""
    steps = list(batches("stack", 4, 4))
    plain = stacked()
    resident = MadeAtCountZero(plain.parameters())
    run(plain, resident, steps[:2])
    with opened(tmp_path / "first") as store:
        model, tiered, optimizer = attached(store, MadeAtCountZero, when="deferred")
        run(model, optimizer, steps[:2])
        state = optimizer.state_dict()
        weights = {name: value.clone() for name, value in plain.state_dict().items()}
        store.commit()
    if load:  # as in plain torch, attributes begin anew
        resident = MadeAtCountZero(plain.parameters())
        resident.load_state_dict(copy.deepcopy(state))
    with opened(tmp_path / ("other" if load else "first")) as store:
        model = stacked()
        model.load_state_dict(weights)
        tiered = attach(model, store, list(model.layers))  # type: ignore[arg-type]
        optimizer = TieredOptimizer(tiered, MadeAtCountZero, when="deferred")
        if load:
            optimizer.load_state_dict(state)
        else:
            tiered.resume()
        run(plain, resident, steps[2:])
        run(model, optimizer, steps[2:])
        assert optimizer.attributes["calls"] == resident.calls
        assert optimizer.param_groups[0]["count"] == resident.param_groups[0]["count"] == 4
        assert_equal(tiered, plain)


class Tabulating(torch.optim.SGD):
    """Remembers which parameters it has seen."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.seen: dict[Tensor, int] = {}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self.seen[parameter] = self.seen.get(parameter, 0) + 1
        super().step()


def test_attributes_that_mean_nothing_to_another_instance_are_told(store: TierStore, caplog: pytest.LogCaptureFixture) -> None:
    model, _, optimizer = attached(store, Tabulating, lr=0.1)
    run(model, optimizer, list(batches("stack", 2, 4)))
    told = [record.getMessage() for record in caplog.records if "attributes of its own" in record.getMessage()]
    assert len(told) == 1
    assert "Tabulating changes attributes of its own in step() that are no plain data (seen)" in told[0]


class Halving(Separate):
    """Halves its own rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in self.with_gradient():
            parameter.add_(parameter.grad, alpha=-group["lr"])
        for group in self.param_groups:
            group["lr"] *= 0.5


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
def test_schedules_go_on_from_what_a_step_has_changed(when: str) -> None:
    """`ExponentialLR` multiplies the rate that it finds, before a put-off update is carried out."""
    steps = list(batches("stack", 3, 4))
    plain = stacked()
    resident = Halving(plain.parameters())
    run(plain, resident, steps, torch.optim.lr_scheduler.ExponentialLR(resident, 0.9))
    with opened() as store:
        model, tiered, optimizer = attached(store, Halving, when=when)
        run(model, optimizer, steps, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
        assert optimizer.param_groups[0]["lr"] == resident.param_groups[0]["lr"]
        assert_equal(tiered, plain)


# -- what an optimizer does with tensors ---------------------------------------------------------------------------------


class Swapping(Separate):
    """Two buffers that change places."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        if not state:
            state["one"], state["other"] = torch.zeros_like(parameter), torch.ones_like(parameter)
        state["one"], state["other"] = state["other"], state["one"]
        state["one"].mul_(0.9).add_(parameter.grad)
        parameter.sub_(group["lr"] * (state["one"] + 0.1 * state["other"]))


class TakingAway(Separate):
    """Has state in every other step only."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        if "late" in state:
            parameter.sub_(group["lr"] * state.pop("late") * state.pop("times"))
        else:
            state["late"], state["times"] = parameter.grad * 2, 3
            parameter.sub_(group["lr"] * parameter.grad)


class Lengthening(Separate):
    """Remembers a norm of each step."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        assert parameter.grad is not None
        norms = [parameter.grad.norm().view(1)]
        state["norms"] = torch.cat([state["norms"], *norms] if "norms" in state else norms)
        parameter.sub_(group["lr"] * parameter.grad / (1 + state["norms"].sum()))


class KeepingAView(Separate):
    """Keeps an element of the gradient, without a copy."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        assert parameter.grad is not None
        before = state.get("first")
        state["first"] = parameter.grad.view(-1)[0]
        parameter.sub_(group["lr"] * (parameter.grad if before is None else parameter.grad + before))


class SettingData(Separate):
    """Gives the parameter and a state tensor other memory by `.data`."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        if not state:
            state["mean"] = torch.zeros_like(parameter)
        state["mean"].data = 0.9 * state["mean"] + parameter.grad
        parameter.data = parameter - group["lr"] * state["mean"]


class RequiringGradients(Separate):
    """Passes by what is no parameter, or does not require a gradient."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
            parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.parametrize("factory", [Swapping, TakingAway, Lengthening, KeepingAView, SettingData, RequiringGradients])
def test_what_an_optimizer_does_with_its_tensors_is_kept(factory: Any, tmp_path: Path) -> None:
    both(tmp_path, [(factory, {}, None)], steps=5)


@pytest.mark.parametrize("factory", [SettingData, RequiringGradients])
def test_masters_are_parameters_too(factory: Any, store: TierStore) -> None:
    pair = Pair(store, factory=factory, master=True)
    pair.advance(3)
    pair.assert_same()


class Scaled(nn.Module):
    """Has parameters of one element, which no block of state is made for, and of none."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.scale = nn.Parameter(torch.ones(1))
            self.shift = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) * self.scale + self.shift

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Scaled.Layer() for _ in range(LAYERS)])

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return nn.functional.mse_loss(x.float().mean(-1, keepdim=True).expand_as(targets), targets)


class KeepingGradients(Separate):
    """Keeps the gradient itself, without a copy."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        before = state.get("gradient")
        state["gradient"] = parameter.grad
        parameter.sub_(group["lr"] * (parameter.grad if before is None else parameter.grad + 0.5 * before))


@pytest.mark.parametrize("factory", [KeepingGradients, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("master", [False, True])
def test_parameters_of_one_element(factory: Any, master: bool, store: TierStore) -> None:
    pair = Pair(store, Scaled, factory=factory, master=master)
    pair.advance(4)
    pair.assert_same()


class Decaying(Separate):
    """Decays parameters that have no gradient, too."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.99)
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad)


class Ageing(Separate):
    """Counts for each parameter the steps since its last gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["age"] = state.get("age", 0) + 1
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] / state["age"] * parameter.grad)
                    state["age"] = 0


@pytest.mark.parametrize("factory", [Decaying, Ageing])
def test_what_changes_parameters_without_gradients_is_refused(factory: Any, store: TierStore) -> None:
    """Nothing is fetched of layers that had no part in a backward pass."""
    with pytest.raises(OptionError, match=f"{factory.__name__} changes parameters that have no gradient"):
        attached(store, factory)


# -- steps that fail -----------------------------------------------------------------------------------------------------


def failing(original: Callable[..., Any], call: int, wanted: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """A function that fails in one of its calls."""
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += wanted(*args)
        if count == call and wanted(*args):
            raise torch.OutOfMemoryError("no memory, for once")
        return original(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("call", ["declare", "lease"])
@pytest.mark.parametrize("master", [False, True])
def test_state_for_which_there_was_no_room_is_not_lost(call: str, master: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put off, no update is lost by it: the weights are updated already, and their new state waits beside the store."""
    with opened(tmp_path) as store:
        pair = Pair(store, master=master)
        pair.backward()
        pair.step()
        with monkeypatch.context() as patch:
            original = getattr(pair.tiered.buffers, call)
            patch.setattr(pair.tiered.buffers, call, failing(original, 2, lambda *names: names[0].startswith("optimizer/")))
            with pytest.raises(torch.OutOfMemoryError):
                pair.tiered.finish()
        pair.zero_grad()
        pair.advance()
        store.commit()
        pair.assert_same()
        pair.assert_usable()


@pytest.mark.parametrize("factory", [Started, torch.optim.AdamW])
@pytest.mark.parametrize("master", [False, True])
def test_a_step_that_failed_before_it_began_has_made_nothing(
    factory: Any, master: bool, store: TierStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some classes make state when they are made: that is not lost with a gradient for which there was no memory."""
    pair = Pair(store, factory=factory, master=master)
    pair.backward()
    pair.step()
    with monkeypatch.context() as patch:
        patch.setattr(pair.optimizer, "_prepared", failing(pair.optimizer._prepared, 3))
        with pytest.raises(torch.OutOfMemoryError):
            pair.tiered.finish()
    pair.zero_grad()
    pair.assert_usable()


class Stumbling(Separate):
    """Falls over a parameter, once."""

    falls = False

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        if Stumbling.falls and parameter.shape == (4,):
            Stumbling.falls = False
            raise ValueError("fell")
        state["times"] = state.get("times", 0) + 1
        state["mean"] = state.get("mean", torch.zeros_like(parameter)) * 0.9 + parameter.grad
        parameter.sub_(group["lr"] / state["times"] * state["mean"])


def test_what_a_step_has_done_before_it_fell_is_as_in_torch(store: TierStore) -> None:
    """Of its parameters, those before it are updated and have state; a second call of `step()` does all of it."""
    pair = Pair(store, when="step", factory=Stumbling)
    pair.backward()
    for _, optimizer in pair.both:
        Stumbling.falls = True
        with pytest.raises(ValueError, match="fell"):
            optimizer.step()
    # The blocks before that of the head are updated in both, and so is the head's weight, beside the bias that it fell over.
    pair.step()
    pair.zero_grad()
    pair.assert_usable()


def test_an_optimizer_made_while_another_has_put_off_updates(store: TierStore) -> None:
    """It cuts the gradients of their common blocks anew."""
    plain, (batch,) = stacked(), batches("stack", 1, 4)
    named = dict(plain.named_parameters())
    first = torch.optim.SGD([value for name, value in named.items() if "up" not in name], lr=0.1)
    run(plain, first, [batch])
    torch.optim.AdamW([value for name, value in named.items() if "up" in name]).step()
    names = [name for name in named if "up" not in name]
    model, tiered, optimizer = attached(store, torch.optim.SGD, params=names, when="deferred", lr=0.1)
    run(model, optimizer, [batch])
    TieredOptimizer(tiered, torch.optim.AdamW, params=["*up*"]).step()
    assert_equal(tiered, plain)


# -- state that is loaded ------------------------------------------------------------------------------------------------


class Integers(Separate):
    """Counts in whole numbers: for each parameter, and for each of its elements."""

    def update(self, group: Options, parameter: Tensor, state: Options) -> None:
        assert parameter.grad is not None
        if not state:
            state["all"], state["each"] = torch.zeros((), dtype=torch.int64), torch.zeros_like(parameter, dtype=torch.int64)
            state["step"] = torch.zeros(())
        state["all"] += 1
        state["step"] += 1
        state["each"] += (parameter.grad > 0).to(state["each"].dtype)
        parameter.sub_(group["lr"] * parameter.grad / (state["all"] + state["step"] + state["each"]).to(parameter.dtype))


@pytest.mark.parametrize("factory", [torch.optim.NAdam, torch.optim.ASGD, torch.optim.AdamW, Integers])
def test_state_is_loaded_as_torch_loads_it(factory: Any, store: TierStore) -> None:
    """Torch gives all but steps the dtype of the parameters, scalars too."""
    steps = [(inputs.bfloat16(), targets) for inputs, targets in batches("stack", 4, 4)]
    before, plain = stacked().bfloat16(), stacked().bfloat16()
    first, resident = factory(before.parameters(), lr=0.01), factory(plain.parameters(), lr=0.01)
    run(before, first, steps[:2])
    model, tiered, optimizer = attached(store, factory, torch.bfloat16, lr=0.01)
    for other in (resident, optimizer):
        other.load_state_dict(copy.deepcopy(first.state_dict()))
    dtypes = [{key: value.dtype for key, value in state.items()} for state in resident.state_dict()["state"].values()]
    assert [{key: value.dtype for key, value in state.items()} for state in optimizer.state_dict()["state"].values()] == dtypes
    run(plain, resident, steps[2:])
    run(model, optimizer, steps[2:])
    assert_equal(tiered, plain)


def test_masters_stay_where_the_state_that_is_loaded_has_none(store: TierStore) -> None:
    """Torch's has none: masters are its parameters, and what they have more than the weights is not lost."""
    pair = Pair(store, Scaled, master=True)
    pair.advance(2)
    state = copy.deepcopy(pair.other.inner.state_dict())
    pair.other.inner.load_state_dict(state)
    pair.optimizer.load_state_dict(state)
    pair.assert_same()
    pair.advance(2)
    pair.assert_same()


def test_state_of_other_shapes_is_refused_before_anything_is_changed(store: TierStore) -> None:
    pair = Pair(store)
    pair.advance()
    state = pair.optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    state["state"][2]["exp_avg"] = torch.zeros(7)
    with pytest.raises(TrainingError, match=r"'exp_avg' of parameter .* another shape") as error:
        pair.optimizer.load_state_dict(state)
    assert error.value.have == "(7,)"
    assert pair.optimizer.param_groups[0]["lr"] == 1e-2
    pair.assert_usable()


def test_options_that_are_loaded_are_copies(store: TierStore) -> None:
    """A schedule fills the rate in place, and not that of who keeps the state."""
    _, _, optimizer = attached(store, torch.optim.AdamW, lr=torch.tensor(0.25))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert state["param_groups"][0]["lr"] == 0.25


# -- weights that somebody else writes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["step", "deferred", "backward"])
def test_masters_follow_weights_that_are_written(when: str, store: TierStore) -> None:
    """`store.write()` is how values are set while a model is attached: the next step narrowed the old masters over them.

    The masters of what was not written keep the bits that the weights have not.
    """
    pair = Pair(store, master=True, when=when, options={"lr": 1e-2, "weight_decay": 0.0})
    pair.advance(2)
    pair.tiered.finish()

    def masters() -> dict[str, Tensor]:
        return {weight.name: pair.optimizer.state_of(weight.name)["master"] for weight in pair.tiered.structure.weights}

    before = masters()
    value = before["into.bias"].to(pair.dtype)
    value[::2] = 0.25
    store.write("into", {"into.bias": value})
    for group in pair.optimizer.param_groups:
        group["lr"] = 0.0
    pair.model(*pair.batch()).backward()
    pair.optimizer.step()
    pair.optimizer.zero_grad()
    after = masters()
    expected = before["into.bias"].clone()
    expected[::2] = 0.25
    assert any(not torch.equal(master, master.to(pair.dtype).float()) for master in before.values()), "no master has more bits"
    assert torch.equal(after.pop("into.bias"), expected)
    assert all(torch.equal(master, before[name]) for name, master in after.items())
    assert torch.equal(pair.weights()["into.bias"], value)
    assert all(chunk.version == pair.tiered.version_of(chunk.block) for chunk in pair.optimizer.chunks)
