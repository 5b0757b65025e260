"""Updates in the backward pass, a part behind each micro-batch of the next layer: the same bits, in whatever order, and with errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.harness import Case, assert_same, assert_streamed, run_resident, run_streamed
from tierstore import TierStore
from tierstore.errors import CapacityError
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, attach

WIDTH, LAYERS, ROWS = 32, 6, 6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def training(
    path: Path, factory: type[torch.optim.Optimizer] = torch.optim.AdamW, *, gpu: int = 60_000, micro_batch: int = 2
) -> Iterator[tuple[TierStore, Any, Model, TieredOptimizer]]:
    torch.manual_seed(0)
    model = Model()
    with TierStore(gpu=gpu, ram=1 << 20, nvme=path, device="cpu") as store:
        tiered = attach(model, store, model.layers, micro_batch=micro_batch)
        yield store, tiered, model, TieredOptimizer(tiered, factory, lr=1e-2, when="backward")


def plain(steps: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model()
    optimizer = resident_reference(model, model.layers, micro_batch=2).optimizer(torch.optim.AdamW, lr=1e-2)
    for number in range(steps):
        step(model, optimizer, number)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def batch(number: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number))


def step(model: Model, optimizer: Any, number: int) -> None:
    model(batch(number)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(store: TierStore, tiered: Any) -> dict[str, Tensor]:
    return {name: tensor for block in tiered.structure.blocks for name, tensor in store.read(block.name).items()}  # type: ignore[union-attr]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_updates_are_made_behind_the_micro_batches_of_the_next_layer(tmp_path: Path, shares: list[tuple[str, int]]) -> None:
    with training(tmp_path) as (store, tiered, model, optimizer):
        step(model, optimizer, 0)
        of_layer = {name: [number for each, number in shares if each == name] for name, _ in shares}
        assert len(of_layer) == LAYERS
        chunks = {block.name: len(found) for block, found in optimizer._chunks.items()}
        assert min(chunks.values()) >= 3
        assert all(sum(of_layer[name]) == chunks[name] for name in chunks)
        assert [len(of_layer[f"layers.{number}"]) for number in range(LAYERS)] == [1] + [3] * (LAYERS - 1), "as many as micro-batches"
        assert not optimizer._pending
        assert not store.engine.unsettled
        for number in range(1, 4):
            step(model, optimizer, number)
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > 0
        assert stats.links["d2h"].bytes_by_kind["write-back"] > 0
        assert_equal(values(store, tiered), plain(4))


@pytest.mark.parametrize("precision", ["fp32", "master"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
def test_the_same_bits_as_with_everything_resident(tmp_path: Path, optimizer: str, precision: str) -> None:
    case = Case(optimizer=optimizer, options={"lr": 1e-2}, when="backward", micro_batch=1, precision=precision, steps=4)
    streamed, resident = run_streamed(case, tmp_path), run_resident(case)
    assert_same(streamed, resident)
    assert_streamed(streamed)


def test_held_weights_and_whole_batches_are_updated_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_off: list[str] = []
    monkeypatch.setattr(TieredOptimizer, "_put_off", lambda self, block, job: put_off.append(block.name))
    with training(tmp_path / "whole", micro_batch=ROWS) as (_, _, model, optimizer):
        step(model, optimizer, 0)
    with training(tmp_path / "held", gpu=200_000) as (store, tiered, model, optimizer):
        for block in tiered.structure.blocks:
            store.hold(block.name, "gpu")
        step(model, optimizer, 0)
    assert not put_off


def test_where_two_layers_have_no_room_the_update_comes_when_the_first_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = []
    update = TieredOptimizer._update

    def noted(self: Any, *arguments: Any) -> None:
        try:
            update(self, *arguments)
        except CapacityError as error:
            refused.append(error)
            raise

    waiting = []
    take = TieredOptimizer.take_gradients

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        rest = take(self, *arguments, **options)
        waiting.append(sum(job.given is not None for job in self._pending.values()))
        return rest

    monkeypatch.setattr(TieredOptimizer, "_update", noted)
    monkeypatch.setattr(TieredOptimizer, "take_gradients", counted)
    with training(tmp_path, gpu=24_576) as (store, tiered, model, optimizer):
        for number in range(3):
            step(model, optimizer, number)
        assert_equal(values(store, tiered), plain(3))
    assert refused, "both fitted"
    assert max(waiting) == 1, "the gradients of more than one layer wait"


def test_who_reads_weights_in_the_middle_of_a_backward_pass_finds_them_updated_or_not_begun(tmp_path: Path) -> None:
    """A hook of a layer, and another thread: what is put off is made first, as with `deferred`."""
    found: list[Tensor] = []
    with training(tmp_path) as (store, tiered, model, optimizer):

        def read(*_: object) -> None:
            name = f"layers.{LAYERS - 1}"
            if not found and name in store.engine.unsettled:
                thread = threading.Thread(target=lambda: found.append(store.read(name)[f"{name}.0.weight"]))  # type: ignore[call-overload]
                thread.start()
                thread.join(30)
                assert not thread.is_alive()

        model.layers[LAYERS - 3][1].register_full_backward_hook(read)
        model.layers[LAYERS - 2][1].register_full_backward_hook(read)
        step(model, optimizer, 0)
        expected = plain(1)
        assert_equal(values(store, tiered), expected)
    assert found, "nothing was put off when the hook was called"
    assert torch.equal(found[0], expected[f"layers.{LAYERS - 1}.0.weight"])


class Fails(torch.optim.AdamW):
    """One of its steps fails."""

    left = 10**9

    def step(self, closure: Any = None) -> Any:
        Fails.left -= 1
        if Fails.left == 0:
            raise RuntimeError("this step fails")
        return super().step(closure)


@pytest.mark.parametrize("number", [1, 4, 5, 8, 17])
def test_a_step_that_fails_half_way_loses_no_update_and_makes_none_twice(tmp_path: Path, number: int) -> None:
    with training(tmp_path, Fails) as (_, _, model, optimizer):
        step(model, optimizer, 0)
        before = {name: optimizer.state_of(name)["step"] for name, _ in model.named_parameters()}
        Fails.left = number
        with pytest.raises(RuntimeError, match="this step fails"):
            model(batch(1)).square().mean().backward()
        Fails.left = 10**9
        optimizer.step()
        optimizer.zero_grad()
        after = {name: optimizer.state_of(name)["step"] for name, _ in model.named_parameters()}
        assert all(after[name] - before[name] in (0, 1) for name in before)
        assert not optimizer._pending
        for more in range(2, 5):
            step(model, optimizer, more)
