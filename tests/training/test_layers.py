"""What a layer may be given, return, keep and draw: trained as plain torch trains it, or refused in words; never trained wrongly."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.training.models import WIDTH, Mlp
from tests.training.pair import Pair, assert_clean, opened
from tierstore import TierStore
from tierstore.errors import TrainingError
from tierstore.training import TieredOptimizer, attach
from tierstore.training import activations as kept_inputs
from tierstore.training.probe import same
from tierstore.training.surroundings import NumpyState

Layer = Callable[[], nn.Module]
Step = Callable[[Any, nn.Module, Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


class Chain(nn.Module):
    """Three layers between two linear ones, and how the model takes a step from one to the next."""

    def __init__(self, layer: Layer, step: Step | None = None, end: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([layer() for _ in range(3)])
        self.side = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 4)
        self.take = step or (lambda model, layer, x: layer(x))
        self.end = end or (lambda model, loss: loss)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = self.take(self, layer, x)
        loss: Tensor = self.end(self, F.mse_loss(self.out(x).float(), targets))
        return loss


def small() -> nn.Module:
    return Mlp(WIDTH)


def assert_trains_as_plain_torch(store: TierStore, make: Callable[[], nn.Module], steps: int = 2, **options: Any) -> Pair:
    pair = Pair(store, make, **options)
    for _ in range(steps):
        state = random.getstate(), np.random.get_state()
        random.seed(1), np.random.seed(1)
        inputs, targets = pair.batch()
        for model, _ in pair.both:
            random.seed(3), np.random.seed(3), torch.manual_seed(3)
            model(inputs, targets).backward()
        random.setstate(state[0])
        np.random.set_state(state[1])
        pair.assert_same_gradients()
        pair.step()
        pair.zero_grad()
    pair.assert_same()
    assert_clean(pair)
    return pair


# -- one tensor in several places ----------------------------------------------------------------------------------------


class SelfAttention(nn.MultiheadAttention):
    """Computes in one product what queries, keys and values come from, if all three are the same object."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 4, batch_first=True)


def _attend(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    rows = x.unflatten(0, (-1, 2))
    return x + layer(rows, rows, value=rows, need_weights=False)[0].flatten(0, 1)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_tensor_given_to_a_layer_three_times(micro_batch: int | None, store: TierStore) -> None:
    """It is one object within the layer too, unless micro-batches are split off for each argument; gradients are added last use first."""
    assert_trains_as_plain_torch(store, lambda: Chain(SelfAttention, _attend), micro_batch=micro_batch)


def test_a_tensor_given_three_times_to_a_module_beside_the_layers(store: TierStore) -> None:
    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(small)
            self.attention = SelfAttention()

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            rows = self.into(x).unflatten(0, (-1, 2))
            x = self.attention(rows, rows, rows, need_weights=False)[0].flatten(0, 1)
            for layer in self.layers:
                x = layer(x)
            return F.mse_loss(self.out(x), targets)

    assert_trains_as_plain_torch(store, Model)


class Shifted(nn.Module):
    """Whose first operation saves nothing of its input, so that plain torch lets it be changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(torch.tanh(x + self.shift))
        return result


def _add_in_place(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    x += y
    return x


def test_an_input_that_is_changed_in_place_behind_its_layer(store: TierStore, monkeypatch: Any) -> None:
    """With inputs in the store nothing is lost, and the next layer's gradient takes the way through the change."""
    monkeypatch.setattr("tierstore.training.activations.SMALL", 0)
    assert_trains_as_plain_torch(store, lambda: Chain(Shifted, _add_in_place), activations="ram")


def test_graphs_of_modules_called_by_themselves_are_freed(store: TierStore) -> None:
    pair = Pair(store, lambda: Chain(small))
    for _ in range(3):
        x = pair.model.into(pair.batch()[0])  # type: ignore[operator]
        for layer in pair.model.layers:  # type: ignore[union-attr]
            x = layer(x)
    del x
    gc.collect()
    assert not pair.tiered._copies
    assert not any(pair.tiered._awaited.values())


# -- ways in and out that a gradient would not find ------------------------------------------------------------------------


@dataclass
class Opaque:
    """Of a class that pytree does not know."""

    x: Tensor


class Conditioned(Mlp):
    condition: Tensor

    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.condition


def _condition(model: Any, layer: nn.Module, x: Tensor) -> Tensor:
    layer.condition = model.side(x).mean(0)  # type: ignore[assignment]
    result: Tensor = layer(x)
    return result


class TakesOpaque(Mlp):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Any) -> Tensor:
        return super().forward(x.x)


