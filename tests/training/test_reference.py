"""The resident reference against loops written by hand, bit for bit: that it computes what section 8 of the design defines."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tierstore.testing.reference import ReferenceOptimizer, capture, resident_reference

WIDTH = 24


class Layer(nn.Module):
    """Uses `twice` two times, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.side = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return compute(lambda parameter: parameter, self, x)


def compute(use: Callable[[Tensor], Tensor], layer: Layer, x: Tensor) -> Tensor:
    hidden = F.dropout(F.gelu(F.linear(x, use(layer.twice))), 0.3, training=layer.training)
    return F.linear(hidden, use(layer.twice)) + F.linear(x, use(layer.side), use(layer.bias))


class Model(nn.Module):
    """The first layer runs twice, the second shares a weight with it, and so does the head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        first, second = self.layers
        second.side = first.side
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head.weight = first.side
        self.order = [first, second, first]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return self.head(x)


def model_of(dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model().to(device=device, dtype=dtype)


def batch_of(rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Rows of very different sizes, so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, rows)[torch.randperm(rows, generator=generator)]
    return (torch.randn(rows, 5, WIDTH, generator=generator) * scale[:, None, None]).to(device=device, dtype=dtype)


def total(terms: Iterable[Tensor]) -> Tensor:
    """One by one, from the first on."""
    return functools.reduce(operator.add, terms)


def by_hand(
    model: Model, x: Tensor, micro_batch: int, order: Callable[[list[Tensor]], Sequence[Tensor]] = lambda uses: uses[::-1]
) -> tuple[Tensor, dict[nn.Parameter, Tensor], Tensor]:
    """Loss, gradient of each parameter, and gradient of the input; nothing is recomputed, and autograd sums nothing of the parameters.

    Every use of a parameter takes a leaf of its own. What the leaves get is added up here in `order`: by default the last use comes first.
    """
    uses: dict[nn.Parameter, list[Tensor]] = {parameter: [] for parameter in model.parameters()}

    def use(parameter: Tensor) -> Tensor:
        leaf = parameter.detach().clone().requires_grad_()
        uses[parameter].append(leaf)
        return leaf

    x = inputs = x.detach().clone().requires_grad_()
    for layer in model.order:
        x = torch.cat([compute(use, layer, chunk) for chunk in x.split(micro_batch)])
    loss = F.linear(x, use(model.head.weight)).float().square().mean()
    loss.backward()
    return loss.detach(), {parameter: total(order([leaf.grad for leaf in leaves])) for parameter, leaves in uses.items()}, inputs.grad


def no_autocast(device: str) -> AbstractContextManager[None]:
    return nullcontext()


def autocast(device: str) -> AbstractContextManager[None]:
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


# --- Micro-batches


def test_without_micro_batches_nothing_is_changed() -> None:
    model = model_of()
    before = [dict(module.__dict__) for module in model.modules()]
    reference = resident_reference(model, model.layers)
    assert [dict(module.__dict__) for module in model.modules()] == before
    reference.detach()
    assert [dict(module.__dict__) for module in model.modules()] == before


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
@pytest.mark.parametrize(("dtype", "casting"), [(torch.float32, no_autocast), (torch.bfloat16, no_autocast), (torch.float32, autocast)])
def test_micro_batches(
    device: str, dtype: torch.dtype, casting: Callable[[str], AbstractContextManager[None]], micro_batch: int, rows: int
) -> None:
    """Shared weights, a module used twice, dropout and three backward calls included."""
    model, expected = model_of(dtype, device), model_of(dtype, device)
    reference = resident_reference(model, model.layers, micro_batch=micro_batch)
    accumulated: list[Tensor] | None = None
    for seed in range(3):
        x = batch_of(rows, dtype, device, seed)
        torch.manual_seed(seed)
        with casting(device):
            loss, gradients, of_input = by_hand(expected, x, micro_batch)
        after_by_hand = torch.get_rng_state()
        # The sum within one backward comes first, then the sum with what had accumulated.
        one = [gradients[parameter] for parameter in expected.parameters()]
        accumulated = one if accumulated is None else [old + new for old, new in zip(accumulated, one, strict=True)]

        torch.manual_seed(seed)
        x.requires_grad_()
        with casting(device):
            output = model(x)
        own_loss = output.float().square().mean()
        own_loss.backward()
        assert torch.equal(own_loss, loss)
        assert torch.equal(x.grad, of_input)
        assert all(map(torch.equal, [parameter.grad for parameter in model.parameters()], accumulated))
        assert torch.equal(torch.get_rng_state(), after_by_hand), "recomputation left a trace in the random numbers"
    reference.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_order_of_the_sum_would_show(dtype: torch.dtype) -> None:
    model = model_of(dtype)
    model.eval()
    x = batch_of(8, dtype)
    right = by_hand(model, x, 2)[1]
    for order in (lambda uses: uses, lambda uses: [total(uses[index : index + 4][::-1]) for index in range(0, len(uses), 4)][::-1]):
        wrong = by_hand(model, x, 2, order)[1]
        assert not torch.equal(right[model.layers[0].twice], wrong[model.layers[0].twice])
        assert not torch.equal(right[model.head.weight], wrong[model.head.weight])


def test_layers_are_recomputed_chunk_by_chunk_from_the_last() -> None:
    model = model_of()
    resident_reference(model, model.layers, micro_batch=3)
    loss = model(batch_of(8)).square().mean()
    assert [layer.calls for layer in model.layers] == [[3, 3, 2] * 2, [3, 3, 2]]
    loss.backward()
    assert [layer.calls for layer in model.layers] == [[3, 3, 2, 3, 3, 2, 2, 3, 3, 2, 3, 3], [3, 3, 2, 2, 3, 3]]


def test_evaluation_splits_without_recomputation() -> None:
    model = model_of()
    model.eval()
    x = batch_of(8)
    with torch.no_grad():
        whole = copy.deepcopy(model)(x)
        hand = x
        for layer in model.order:
            hand = torch.cat([compute(lambda parameter: parameter, layer, chunk) for chunk in hand.split(3)])
        hand = model.head(hand)
        resident_reference(model, model.layers, micro_batch=3)
        result = model(x)
    assert result.grad_fn is None
    assert torch.equal(result, hand)
    assert torch.allclose(result, whole, rtol=1e-3, atol=1e-3)
    assert [layer.calls for layer in model.layers] == [[3, 3, 2] * 2, [3, 3, 2]]


def test_an_empty_batch_is_one_chunk() -> None:
    model = model_of()
    resident_reference(model, model.layers, micro_batch=3)
    model(batch_of(8)[:0]).sum().backward()
    assert [layer.calls for layer in model.layers] == [[0, 0, 0, 0], [0, 0]]


@pytest.mark.parametrize("frozen", ["twice", "side", "bias"])
def test_frozen_parameters_get_no_gradient_and_change_no_other(frozen: str) -> None:
    model = model_of()
    resident_reference(model, model.layers, micro_batch=3)
    for layer in model.layers:
        getattr(layer, frozen).requires_grad_(False)
    torch.manual_seed(0)
    model(batch_of(8)).square().mean().backward()
    hand = model_of()
    torch.manual_seed(0)
    gradients = by_hand(hand, batch_of(8), 3)[1]
    for (name, parameter), gradient in zip(model.named_parameters(), gradients.values(), strict=True):
        if name.endswith(frozen):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradient)


# --- What layers take and return

Pair = namedtuple("Pair", ["left", "right"])


class Rich(nn.Module):
    """All that a layer may take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.seen: list[Any] = []

    def forward(self, pair: Pair, *more: Tensor, scale: float, table: Tensor | None = None, **rest: Any) -> Any:
        left, right = pair
        self.seen.append([len(left), [len(tensor) for tensor in more], None if table is None else len(table), rest])
        x = F.linear(left, self.weight) * scale + right
        for tensor in more:
            x = x + tensor
        if table is not None:
            x = x * table.sum(0)
        for tensor in rest.get("extra", {}).values():
            x = x * tensor
        return Pair(x, [left * 2, None, "text"]), OrderedDict(inner={"scale": scale, "right": right.sum(1)}, done=True)


