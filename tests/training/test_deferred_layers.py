"""With `when="backward"`, layers that are updated in their next forward pass: the same bits, whoever looks when, and what is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.harness import Case, assert_same, assert_streamed, run_resident, run_streamed
from tierstore import TierStore
from tierstore.errors import OptionError, TrainingError
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer, attach

WIDTH, LAYERS, ROWS = 32, 6, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@contextmanager
def training(
    path: Path, deferred_layers: int = 2, *, gpu: int = 60_000, **more: Any
) -> Iterator[tuple[TierStore, Any, Model, TieredOptimizer]]:
    torch.manual_seed(0)
    model = Model()
    with TierStore(gpu=gpu, ram=1 << 20, nvme=path, device="cpu") as store:
        tiered = attach(model, store, model.layers, **more)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="backward", deferred_layers=deferred_layers)
        tiered.resume()
        yield store, tiered, model, optimizer


def plain(steps: int, **more: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model()
    optimizer = resident_reference(model, model.layers, **more).optimizer(torch.optim.AdamW, lr=1e-2)
    for number in range(steps):
        step(model, optimizer, number)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def step(model: Model, optimizer: Any, number: int) -> None:
    model(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(store: TierStore, tiered: Any) -> dict[str, Tensor]:
    return {name: tensor for block in tiered.structure.blocks for name, tensor in store.read(block.name).items()}  # type: ignore[union-attr]


def pending(optimizer: TieredOptimizer) -> list[str]:
    return sorted(block.name for block in optimizer._pending)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("count", "late"), [(1, [4]), (2, [1, 4]), (3, [0, 2, 4]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5])], ids=str)
def test_layers_evenly_spread_wait_for_their_next_forward_pass(tmp_path: Path, count: int, late: list[int]) -> None:
    with training(tmp_path, count) as (store, tiered, model, optimizer):
        for number in range(3):
            step(model, optimizer, number)
            assert pending(optimizer) == [f"layers.{number}" for number in late]
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > 0
        assert stats.links["d2h"].bytes_by_kind["write-back"] > 0
        assert_equal(values(store, tiered), plain(3))
        assert not optimizer._pending, "who reads what waits has it updated"


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("precision", ["fp32", "master"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
def test_the_same_bits_as_with_everything_resident(tmp_path: Path, optimizer: str, precision: str, micro_batch: int | None) -> None:
    case = Case(
        optimizer=optimizer,
        options={"lr": 1e-2},
        when="backward",
        deferred_layers=2,
        micro_batch=micro_batch,
        precision=precision,
        schedule="lambda",
        steps=4,
    )
    streamed, resident = run_streamed(case, tmp_path), run_resident(case)
    assert_same(streamed, resident)
    assert_streamed(streamed)


def test_streamed_layers_are_updated_behind_the_micro_batches_of_those_before(tmp_path: Path, shares: list[tuple[str, int]]) -> None:
    with training(tmp_path, micro_batch=1) as (store, tiered, model, optimizer):
        for number in (2, 3):
            model.layers[number][1].register_forward_hook(lambda *_: shares.append(("micro-batch", 0)))
        step(model, optimizer, 0)
        assert {block.name: len(found) for block, found in optimizer._chunks.items()}["layers.4"] == 3
        for number in range(1, 4):
            shares.clear()
            loss = model(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(number))).square().mean()
            assert [count for name, count in shares if name == "layers.1"] == [1, 1, 1], "behind those of the one layer before it"
            before = [
                [name for name, _ in shares[:place]].count("micro-batch") for place, (name, _) in enumerate(shares) if name == "layers.4"
            ]
            assert before == [1, 3, 6], "a third each of two layers of four micro-batches"
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > 0
        assert stats.links["d2h"].bytes_by_kind["write-back"] > 0
        assert_equal(values(store, tiered), plain(4, micro_batch=1))


def test_a_layer_called_out_of_turn_is_updated_all_the_same(tmp_path: Path, shares: list[tuple[str, int]]) -> None:
    with training(tmp_path, micro_batch=1) as (_, _, model, optimizer):
        step(model, optimizer, 0)
        shares.clear()
        model.layers[4](torch.randn(ROWS, WIDTH)).sum()  # before those behind which its update was to be made
        assert pending(optimizer) == ["layers.1"]
        model.layers[2](torch.randn(ROWS, WIDTH)).sum()
        assert pending(optimizer) == ["layers.1"], "its share was to be made behind another"
        assert [name for name, _ in shares] == ["layers.4"]


def test_where_two_layers_have_no_room_the_update_waits_for_the_turn_of_its_own(tmp_path: Path, shares: list[tuple[str, int]]) -> None:
    with training(tmp_path, micro_batch=1, gpu=24_576) as (store, tiered, model, optimizer):
        for number in range(3):
            shares.clear()
            step(model, optimizer, number)
        chunks = {block.name: len(found) for block, found in optimizer._chunks.items()}
        assert [count for name, count in shares if name == "layers.1"] == [chunks["layers.1"]]
        assert_equal(values(store, tiered), plain(3, micro_batch=1))


def test_held_layers_are_updated_at_once_when_it_is_their_turn(tmp_path: Path, shares: list[tuple[str, int]]) -> None:
    with training(tmp_path, micro_batch=1, gpu=200_000) as (store, tiered, model, optimizer):
        for block in tiered.structure.blocks:
            store.hold(block.name, "gpu")
        for number in range(2):
            shares.clear()
            step(model, optimizer, number)
        chunks = {block.name: len(found) for block, found in optimizer._chunks.items()}
        assert [count for name, count in shares if name == "layers.4"] == [chunks["layers.4"]]


def test_a_commit_has_them_updated_and_training_goes_on_from_it(tmp_path: Path) -> None:
    with training(tmp_path) as (store, _, model, optimizer):
        for number in range(3):
            step(model, optimizer, number)
        assert len(pending(optimizer)) == 2
        store.commit()
        assert not optimizer._pending
    with training(tmp_path) as (store, tiered, model, optimizer):
        for number in range(3, 5):
            step(model, optimizer, number)
        assert_equal(values(store, tiered), plain(5))


def test_an_evaluation_between_steps_sees_updated_weights(tmp_path: Path) -> None:
    x = torch.randn(ROWS, WIDTH)
    with training(tmp_path) as (_, _, model, optimizer):
        for number in range(2):
            step(model, optimizer, number)
            with torch.no_grad():
                found = model(x)
    torch.manual_seed(0)
    reference = Model()
    reference.load_state_dict(plain(2))
    assert torch.equal(found, reference(x))


def test_options_are_those_of_the_backward_pass(tmp_path: Path) -> None:
    """A schedule moves on between the backward pass and the update."""
    with training(tmp_path) as (store, tiered, model, optimizer):
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for number in range(3):
            step(model, optimizer, number)
            schedule.step()
        found = values(store, tiered)
    torch.manual_seed(0)
    reference = Model()
    plain_optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    plain_schedule = torch.optim.lr_scheduler.StepLR(plain_optimizer, 1, gamma=0.5)
    for number in range(3):
        step(reference, plain_optimizer, number)
        plain_schedule.step()
    assert_equal(found, {name: parameter.detach() for name, parameter in reference.named_parameters()})


def test_gradients_that_wait_are_let_go_of(tmp_path: Path) -> None:
    with training(tmp_path, 6) as (_, _, model, optimizer):
        step(model, optimizer, 0)
        waiting = [weakref.ref(grad) for job in optimizer._pending.values() for grad in (job.given or {}).values()]
        assert waiting
        with torch.no_grad():
            model(torch.randn(ROWS, WIDTH))
        gc.collect()
        assert all(grad() is None for grad in waiting)


def test_a_second_backward_pass_is_refused_as_before(tmp_path: Path) -> None:
    with training(tmp_path) as (_, _, model, optimizer):
        model(torch.randn(ROWS, WIDTH)).sum().backward()
        assert pending(optimizer) == ["layers.1", "layers.4"]
        with pytest.raises(TrainingError, match="second backward pass"):
            model(torch.randn(ROWS, WIDTH)).sum().backward()


@pytest.mark.parametrize("count", [-1, 1.5, True, "two", LAYERS + 1])
def test_what_is_no_number_of_layers_is_refused(tmp_path: Path, count: Any) -> None:
    with pytest.raises(OptionError, match="deferred_layers="), training(tmp_path, count):
        pass


@pytest.mark.parametrize("when", ["step", "deferred"])
def test_where_no_update_is_made_in_the_backward_pass_none_can_wait(tmp_path: Path, when: Any) -> None:
    model = Model()
    with TierStore(gpu=60_000, ram=1 << 20, nvme=tmp_path, device="cpu") as store:
        tiered = attach(model, store, model.layers)
        with pytest.raises(OptionError, match="deferred_layers="):
            TieredOptimizer(tiered, torch.optim.AdamW, when=when, deferred_layers=1)