class TakesModule(Mlp):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor, side: Any) -> Tensor:  # type: ignore[override]
        return super().forward(side(x))


class TakesLeaf(Mlp):
    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.scale = [torch.ones(WIDTH, requires_grad=True)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale[0]


WAYS_IN: dict[str, tuple[Layer, Step | None]] = {
    "attribute": (Conditioned, _condition),
    "object": (TakesOpaque, lambda model, layer, x: layer(Opaque(x))),
    "module": (TakesModule, lambda model, layer, x: layer(x, model.side)),
    "leaf": (TakesLeaf, None),
}


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS_IN)
def test_a_tensor_that_needs_a_gradient_and_is_no_argument_is_refused(
    way: str, frozen: bool, micro_batch: int | None, store: TierStore
) -> None:
    """It would get no gradient, and all that it was computed from would stay as it is."""
    layer, step = WAYS_IN[way]
    model = Chain(layer, step)
    model.layers.requires_grad_(not frozen)
    attach(model, store, model.layers, micro_batch=micro_batch if way != "object" else None)
    with pytest.raises(TrainingError, match="neither an argument nor a parameter of its own"):
        model(torch.randn(4, 8), torch.randn(4, 4))
    with torch.no_grad():
        model(torch.randn(4, 8), torch.randn(4, 4))


class Auxiliary(Mlp):
    """Leaves a loss in an attribute, as mixtures of experts do."""

    def __init__(self, kind: str) -> None:
        super().__init__(WIDTH)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.auxiliary = {"saves": y.pow(2).mean(), "parameter": self.up.bias.sum(), "input": x.sum()}[self.kind]
        return y


@pytest.mark.parametrize("kind", ["saves", "parameter", "input"])
def test_a_loss_left_in_an_attribute_is_refused(kind: str, store: TierStore) -> None:
    """Also where autograd saved nothing on the way to it, so that it could be followed."""

    def end(model: Any, loss: Tensor) -> Tensor:
        return loss + sum(layer.auxiliary for layer in model.layers)

    pair = Pair(store, lambda: Chain(lambda: Auxiliary(kind), end=end))
    with pytest.raises(TrainingError, match="whose graph is not kept") as caught:
        pair.model(*pair.batch()).backward()
    assert "return it" in str(caught.value)
    del caught
    for layer in pair.model.layers:  # type: ignore[union-attr]
        del layer.auxiliary
    torch.ones(1, requires_grad=True).sum().backward()  # until the next one, autograd's queue has what the one that failed has not reached
    gc.collect()
    pair.optimizer.zero_grad()
    assert_clean(pair)


class ReturnsOpaque(Mlp):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return Opaque(super().forward(x))


def test_an_output_of_a_class_that_nobody_knows_is_refused(store: TierStore) -> None:
    model = Chain(ReturnsOpaque, lambda model, layer, x: layer(x).x)
    attach(model, store, model.layers)
    with pytest.raises(TrainingError, match="whose graph is not kept"):
        model(torch.randn(4, 8), torch.randn(4, 4)).backward()


class Collects(Mlp):
    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor, losses: list[Tensor]) -> Tensor:  # type: ignore[override]
        y = super().forward(x)
        losses.append(y.pow(2).mean())
        return y


def test_a_list_that_a_layer_appends_to(store: TierStore) -> None:
    """In training it is refused; in evaluation it is the caller's list that is filled."""
    losses: list[Tensor] = []
    model = Chain(Collects, lambda model, layer, x: layer(x, losses))
    attach(model, store, model.layers)
    with pytest.raises(TrainingError, match="changes a list or dict that it was given"):
        model(torch.randn(4, 8), torch.randn(4, 4))
    losses.clear()
    with torch.no_grad():
        model(torch.randn(4, 8), torch.randn(4, 4))
    assert len(losses) == 3