def test_arguments_and_outputs_of_every_kind() -> None:
    torch.manual_seed(0)
    layer = Rich()
    model = nn.ModuleList([layer])
    x, right, added, extra = (batch_of(7, seed=seed) for seed in range(4))
    table, factor = torch.randn(3, WIDTH), torch.tensor(0.5)
    more = {"rows": extra, "factor": factor}
    (output, states), named = layer(Pair(x, right), added, scale=0.5, table=table, extra=more, other=7)
    layer.seen.clear()

    chunks = zip(x.split(3), right.split(3), added.split(3), extra.split(3), strict=True)
    hand = [layer(Pair(a, b), c, scale=0.5, table=table, extra={"rows": d, "factor": factor}, other=7) for a, b, c, d in chunks]
    seen = list(layer.seen)
    layer.seen.clear()
    reference = resident_reference(model, model, micro_batch=3)
    result = layer(Pair(x, right), added, scale=0.5, table=table, extra=more, other=7)
    assert [entry[:3] for entry in layer.seen] == [entry[:3] for entry in seen] == [[3, [3], 3], [3, [3], 3], [1, [1], 3]]
    assert all(entry[3]["other"] == 7 for entry in layer.seen)
    reference.detach()
    assert more["rows"] is extra, "what the caller owns was changed"

    assert type(result) is tuple
    assert type(result[0]) is Pair
    assert type(result[1]) is OrderedDict
    assert list(result[1]) == ["inner", "done"]
    assert torch.equal(result[0].left, torch.cat([one[0].left for one in hand]))
    assert torch.equal(result[0].right[0], states[0])
    assert result[0].right[1:] == [None, "text"]
    assert result[1]["done"] is True
    assert result[1]["inner"]["scale"] == 0.5
    assert torch.equal(result[1]["inner"]["right"], named["inner"]["right"])
    assert result[0].left.shape == output.shape
    (result[0].left.sum() + result[1]["inner"]["right"].sum()).backward()
    own = layer.weight.grad
    layer.weight.grad = None
    for one in hand[::-1]:
        one[0].left.sum().backward()
    assert torch.equal(own, layer.weight.grad)


