"""Inputs of layers that wait in the store for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tierstore import TierStore
from tierstore.errors import CapacityError
from tierstore.training import Tiered, activations, attach


def assert_gradients(tiered: Tiered, wanted: Mapping[str, Tensor | None]) -> None:
    for name, want in wanted.items():
        grad = tiered.gradient(name)
        assert grad is not None
        assert want is not None
        assert torch.equal(grad, want), name


@pytest.mark.parametrize("tier", ["ram", "nvme"])
def test_inputs_that_come_to_lie_where_others_lay(tier: str, tmp_path: Path) -> None:
    """An input in the store is let go on the device, and the next one may lie at the same address: they were taken for the same."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.Tanh()) for _ in range(12)])
    x = torch.randn(128, 128)
    resident = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), resident, strict=True)), (x,)).square().sum().backward()
    with TierStore(gpu=300_000, ram=4_000_000, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model), activations=tier)  # type: ignore[arg-type]
        model(x).square().sum().backward()
        assert any(name.startswith("activations/") for name in store)
        names = [weight.name for weight in tiered.structure.weights]
        assert_gradients(tiered, {name: parameter.grad for name, parameter in zip(names, resident, strict=True)})
        tiered.detach()


class Behind(nn.Module):
    """Gives its layers what begins in the middle of other memory, and not where a vector may begin."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(37, 37), nn.Tanh()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[1:]
        return x


@pytest.mark.parametrize("twice", [False, True])
def test_an_input_comes_back_to_such_a_place_as_it_was_in(
    twice: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a tensor begins decides how its products are summed."""
    monkeypatch.setattr(activations, "SMALL", 0)
    torch.manual_seed(0)
    model = Behind()
    plain = copy.deepcopy(model).to(device)
    x = torch.randn(12, 37)
    places: list[list[int]] = [[], []]
    for number, each in enumerate((model, plain)):
        for layer in each.layers:
            layer[0].register_forward_pre_hook(lambda _, args, to=places[number]: to.append(args[0].data_ptr() % 64))  # type: ignore[misc, index]
    loss = plain(x.to(device)).square().sum()
    loss.backward(retain_graph=twice)
    if twice:
        loss.backward()
    with TierStore(gpu=100_000, ram=1_000_000, nvme=tmp_path, device=device) as store:
        tiered = attach(model, store, list(model.layers), activations="ram")
        loss = model(x.to(device)).square().sum()
        loss.backward(retain_graph=twice)
        if twice:
            loss.backward()
        assert any(places[1][1:]), "all of them begin where a vector may"
        assert places[0] == [*places[1], *(places[1][::-1] * (1 + twice))]
        assert_gradients(tiered, {name: parameter.grad for name, parameter in plain.named_parameters()})
        tiered.detach()


def wide(rows: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)]), torch.randn(rows, 64)


@pytest.mark.parametrize("tier", ["ram", "nvme"])
def test_an_input_larger_than_the_device(tier: str, device: str, tmp_path: Path) -> None:
    """It waits in several blocks, and comes back through as much device memory as there is."""
    model, x = wide(1001)
    plain = copy.deepcopy(model).to(device)
    plain(x.to(device)).square().sum().backward()
    with TierStore(gpu=50_000, ram=4_000_000, nvme=tmp_path, device=device) as store:
        tiered = attach(model, store, list(model), activations=tier)  # type: ignore[arg-type]
        for _ in range(2):
            model.zero_grad()
            model(x.to(device)).square().sum().backward()
            kept = [store.info(name).nbytes for name in store if name.startswith("activations/")]
            assert max(kept) < 50_000 < x.nbytes < sum(kept) / 4
        assert_gradients(tiered, {name: parameter.grad for name, parameter in plain.named_parameters()})
        tiered.detach()


def test_inputs_for_which_there_is_no_room(tmp_path: Path) -> None:
    """The part that had been kept is given up, and fewer rows can be trained with."""
    model, x = wide(1001)
    with TierStore(gpu=50_000, ram=700_000, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, list(model), activations="ram")
        for _ in range(3):
            with pytest.raises(CapacityError, match="the inputs of layers do not fit"):
                model(x)
            number = sum(name.startswith("activations/") for name in store)
        model(x[:400]).square().sum().backward()
        assert sum(name.startswith("activations/") for name in store) <= 2 * number
        tiered.gradient("0.0.weight")
        assert not [name for name in store if name.startswith("activations/") and store.info(name).tiers]
        tiered.detach()


class Neighbours(nn.Module):
    """Adds up what a graph, given as a sparse matrix, connects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return torch.tanh(self.linear(graph @ x))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs_stay_on_the_device(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed one has no strides to ask for."""
    monkeypatch.setattr(activations, "SMALL", 0)
    torch.manual_seed(0)
    layers = nn.ModuleList([Neighbours() for _ in range(3)])
    plain = copy.deepcopy(layers)
    graph = (torch.rand(64, 64) < 0.1).float()
    graph = graph.to_sparse() if layout == "coo" else graph.to_sparse_csr()
    x = torch.randn(64, 32)
    with TierStore(gpu=100_000, ram=1_000_000, nvme=tmp_path, device="cpu") as store:
        tiered = attach(layers, store, list(layers), activations="ram")
        for model in (plain, layers):
            y = x
            for layer in model:
                y = layer(y, graph)
            y.square().sum().backward()
        assert any(name.startswith("activations/") for name in store)
        assert_gradients(tiered, {name: parameter.grad for name, parameter in plain.named_parameters()})
        tiered.detach()