@pytest.mark.parametrize("order", ["as they come", (0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("activations", ["device", "ram"])
def test_heads_that_take_their_backward_passes_one_by_one(order: Any, activations: str, store: TierStore, monkeypatch: Any) -> None:
    """Whoever has several heads on one trunk saves memory so: each has a pass of its own, down to where the trunk was cut off."""
    monkeypatch.setattr(kept_inputs, "SMALL", 0)
    pair = Pair(store, lambda: Chain(small), activations=activations)
    for _ in range(2):
        x = torch.randn(4, 8)
        for model, _ in pair.both:
            trunk = model.into(x)  # type: ignore[operator]
            cut = trunk.detach().requires_grad_()
            losses = []
            for head in model.layers:  # type: ignore[union-attr]
                losses.append(head(cut).square().mean())
                if order == "as they come":
                    losses.pop().backward()
            for number in range(len(losses)):
                losses[order[number]].backward()
            trunk.backward(cut.grad)
        pair.assert_same_gradients()
        pair.step()
        pair.zero_grad()
    del trunk, cut, losses
    gc.collect()
    pair.assert_same()
    assert_clean(pair)


def test_a_tensor_that_is_used_again_and_again_does_not_trail_its_past(store: TierStore) -> None:
    pair = Pair(store, lambda: Chain(small))
    x = torch.randn(4, WIDTH, requires_grad=True)
    calls = []
    for _ in range(3):
        result = pair.model.layers[0](x)  # type: ignore[index, operator]
        calls.append(weakref.ref(result.grad_fn.call))
        result.sum().backward()
    gc.collect()
    assert [call() is None for call in calls] == [True, True, False]


# -- the same numbers twice ------------------------------------------------------------------------------------------------


class Skips(Mlp):
    """Stochastic depth, decided by generators that are not torch's."""

    def __init__(self) -> None:
        super().__init__(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.4 else super().forward(x) * float(np.random.rand())


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_what_is_drawn_from_python_and_numpy_is_drawn_again(micro_batch: int | None, store: TierStore) -> None:
    if micro_batch is None:
        assert_trains_as_plain_torch(store, lambda: Chain(Skips), steps=4)
        return
    pair = Pair(store, lambda: Chain(Skips), micro_batch=micro_batch)
    random.seed(0), np.random.seed(0)
    loss = pair.model(*pair.batch())
    after = random.getstate(), np.random.get_state()[2]
    loss.backward()
    assert (random.getstate(), np.random.get_state()[2]) == after


def dropping() -> nn.Module:
    return Mlp(WIDTH, dropout=0.5)


class SkipsLater(Mlp):
    """Draws from the third step on: after a warm-up, say. Of two normal numbers, NumPy computes the second together with the first."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 2:
            return super().forward(x)
        kept = random.random() if self.draws_from is random else float(np.random.randn())
        return x + kept * super().forward(x)

    draws_from: Any = random


class SkipsLaterByNumpy(SkipsLater):
    draws_from = np.random


@pytest.mark.parametrize("layer", [SkipsLater, SkipsLaterByNumpy])
def test_what_is_drawn_for_the_first_time_in_a_later_step_is_drawn_again(layer: Layer, store: TierStore) -> None:
    assert_trains_as_plain_torch(store, lambda: Chain(layer), steps=4)


def test_whether_numpy_has_drawn_is_told_without_asking_it() -> None:
    draws: list[Callable[[], object]] = [
        np.random.rand,
        lambda: np.random.rand(1000),
        lambda: np.random.randint(2),
        np.random.randn,  # two are computed
        np.random.randn,  # and this is the second
        lambda: np.random.seed(5),
        lambda: np.random.shuffle([1, 2]),
    ]
    np.random.seed(4)
    for draw in draws:
        before = NumpyState.now()
        assert before.is_now()
        assert same(before.state, np.random.get_state(legacy=False))
        draw()
        assert not before.is_now()
        before.set()
        assert before.is_now()
        draw()
    original = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        np.random.set_bit_generator(np.random.PCG64(3))  # type: ignore[attr-defined]
        before = NumpyState.now()
        assert before.is_now()
        np.random.rand()
        assert not before.is_now()
    finally:
        np.random.set_bit_generator(original)  # type: ignore[attr-defined]


@pytest.mark.parametrize("train", [True, False])
def test_a_mode_that_is_switched_before_the_backward_pass(train: bool, store: TierStore) -> None:
    """Plain torch asks for it in the forward pass alone."""
    pair = Pair(store, lambda: Chain(dropping))
    for model, _ in pair.both:
        model.train(train)
    for model, loss in zip((pair.model, pair.plain), pair.losses(), strict=True):
        model.train(not train)
        loss.backward()
        assert all(module.training is not train for module in model.modules())
    pair.assert_same_gradients()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each.view(1, -1, 4, WIDTH // 4).transpose(1, 2) for each in self.into(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_takes_the_same_kernels_twice(kernel: SDPBackend, store: TierStore) -> None:
    pair = Pair(store, lambda: Chain(Attends))
    batch = torch.randn(40, 8), torch.randn(40, 4)
    with sdpa_kernel(kernel):
        losses = pair.losses(batch)
    for loss in losses:
        loss.backward()
    pair.assert_same_gradients()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


class Smoothed(Mlp):
    """With a buffer that is None until it has seen something, and that the result depends on."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        now = y.detach().mean()
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        return y * (1 + self.mean)


def test_a_buffer_that_is_none_at_first(store: TierStore) -> None:
    assert_trains_as_plain_torch(store, lambda: Chain(Smoothed), steps=3)


class Masked(nn.Module):
    """Its mask is made anew, and larger, when a longer sequence comes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(200, 200).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = len(x)
        if length > len(self.mask):
            self.mask = torch.ones(length, length).tril()
        return x + self.mask[:length, :length] @ self.linear(x) / length


def test_a_large_buffer_that_is_replaced_in_some_forward_passes_only(store: TierStore) -> None:
    pair = Pair(store, lambda: Chain(Masked))
    for length in (100, 250, 260, 30):
        for loss in pair.losses((torch.randn(length, 8), torch.randn(length, 4))):
            loss.backward()
        pair.assert_same_gradients()
        pair.step()
        pair.zero_grad()
    pair.assert_same()


# -- what models are made of -----------------------------------------------------------------------------------------------


def test_layers_in_pairs_that_the_model_calls_one_by_one(store: TierStore) -> None:
    """A list of lists: what is called, and leases, are the modules within."""

    def pair_of() -> nn.Module:
        return nn.ModuleList([small(), small()])

    def step(model: nn.Module, layer: Any, x: Tensor) -> Tensor:
        result: Tensor = layer[1](layer[0](x))
        return result

    pair = assert_trains_as_plain_torch(store, lambda: Chain(pair_of, step))
    assert {unit.name for unit in pair.tiered.structure.units} >= {"layers.0.0", "layers.0.1", "layers.2.1"}


def test_parameters_in_containers_that_the_model_uses_itself(store: TierStore) -> None:
    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(small)
            self.shifts = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in self.layers])
            self.more = nn.ModuleDict({"scales": nn.ParameterDict({"last": nn.Parameter(torch.ones(WIDTH))})})

        def forward(self, x: Tensor, targets: Tensor) -> Tensor:
            x = self.into(x)
            for layer, shift in zip(self.layers, self.shifts, strict=True):
                x = layer(x + shift)
            return F.mse_loss(self.out(x * self.more["scales"]["last"]), targets)  # type: ignore[index]

    assert_trains_as_plain_torch(store, Model)


def _tied_by_memory() -> nn.Module:
    model = Chain(small)
    model.side.weight = nn.Parameter(model.layers[0].up.weight.data)  # type: ignore[union-attr]
    return model


def _buffer_of_a_parameter() -> nn.Module:
    model = Chain(small)
    model.register_buffer("view", model.side.weight.data)
    return model


def _embedding(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Chain(small)
        model.tokens = nn.Embedding(5, WIDTH, **options)
        return model

    return make


def _traced() -> nn.Module:
    return Chain(lambda: torch.jit.trace(small(), torch.randn(2, WIDTH)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_tied_by_memory, "share memory, but are two tensors"),
        (_buffer_of_a_parameter, "share memory, but are two tensors"),
        (_embedding(max_norm=1.0), "max_norm="),
        (_embedding(sparse=True), "sparse gradients"),
        (_traced, r"compiled by torch\.jit"),
    ],
    ids=["tied by memory", "buffer", "max_norm", "sparse", "jit"],
)
def test_models_that_would_train_wrongly_are_refused_when_attached(make: Callable[[], nn.Module], message: str, store: TierStore) -> None:
    model = make()
    with pytest.raises(TrainingError, match=message) as caught:
        attach(model, store, model.layers)  # type: ignore[arg-type]
    assert caught.value.remedy
    assert not list(store)


def test_buffers_that_are_not_contiguous_come_back_as_they_lay_in_memory(tmp_path: Path) -> None:
    """`parametrizations.orthogonal` has such; kernels may compute other bits in another layout."""

    def make() -> Chain:
        return Chain(lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))

    with opened(tmp_path / "swap") as store:
        model = make()
        attach(model, store, model.layers)
        store.commit()
        committed = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not all(buffer.is_contiguous() for buffer in committed.values())
    with opened(tmp_path / "swap") as store:
        again = make()
        attach(again, store, again.layers).resume()
        for name, buffer in again.named_buffers():
            assert torch.equal(buffer, committed[name])
            assert buffer.stride() == committed[name].stride()


# -- other passes, other threads, other moments ----------------------------------------------------------------------------


class Thrice(Chain):
    """A weight in front of the layers, in one of them, and behind them; each layer under a checkpoint."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(small, lambda model, layer, x: checkpoint(layer, x, use_reentrant=use_reentrant))
        self.layers[1].up.weight = self.side.weight  # type: ignore[union-attr]

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.side(self.into(x))
        for layer in self.layers:
            x = self.take(self, layer, x)
        return F.mse_loss(self.out(self.side(x)), targets)


def test_layers_under_checkpoints_of_the_users(store: TierStore) -> None:
    assert_trains_as_plain_torch(store, lambda: Thrice(use_reentrant=False))


def test_a_backward_pass_inside_of_another_does_not_lose_what_that_one_has_summed_up(store: TierStore) -> None:
    """It came upon the sum of the outer pass, took it for one of a pass that had failed, and erased it."""
    pair = Pair(store, lambda: Thrice(use_reentrant=True))
    with pytest.raises(TrainingError, match="use_reentrant=False") as caught:
        pair.model(*pair.batch()).backward()
    del caught
    gc.collect()
    assert not pair.tiered._tasks
    pair.optimizer.zero_grad()
    assert_clean(pair)


@pytest.mark.parametrize("where", ["layer", "model"])
def test_detach_while_a_module_runs_is_refused(where: str, store: TierStore) -> None:
    """Placeholders came back into a model that was detached already."""

    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(small)
            self.scale = nn.Parameter(torch.ones(()))

    pair = Pair(store, Model)
    refused: list[TrainingError] = []

    def detach(*_: object) -> None:
        with pytest.raises(TrainingError, match="while a module of the model runs") as caught:
            pair.tiered.detach()
        refused.append(caught.value)

    module: Any = pair.model.layers[0].up if where == "layer" else pair.model.into  # type: ignore[union-attr, index]
    handle = module.register_forward_hook(detach)
    pair.model(*pair.batch())
    handle.remove()
    assert refused
    refused.clear()
    gc.collect()
    pair.assert_usable()


class Waits(torch.optim.SGD):
    """Whose first step, once armed, waits to be told to go on."""

    began = threading.Event()
    go_on = threading.Event()
    armed = False

    def step(self, closure: Any = None) -> Any:
        if Waits.armed:
            Waits.armed = False
            Waits.began.set()
            assert Waits.go_on.wait(60)
        return super().step(closure)


def test_an_update_put_off_that_two_threads_come_upon_is_made_once(store: TierStore) -> None:
    """A thread reads a block, to watch it, while the loop is about to use it."""
    Waits.began.clear()
    Waits.go_on.clear()
    pair = Pair(store, lambda: Chain(small), factory=Waits, options={"lr": 0.1})
    pair.backward()
    pair.step()
    Waits.armed = True
    reader = threading.Thread(target=store.read, args=("into",))
    reader.start()
    assert Waits.began.wait(60)
    inputs = pair.batch()[0]
    result: list[Tensor] = []
    loop = threading.Thread(target=lambda: result.append(pair.model.into(inputs).detach()))  # type: ignore[operator]
    loop.start()
    loop.join(0.5)  # it must wait; without that it is not seen whether it did, but nothing fails
    Waits.go_on.set()
    reader.join(60)
    loop.join(60)
    assert torch.equal(result[0], pair.plain.into(inputs).detach())  # type: ignore[operator]
    gc.collect()
    pair.assert_usable()


def test_hooks_of_modules_and_tensors(store: TierStore) -> None:
    """On a layer they see it from outside, below it from within, and what they return counts."""

    class Model(Chain):
        def __init__(self) -> None:
            super().__init__(small)
            for layer in self.layers:
                layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.9,))
                layer.register_forward_hook(lambda module, args, result: result * 1.1)
                layer.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 0.7,))
                layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
                layer.up.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))  # type: ignore[union-attr]
                layer.down.register_forward_hook(lambda module, args, result: result + 1)  # type: ignore[union-attr]

    assert_trains_as_plain_torch(store, Model)


def test_what_an_optimizer_is_made_for_after_all(store: TierStore) -> None:
    """A model of containers alone, whose layers are found by themselves, trains all of its parameters."""
    model = Chain(lambda: nn.ModuleList([small(), small()]), lambda model, layer, x: layer[1](layer[0](x)))  # type: ignore[index]
    tiered = attach(model, store)
    optimizer = TieredOptimizer(tiered, torch.optim.SGD, lr=0.1)
    model(torch.randn(4, 8), torch.randn(4, 4)).backward()
    names = {weight.name for weight in tiered.structure.weights}
    assert {name for name in names if tiered.gradient(name) is None} == {"side.weight", "side.bias"}
    optimizer.step()