def test_a_tensor_given_to_every_chunk_gets_the_sum_of_their_gradients() -> None:
    torch.manual_seed(0)
    layer = Rich()
    resident_reference(layer, [layer], micro_batch=2)
    x, table = batch_of(7), torch.randn(3, WIDTH, requires_grad=True)
    (result, _), _ = layer(Pair(x, x), scale=1.0, table=table)
    result.square().sum().backward()
    tables = []
    for chunk in x.split(2):
        tables.append(table.detach().clone().requires_grad_())
        (F.linear(chunk, layer.weight) + chunk).mul(tables[-1].sum(0)).square().sum().backward()
    assert torch.equal(table.grad, total([leaf.grad for leaf in tables][::-1]))


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is None or mask.shape == (4, 4), "the mask was split"
        return x


def test_split_names_what_may_be_split() -> None:
    """A mask of batch x batch elements looks like rows."""
    for arguments, keywords in (((torch.ones(4, 4),), {}), ((), {"mask": torch.ones(4, 4)})):
        layer = Masked()
        reference = resident_reference(layer, [layer], micro_batch=2)
        with pytest.raises(AssertionError, match="the mask was split"):
            layer(torch.ones(4, 3), *arguments, **keywords)
        reference.detach()
        for names in (["x"], "x"):
            reference = resident_reference(layer, [layer], micro_batch=2, split=names)
            assert torch.equal(layer(torch.ones(4, 3), *arguments, **keywords), torch.ones(4, 3))
            reference.detach()


def test_keywords_alone_will_do() -> None:
    layer = Layer()
    resident_reference(layer, [layer], micro_batch=3)
    layer(x=batch_of(8))
    assert layer.calls == [3, 3, 2]


class Returns(nn.Module):
    """Returns what it is told to, given the chunk."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x.sum(), r"of a micro-batch of 3 rows its output needs 3 rows, but has the shape \(\)"),
        (lambda x: (x, {"loss": x.sum((0, 1))}), r"its output\[1\]\['loss'\] needs 3 rows, but has the shape \(24,\)"),
        (lambda x: (x, float(x.sum())), r"its output\[1\] is .* in one micro-batch and .* in another"),
        (lambda x: (x, None if len(x) == 2 else x), r"its output\[1\] is of another type in different micro-batches: NoneType, Tensor"),
        (lambda x: (x, [1] * len(x)), r"its output\[1\] has other items in different micro-batches"),
        (lambda x: {"x": x, len(x): x}, r"its output has other items in different micro-batches"),
    ],
)
def test_outputs_that_cannot_be_put_together(what: Callable[[Tensor], Any], message: str) -> None:
    layer = Returns(what)
    resident_reference(layer, [layer], micro_batch=3)
    with pytest.raises(ValueError, match=message):
        layer(batch_of(8))


def test_a_layer_needs_a_batch() -> None:
    layer = Returns(lambda x: x)
    resident_reference(layer, [layer], micro_batch=3)
    for nothing in (3, torch.tensor(3.0)):
        with pytest.raises(ValueError, match="needs a tensor with a batch dimension"):
            layer(nothing)
    with pytest.raises(TypeError, match="positional arguments"):
        layer(torch.ones(3), torch.ones(3))


# --- Refusals, and the way back


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm1d(WIDTH), lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))])
def test_batch_norm_is_refused_where_it_uses_the_batch(make: Callable[[], nn.Module]) -> None:
    layer = make()
    resident_reference(layer, [layer], micro_batch=3)
    with pytest.raises(ValueError, match="is a BatchNorm1d that uses statistics of the batch"):
        layer(torch.randn(8, WIDTH))
    with torch.no_grad(), pytest.raises(ValueError, match="is a BatchNorm1d that uses statistics of the batch"):
        layer(torch.randn(8, WIDTH))
    layer.eval()
    layer(torch.randn(8, WIDTH)).sum().backward()


def test_batch_norm_without_running_statistics_is_always_refused() -> None:
    layer = nn.BatchNorm1d(WIDTH, track_running_stats=False).eval()
    resident_reference(layer, [layer], micro_batch=3)
    with pytest.raises(ValueError, match="is a BatchNorm1d that uses statistics of the batch"):
        layer(torch.randn(8, WIDTH))


def test_batch_norm_without_micro_batches_is_left_alone() -> None:
    layer = nn.BatchNorm1d(WIDTH)
    resident_reference(layer, [layer])
    layer(torch.randn(8, WIDTH))
    assert int(layer.num_batches_tracked) == 1


def test_autocast_with_its_cache_is_refused() -> None:
    model = model_of()
    resident_reference(model, model.layers, micro_batch=3)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="cache_enabled=False"):
            model(batch_of(8))
        with torch.no_grad():  # no gradients to be summed
            model(batch_of(8))


def test_what_cannot_be_meant_is_refused() -> None:
    model = model_of()
    first = model.layers[0]
    with pytest.raises(ValueError, match="give both, or neither"):
        resident_reference(model, model.layers, split=["x"])
    for bad in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="1 or more"):
            resident_reference(model, model.layers, micro_batch=bad)
    with pytest.raises(ValueError, match="pass layers="):
        resident_reference(model, micro_batch=3)
    with pytest.raises(ValueError, match="a Layer is not one of them"):
        resident_reference(model, [Layer()], micro_batch=3)
    with pytest.raises(ValueError, match=r"layer 'layers.0' lies inside layer 'layers'"):
        resident_reference(model, [model.layers, first], micro_batch=3)
    with pytest.raises(ValueError, match=r"split= names 'y', but no layer's forward has such a parameter: \(x"):
        resident_reference(model, model.layers, micro_batch=3, split=["x", "y"])
    assert all("forward" not in module.__dict__ for module in model.modules())
    resident_reference(model, model.layers, micro_batch=3)
    with pytest.raises(ValueError, match=r"layer 'layers.0' is split already"):
        resident_reference(model, [first], micro_batch=3)


def test_detach_restores_the_forwards() -> None:
    model = model_of()
    first, second = model.layers

    def special(x: Tensor) -> Tensor:
        return x * 2

    second.forward = special
    reference = resident_reference(model, [first, second, first], micro_batch=3)
    assert inspect.signature(first.forward) == inspect.signature(Layer().forward)
    assert second.forward is not special
    model(batch_of(8))
    assert first.calls == [3, 3, 2] * 2
    reference.detach()
    reference.detach()
    assert "forward" not in first.__dict__
    assert second.__dict__["forward"] is special
    model(batch_of(8))
    assert first.calls[6:] == [8, 8]


def test_detach_takes_away_only_its_own() -> None:
    model = model_of()
    first, second = model.layers
    reference = resident_reference(model, model.layers, micro_batch=3)
    ours, second.forward = second.forward, lambda x: x
    with pytest.raises(RuntimeError, match=r"layer 'layers.1' was replaced since"):
        reference.detach()
    assert "forward" in first.__dict__
    second.forward = ours
    reference.detach()
    assert "forward" not in second.__dict__


def test_a_deep_copy_runs_its_own_layers() -> None:
    model = model_of()
    resident_reference(model, model.layers, micro_batch=3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(batch_of(8)).any()
    assert model.layers[0].calls == []
    assert other.layers[0].calls == [3, 3, 2] * 2


class Counting(nn.Module):
    """Changes buffers: one in place, one by assignment, one that its part shares; the output depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()), persistent=False)
        self.part = nn.Module()
        self.part.register_buffer("shared", self.in_place)
        self.register_buffer("again", self.in_place)
        self.seen: list[tuple[float, float, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += len(x)
        self.assigned = self.assigned + 1
        self.seen.append((float(self.again), float(self.assigned), float(self.part.shared)))
        return torch.tanh(F.linear(x, self.weight) * self.in_place + self.assigned)


def test_buffers_change_once_per_chunk_and_recomputation_sees_them_as_they_were() -> None:
    torch.manual_seed(0)
    layer = Counting()
    original = layer.in_place
    resident_reference(layer, [layer], micro_batch=3)
    x = batch_of(8)
    loss = layer(x).square().sum()
    changed = layer.assigned
    for _ in range(2):
        loss.backward(retain_graph=True)
    forward = [(3.0, 1.0, 3.0), (6.0, 2.0, 6.0), (8.0, 3.0, 8.0)]
    assert layer.seen == [*forward, *forward[::-1], *forward[::-1]]
    assert layer.in_place is layer.again is layer.part.shared is original
    assert layer.assigned is changed
    assert (float(layer.in_place), float(layer.assigned)) == (8.0, 3.0)
    leaves = []
    for chunk, (count, call, _) in zip(x.split(3), forward, strict=True):
        leaves.append(layer.weight.detach().clone().requires_grad_())
        torch.tanh(F.linear(chunk, leaves[-1]) * count + call).square().sum().backward()
    once = total([leaf.grad for leaf in leaves][::-1])
    assert torch.equal(layer.weight.grad, once + once)


# --- Optimizers


def gradients_for(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """A gradient of its own for each parameter, as if from a backward."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


FACTORIES: list[tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    (functools.partial(torch.optim.Adafactor, lr=1e-2), {}),
]


@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_without_masters_it_is_the_unmodified_loop(
    device: str, factory: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    model, plain = model_of(device=device), model_of(device=device)
    optimizer = resident_reference(model, model.layers).optimizer(factory, **options)
    expected = factory(plain.parameters(), **options)
    for step in range(4):
        for trained, inner in ((model, optimizer.inner), (plain, expected)):
            inner.param_groups[0]["lr"] = 1e-2 / (step + 1)
            torch.manual_seed(step)
            for part in range(2):
                trained(batch_of(8, device=device, seed=2 * step + part)).square().mean().backward()
        norm = optimizer.clip_grad_norm_(0.5)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        assert same((parameter.grad for parameter in model.parameters()), (parameter.grad for parameter in plain.parameters()))
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert same(model.parameters(), plain.parameters())
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            state, wanted = optimizer.state_of(parameter), expected.state[other]
            assert list(state) == list(wanted)
            assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(wanted[key])) for key in state)
            assert optimizer.master_of(parameter) is None


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize(("factory", "options"), FACTORIES)
def test_masters(
    device: str, factory: Callable[..., torch.optim.Optimizer], options: dict[str, Any], norm_type: float, micro_batch: int | None
) -> None:
    """Training in bf16: widened, normed, clipped, updated and narrowed by hand."""
    model, hand = model_of(torch.bfloat16, device), model_of(torch.bfloat16, device)
    reference = resident_reference(model, model.layers, micro_batch=micro_batch)
    optimizer = reference.optimizer(factory, master_dtype=torch.float32, **options)
    parameters = list(hand.parameters())
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    inner = factory(masters, **options)
    for step in range(3):
        for part in range(2):
            x = batch_of(8, torch.bfloat16, device, 2 * step + part)
            torch.manual_seed(step)
            loss = model(x).float().square().mean()
            loss.backward()
            torch.manual_seed(step)
            expected_loss, gradients, _ = by_hand(hand, x, micro_batch or len(x))
            assert torch.equal(loss, expected_loss)
            for parameter in parameters:
                parameter.grad = gradients[parameter] if parameter.grad is None else parameter.grad + gradients[parameter]
        norm = optimizer.clip_grad_norm_(0.5, norm_type)
        wide = [parameter.grad.float() for parameter in parameters]
        # The kernel for lists adds in another order than that for one tensor; torch takes it where there is one.
        of_each = torch._foreach_norm(wide, norm_type) if device == "cuda" else [torch.linalg.vector_norm(one, norm_type) for one in wide]
        expected_norm = torch.linalg.vector_norm(torch.stack(list(of_each)), norm_type)
        assert norm.dtype == torch.float32
        assert torch.equal(norm, expected_norm)
        for master, one in zip(masters, wide, strict=True):
            master.grad = one * torch.clamp(0.5 / (expected_norm + 1e-6), max=1.0)
        assert float(norm) > 0.5, "nothing was clipped"
        optimizer.step()
        inner.step()
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master.detach().bfloat16()
            parameter.grad = None
        assert all(master.grad is None for group in optimizer.param_groups for master in group["params"])
        optimizer.zero_grad()
        assert same(model.parameters(), parameters)
        for parameter, master in zip(model.parameters(), masters, strict=True):
            own = optimizer.master_of(parameter)
            assert own is not None
            assert torch.equal(own, master)
            assert own.dtype == torch.float32
            assert all(
                torch.equal(torch.as_tensor(value), torch.as_tensor(inner.state[master][key]))
                for key, value in optimizer.state_of(parameter).items()
            )


def test_masters_are_kept_between_steps() -> None:
    """Steps too small for bf16 add up in the master."""
    layer = nn.Linear(4, 4).bfloat16()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(1.0)
    optimizer = resident_reference(layer).optimizer(torch.optim.SGD, lr=1e-3, master_dtype=torch.float32)
    for _ in range(8):
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 1 - 8e-3))
    assert not torch.equal(layer.weight, torch.ones_like(layer.weight))


@pytest.mark.parametrize("master_dtype", [None, torch.float32])
def test_parameters_without_a_gradient_are_left_out(master_dtype: torch.dtype | None) -> None:
    """Neither weight decay nor a moment touches them, and they have no part in the norm. A zero gradient is another thing."""
    model, plain = model_of(), model_of()
    optimizer = resident_reference(model).optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.5, master_dtype=master_dtype)
    expected = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(3):
        for trained in (model, plain):
            gradients_for(trained, step)
            trained.layers[0].bias.grad = None
            if step == 1:
                trained.layers[1].bias.grad = None
        before = model.layers[1].bias.detach().clone()
        assert torch.equal(optimizer.clip_grad_norm_(1.0), torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0))
        optimizer.step()
        expected.step()
        optimizer.zero_grad()
        expected.zero_grad()
        assert same(model.parameters(), plain.parameters())
        assert torch.equal(before, model.layers[1].bias) == (step == 1)
    assert optimizer.state_of(model.layers[0].bias) == {}
    assert torch.equal(model.layers[0].bias, model_of().layers[0].bias)
    assert int(optimizer.state_of(model.layers[1].bias)["step"]) == 2
    assert torch.equal(optimizer.clip_grad_norm_(1.0), torch.tensor(0.0)), "without any gradient the norm is 0"
    optimizer.step()
    model.layers[0].bias.grad = torch.zeros_like(model.layers[0].bias)
    optimizer.step()
    assert not torch.equal(model.layers[0].bias, model_of().layers[0].bias)


def test_the_global_norm_stacks_in_the_order_of_the_model() -> None:
    """Whatever the order of the groups. With some seeds another order shows, without which this would prove nothing."""
    shown = 0
    for seed in range(40):
        model = model_of(seed=seed)
        parameters = list(model.parameters())
        groups = [{"params": iter(parameters[:1:-1]), "lr": 0.5}, {"params": parameters[0]}, {"params": parameters[1:2]}]
        optimizer = resident_reference(model).optimizer(torch.optim.SGD, params=groups, lr=0.1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(parameters) - 2, 1, 1]
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1, 0.1]
        gradients_for(model, seed)
        gradients = [parameter.grad.clone() for parameter in parameters]
        norm = optimizer.clip_grad_norm_(1.0)
        assert torch.equal(norm, torch.nn.utils.get_total_norm(gradients))
        shown += not torch.equal(norm, torch.nn.utils.get_total_norm(gradients[::-1]))
        coefficient = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        assert same((parameter.grad for parameter in parameters), (gradient * coefficient for gradient in gradients))
    assert shown


class Nested(nn.Module):
    """Parameters in layers, beside them, and directly in what holds layers. Layers share one with each other, one with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.body = nn.Module()
        self.body.scale = nn.Parameter(torch.randn(3))
        self.body.embedding = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.body.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
        self.body.layers[1].bias = self.body.layers[0].bias
        self.body.layers[2].bias = self.body.embedding[1].bias


GROUPS = [
    ["head.weight", "head.bias"],
    ["body.scale"],
    ["body.embedding.0.weight", "body.embedding.0.bias", "body.embedding.1.weight"],
    ["body.embedding.1.bias", "body.layers.2.weight"],
    ["body.layers.0.weight", "body.layers.0.bias"],
    ["body.layers.1.weight"],
]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("master_dtype", [None, torch.float32])
def test_a_norm_per_layer(master_dtype: torch.dtype | None, explicit: bool) -> None:
    torch.manual_seed(0)
    model = Nested()
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(name for group in GROUPS for name in group)
    optimizer = resident_reference(model, model.body.layers).optimizer(torch.optim.SGD, lr=1.0, master_dtype=master_dtype)
    gradients_for(model, 0)
    named["body.scale"].grad = None
    wanted: list[Tensor] = []
    updated = {name: parameter.detach().clone() for name, parameter in named.items()}
    for group in GROUPS:
        gradients = [named[name].grad for name in group if named[name].grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        wanted.append(norm)
        for name in group:
            if named[name].grad is not None:
                updated[name] = updated[name] - named[name].grad * torch.clamp(0.7 / (norm + 1e-6), max=1.0)
    scope: Any = [[named[name] for name in reversed(group)] for group in GROUPS] if explicit else "layer"
    norms = optimizer.clip_grad_norm_(0.7, scope=scope)
    assert torch.equal(norms, torch.stack(wanted))
    assert float(norms[1]) == 0.0
    optimizer.step()
    for name, parameter in named.items():
        assert torch.equal(parameter, updated[name]), name


def test_groups_without_parameters_of_the_optimizer_are_left_out() -> None:
    model = Nested()
    chosen = [model.body.layers[1].weight, model.head.bias]
    optimizer = resident_reference(model, model.body.layers).optimizer(torch.optim.SGD, params=chosen, lr=1.0)
    gradients_for(model, 0)
    norms = optimizer.clip_grad_norm_(1e9, scope="layer")
    assert torch.equal(norms, torch.stack([model.head.bias.grad.norm(), model.body.layers[1].weight.grad.norm()]))
    assert torch.equal(optimizer.clip_grad_norm_(1e9, scope=[[chosen[0]]]), norms[1:])


def test_scopes_that_cannot_be_meant() -> None:
    model = Nested()
    optimizer = resident_reference(model).optimizer(torch.optim.SGD, params=list(model.head.parameters()), lr=1.0)
    gradients_for(model, 0)
    with pytest.raises(ValueError, match="needs to know the layers"):
        optimizer.clip_grad_norm_(1.0, scope="layer")
    with pytest.raises(ValueError, match="but is 'layers'"):
        optimizer.clip_grad_norm_(1.0, scope="layers")
    with pytest.raises(ValueError, match="in two groups"):
        optimizer.clip_grad_norm_(1.0, scope=[[model.head.bias], [model.head.bias]])
    for ask in (lambda: optimizer.clip_grad_norm_(1.0, scope=[[model.body.scale]]), lambda: optimizer.state_of(model.body.scale)):
        with pytest.raises(ValueError, match=r"does not update the given parameter of shape \(3,\)"):
            ask()
    with pytest.raises(ValueError, match="1 of 2 are not"):
        resident_reference(model).optimizer(torch.optim.SGD, params=[model.head.bias, nn.Parameter(torch.ones(2))], lr=1.0)


def test_one_instance_for_the_whole_set() -> None:
    made: list[list[Any]] = []

    def factory(params: list[Any], **options: Any) -> torch.optim.Optimizer:
        made.append(params)
        return torch.optim.SGD(params, **options)

    model = model_of()
    model.layers[1].bias.requires_grad_(False)
    reference = resident_reference(model)
    optimizer = reference.optimizer(factory, lr=0.1)
    expected = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(made) == 1
    assert all(one is other for one, other in zip(made[0], expected, strict=True))
    assert optimizer.parameters == made[0]
    reference.optimizer(factory, master_dtype=torch.float64, lr=0.1)
    assert len(made) == 2
    assert [type(master) for master in made[1]] == [nn.Parameter] * len(expected)
    assert same(made[1], (parameter.double() for parameter in expected))
    masters = reference.optimizer(factory, master_dtype=torch.float32, lr=0.1)
    for parameter in expected:
        master = masters.master_of(parameter)
        assert master is not None
        assert master.data_ptr() != parameter.data_ptr(), "a master is a copy also where the dtype is the same"


def test_schedulers_work_on_the_inner_optimizer() -> None:
    model = model_of()
    optimizer = resident_reference(model).optimizer(torch.optim.SGD, lr=1.0, master_dtype=torch.float32)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.inner, 1, 0.5)
    before = model.layers[0].bias.detach().clone()
    for rate in (1.0, 0.5, 0.25):
        assert optimizer.param_groups[0]["lr"] == rate
        model.layers[0].bias.grad = torch.ones_like(before)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        before = before - rate
    assert torch.equal(model.layers[0].bias, before)


# --- Clipping and what comes after it


def clipping(master_dtype: torch.dtype | None) -> tuple[nn.Linear, ReferenceOptimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    gradients_for(layer, 0)
    return layer, resident_reference(layer).optimizer(torch.optim.SGD, lr=1.0, master_dtype=master_dtype)


def test_with_masters_gradients_must_not_change_after_clipping() -> None:
    for change in (
        lambda layer: gradients_for(layer, 1),
        lambda layer: layer(torch.ones(2, 4)).sum().backward(),
        lambda layer: setattr(layer.bias, "grad", None),
        lambda layer: setattr(layer.bias, "grad", layer.bias.grad.clone()),
    ):
        layer, optimizer = clipping(torch.float32)
        before = [parameter.detach().clone() for parameter in layer.parameters()]
        optimizer.clip_grad_norm_(1.0)
        change(layer)
        for call in (optimizer.step, functools.partial(optimizer.clip_grad_norm_, 1.0)):
            with pytest.raises(RuntimeError, match=r"must not change between clip_grad_norm_\(\) and step\(\)"):
                call()
        assert same(layer.parameters(), before)
        optimizer.zero_grad()
        gradients_for(layer, 2)
        gradients = [parameter.grad.clone() for parameter in layer.parameters()]
        optimizer.step()
        assert same(layer.parameters(), [old - new for old, new in zip(before, gradients, strict=True)])


def test_without_masters_a_later_backward_adds_to_what_is_clipped() -> None:
    layer, optimizer = clipping(None)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer.clip_grad_norm_(1.0)
    clipped = [parameter.grad.clone() for parameter in layer.parameters()]
    gradients_for(layer, 1)
    optimizer.step()
    plain = nn.Linear(4, 4)
    gradients_for(plain, 1)
    later = [parameter.grad for parameter in plain.parameters()]
    assert same(layer.parameters(), [old - (one + two) for old, one, two in zip(before, clipped, later, strict=True)])


@pytest.mark.parametrize("master_dtype", [None, torch.float32])
def test_clipping_twice_clips_what_is_clipped(master_dtype: torch.dtype | None) -> None:
    layer, optimizer = clipping(master_dtype)
    plain, _ = clipping(None)
    for bound in (1.0, 0.3):
        norm = optimizer.clip_grad_norm_(bound)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(plain.parameters(), bound))
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer.step()
    assert same(layer.parameters(), [old - parameter.grad for old, parameter in zip(before, plain.parameters(), strict=True)])


def test_with_masters_clipping_holds_for_one_step_and_leaves_the_gradients() -> None:
    layer, optimizer = clipping(torch.float32)
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    assert same((parameter.grad for parameter in layer.parameters()), gradients)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer.step()
    assert same(layer.parameters(), [old - new for old, new in zip(before, gradients, strict=True)])


@pytest.mark.parametrize("master_dtype", [None, torch.float32])
@pytest.mark.parametrize("scope", ["global", "lists"])
def test_a_norm_that_is_not_finite_raises_before_anything_is_clipped(master_dtype: torch.dtype | None, scope: str) -> None:
    layer, optimizer = clipping(master_dtype)
    layer.bias.grad[0] = float("nan")
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    gradients = [parameter.grad.clone() for parameter in layer.parameters()]
    groups: Any = scope if scope == "global" else [[layer.weight], [layer.bias]]
    with pytest.raises(RuntimeError, match="non-finite"):
        optimizer.clip_grad_norm_(0.1, scope=groups, error_if_nonfinite=True)
    gradients_for(layer, 1)  # nothing is clipped, so that this is allowed
    optimizer.step()
    plain = nn.Linear(4, 4)
    gradients_for(plain, 1)
    expected = [old - (one + other.grad) for old, one, other in zip(before, gradients, plain.parameters(), strict=True)]
    assert all(torch.equal(own.nan_to_num(7), wanted.nan_to_num(7)) for own, wanted in zip(layer.parameters(), expected, strict=True))
    assert torch.isnan(optimizer.clip_grad_norm_(0.1))


# --- Capturing


class Numbers(torch.optim.Optimizer):
    """A user's optimizer that counts in plain numbers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.update(count=state.get("count", 0) + 1, rate=0.1, name="text", moment=parameter.detach())


def test_capture() -> None:
    model = model_of(torch.bfloat16)
    model.layers[1].bias.requires_grad_(False)
    optimizer = resident_reference(model).optimizer(torch.optim.AdamW, master_dtype=torch.float32)
    names = ["layers.0.twice", "layers.0.side", "layers.0.bias", "layers.1.twice", "layers.1.bias"]
    trained = names[:-1]
    assert list(capture(model, optimizer)) == [*names, *((name, "master") for name in trained)]
    gradients_for(model, 0)
    optimizer.step()
    captured = capture(model, optimizer)
    parameters = dict(model.named_parameters())
    for name in names:
        assert torch.equal(captured[name], parameters[name])
    for name in trained:
        master = optimizer.master_of(parameters[name])
        assert master is not None
        assert torch.equal(captured[name, "master"], master)
        for key, value in optimizer.inner.state[master].items():
            assert torch.equal(captured[name, key], value)
    assert len(captured) == len(names) + len(trained) * 4
    kept = {key: tensor.clone() for key, tensor in captured.items()}
    gradients_for(model, 1)
    optimizer.step()
    assert all(torch.equal(captured[key], kept[key]) for key in kept), "what was captured changes with the model"
    assert not torch.equal(captured["layers.0.twice", "exp_avg"], capture(model, optimizer)["layers.0.twice", "exp_avg"])


def test_capture_takes_numbers_exactly() -> None:
    layer = nn.Linear(2, 2, bias=False)
    optimizer = resident_reference(layer).optimizer(Numbers)
    optimizer.step()
    captured = capture(layer, optimizer)
    assert set(captured) == {"weight", ("weight", "count"), ("weight", "rate"), ("weight", "moment")}
    assert captured["weight", "count"].item() == 1
    assert captured["weight", "rate"].item() == 0.1
    assert captured["weight", "moment"].data_ptr() != layer.weight.data_ptr()
