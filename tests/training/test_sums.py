"""Gradients in the store, against plain tensors that are added up beside them: the same bits, stored and shown."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tierstore import TierStore
from tierstore.catalog import PAGE
from tierstore.training import attach, chunked_loss, gradients, running
from tierstore.training.gradients import Sum, Sums
from tierstore.training.leasing import Buffers
from tierstore.training.pieces import Piece
from tierstore.training.structure import Weight, WeightBlock

SHAPES = [(48, 40), (640,), (1,), (), (24, 3, 16), (0, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DEVICE_BYTES = 64 << 10


def a_block(name: str, kinds: list[tuple[int, int]]) -> WeightBlock:
    weights = [
        Weight(f"{name}.{number}", number, torch.Size(SHAPES[shape]), DTYPES[dtype], requires_grad=True)
        for number, (shape, dtype) in enumerate(kinds)
    ]
    block = WeightBlock(name, weights)
    for weight in weights:
        weight.block = block
    return block


def laid_out(value: Tensor, how: str) -> Tensor:
    """The same values, laid out in memory as `how` says."""
    if how == "transposed" and value.dim() > 1:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "shifted":
        return torch.cat([value.new_zeros(1), value.reshape(-1)])[1:].view(value.shape)
    if how == "strided":
        return torch.stack([value, value], -1)[..., 0]
    return value


@st.composite
def pieces_of(draw: st.DrawFn, weights: list[Weight]) -> list[list[Piece]]:
    """A way to have the weights in parts."""
    parts: list[list[Piece]] = [[]]
    for weight in weights:
        cuts = draw(st.lists(st.integers(1, max(1, weight.numel - 1)), max_size=3, unique=True)) if weight.numel > 3 else []
        bounds = [0, *sorted(cuts), weight.numel]
        ranges = list(itertools.pairwise(bounds))
        for start, stop in ranges:
            parts[-1].append(Piece(weight) if len(ranges) == 1 else Piece(weight, start, stop))
            if draw(st.booleans()):
                parts.append([])
    return [part for part in parts if part]


def values(weight: Weight, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + weight.index)
    return torch.randn(weight.shape, generator=generator).to(weight.dtype)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@given(data=st.data())
def test_sums_are_those_of_plain_tensors(data: st.DataObject) -> None:
    kinds = st.lists(st.tuples(st.integers(0, len(SHAPES) - 1), st.integers(0, len(DTYPES) - 1)), min_size=1, max_size=5)
    block = a_block("block", data.draw(kinds))
    with TierStore(DEVICE_BYTES, 256 << 10, device="cpu") as store:
        total = Sum(Buffers(store), block)
        total.cut(data.draw(pieces_of(block.weights)))
        expected: Sums = {}
        for seed in range(data.draw(st.integers(1, 3))):
            chosen = data.draw(st.lists(st.sampled_from(block.weights), unique=True))
            how = {weight: data.draw(st.sampled_from(["plain", "transposed", "shifted", "strided"])) for weight in chosen}
            given_sums = {weight: laid_out(values(weight, seed), how[weight]) for weight in chosen}
            for weight in chosen:
                value = values(weight, seed)
                expected[weight] = expected[weight] + value if weight in expected else value
            shown: Sums = {}

            def observe(totals: Sums, shown: Sums = shown) -> None:
                assert not shown.keys() & totals.keys(), "shown twice"
                assert all(each.is_contiguous() for each in totals.values()), "a norm would be summed in another order"
                shown.update({weight: each.clone() for weight, each in totals.items()})

            watched = data.draw(st.booleans())
            total.add(given_sums, observe if watched else None)
            assert total.present == expected.keys()
            assert shown.keys() == (set(chosen) if watched else set())
            for weight, value in shown.items():
                assert same(value, expected[weight])
        for weight in block.weights:
            found = total.read(weight)
            assert (found is None) == (weight not in expected)
            assert found is None or same(found, expected[weight])
        taken = total.take()
        assert taken.keys() == expected.keys()
        assert all(same(taken[weight], value) for weight, value in expected.items())
        assert not total.present


def test_of_more_than_fits() -> None:
    """Gradients that have left the device are added to, and shown, as those that are there."""
    blocks = [a_block(f"layer{number}", [(0, 0), (1, 0), (0, 0)]) for number in range(12)]
    with TemporaryDirectory() as directory, TierStore(DEVICE_BYTES, 96 << 10, Path(directory) / "swap", device="cpu") as store:
        buffers = Buffers(store)
        sums = {block: Sum(buffers, block) for block in blocks}
        for block, total in sums.items():
            first, second, third = block.weights
            total.cut([[Piece(first), Piece(second, 0, 128)], [Piece(second, 128, 640), Piece(third, 0, 960)], [Piece(third, 960, 1920)]])
        for seed in range(3):
            for block in reversed(blocks):
                shown: Sums = {}

                def observe(totals: Sums, shown: Sums = shown) -> None:
                    shown.update({weight: total.clone() for weight, total in totals.items()})

                sums[block].add({weight: values(weight, seed) for weight in block.weights}, observe)
                for weight in block.weights:
                    expected = values(weight, 0)
                    for other in range(1, seed + 1):
                        expected = expected + values(weight, other)
                    assert same(shown[weight], expected)
        assert sum(store.info(part.name).nbytes for total in sums.values() for part in total.parts) > 2 * DEVICE_BYTES
        stats = store.stats()
        assert stats.tiers["gpu"].evictions > 0
        assert stats.links["nvme_read"].bytes > 0


def two_parts(store: TierStore) -> tuple[Sum, Weight, Weight]:
    block = a_block("block", [(1, 1), (1, 1)])
    first, second = block.weights
    total = Sum(Buffers(store), block)
    total.cut([[Piece(first)], [Piece(second)]])
    return total, first, second


def test_parts_that_find_no_room_together_are_added_to_one_by_one() -> None:
    with TierStore(DEVICE_BYTES, 256 << 10, device="cpu") as store:
        total, first, second = two_parts(store)
        store.put("large", torch.zeros(DEVICE_BYTES - PAGE, dtype=torch.uint8))
        with store.use("large"):
            for seed in range(2):
                total.add({weight: values(weight, seed) for weight in (first, second)})
        for weight in (first, second):
            found = total.read(weight)
            assert found is not None
            assert same(found, values(weight, 0) + values(weight, 1))
        assert store.stats().tiers["gpu"].evictions > 0


def test_parts_of_one_lease_that_an_exception_leaves() -> None:
    """What held something keeps it; what was to be written whole has no content, and nobody thinks that it has."""

    def struck(totals: Sums) -> None:
        raise ValueError("struck")

    with TierStore(DEVICE_BYTES, 256 << 10, device="cpu") as store:
        total, first, second = two_parts(store)
        total.add({first: values(first, 0)})
        assert total.present == {first}
        with pytest.raises(ValueError, match="struck"):
            total.add({first: values(first, 1), second: values(second, 1)}, struck)
        assert total.present == {first}
        assert total.read(first) is not None
        total.erase()
        for seed in range(2):
            total.add({first: values(first, seed), second: values(second, seed)})
        for weight in (first, second):
            found = total.read(weight)
            assert found is not None
            assert same(found, values(weight, 0) + values(weight, 1))


def test_parts_of_a_block_share_a_lease_while_they_are_small() -> None:
    with TierStore(16 * DEVICE_BYTES, 32 * DEVICE_BYTES, device="cpu") as store:
        buffers = Buffers(store)
        block = a_block("block", [(0, 0), (1, 0), (0, 0)])
        total = Sum(buffers, block)
        total.cut([[Piece(weight, start, start + 128)] for weight in block.weights for start in range(0, weight.numel, 128)])
        leased: list[list[str]] = []
        lease_all = buffers.lease_all

        def noted(names: list[str], **options: Any) -> Any:
            leased.append(names)
            return lease_all(names, **options)

        with mock.patch.object(buffers, "lease_all", noted):
            total.add({weight: values(weight, 0) for weight in block.weights})
            assert leased == [[part.name for part in reversed(total.parts)]]
            leased.clear()
            with mock.patch.object(gradients, "TOGETHER", DEVICE_BYTES // 64):  # of so many times as much
                total.add({weight: values(weight, 1) for weight in block.weights})
        assert [len(names) for names in leased] == [2] * (len(total.parts) // 2) + [1] * (len(total.parts) % 2)
        assert [name for names in leased for name in names] == [part.name for part in reversed(total.parts)]


def test_where_a_leaf_is_itself_a_result_its_sum_still_comes_first() -> None:
    """A node of ours comes first by its number in the graph only; a leaf that is a result is given gradients before that."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(500, generator=generator, requires_grad=True)
    leaf, made = (weight, torch.ones(500)), (weight * 2, torch.ones(500))
    assert running._comes_first([made], [weight])
    assert not running._comes_first([made, leaf], [weight])
    total, first, second = (torch.randn(500, generator=generator) * scale for scale in (1.0, 1e3, 1e-3))
    (wanted,) = torch.autograd.grad([weight, weight, weight], [weight], [total, first, second])
    token: Tensor = running._Sums.apply([total.clone()], weight)  # type: ignore[no-untyped-call]
    (other,) = torch.autograd.grad([token, weight, weight], [weight], [token.detach(), first, second])
    assert not torch.equal(wanted, other), "nothing is shown"


@pytest.mark.parametrize("uses", [1, 2, 3])
def test_a_sum_is_added_to_use_by_use_and_in_place(uses: int) -> None:
    """As where the leaf is given the sum as a gradient. A copy of each sum was made for each micro-batch, of a whole layer at once."""
    generator = torch.Generator().manual_seed(uses)
    weight = torch.randn(32, 32, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    total: Tensor | None = None
    places: list[int] = []
    for number in range(5):
        x = torch.randn(7, 32, generator=generator, dtype=torch.bfloat16)
        for _ in range(uses):
            x = torch.nn.functional.linear(x, weight)
        roots, grads = [x], [torch.ones_like(x)]
        if total is None:
            (expected,) = torch.autograd.grad(roots, [weight], grads, retain_graph=True)
        else:
            (expected,) = torch.autograd.grad([weight, *roots], [weight], [total.clone(), *grads], retain_graph=True)
            sums, total = [total], None
            token: Tensor = running._Sums.apply(sums, weight)  # type: ignore[no-untyped-call]
            roots, grads = [token, *roots], [token.detach(), *grads]
        (total,) = torch.autograd.grad(roots, [weight], grads)
        assert torch.equal(total, expected), number
        places.append(total.data_ptr())
    assert len(set(places[1:])) == 1


def test_sums_stay_where_the_first_micro_batch_has_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear layer's gradient comes as a view. That of a head was copied by the second micro-batch: it lay there three times."""
    places: dict[str, list[int]] = {}
    follow = running.Call._follow

    def noted(self: Any, roots: Any, leaves: Any, sums: Any, *rest: Any) -> Any:
        found = follow(self, roots, leaves, sums, *rest)
        for weight, total in sums.items():
            places.setdefault(weight.name, []).append(total.data_ptr())
        return found

    monkeypatch.setattr(running.Call, "_follow", noted)
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.LayerNorm(32)), torch.nn.Linear(32, 64, bias=False))
    with TierStore(1 << 20, 1 << 22, tmp_path, device="cpu") as store:
        attach(model, store, [model[0]], micro_batch=2)
        chunked_loss(model[1], model[0](torch.randn(8, 32)), torch.zeros(8, dtype=torch.long), chunk=2).backward()
        store.commit()
    assert {name: len(found) for name, found in places.items()} == dict.fromkeys(places, 4)
    assert {"0.0.weight", "0.0.bias", "0.1.weight", "1.weight"} <= places.keys()
    assert all(len(set(found)) == 1 for found in places.values())


def test_a_gradient_that_is_negated_when_it_is_read_keeps_its_sign(tmp_path: Path) -> None:
    """Of a complex matrix made of two real parameters, one gradient comes as a view with its sign still to be turned."""
    lazy = torch.randn(3, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    assert torch.equal(running._without_base(lazy), lazy)
    parts = torch.randn(6).chunk(2)
    assert running._without_base(parts[0]) is parts[0], "all of the storage would live as long"

    class Complex(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.re, self.im = (torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x.to(torch.complex64) @ torch.complex(self.re, self.im).mH).abs()

    x = torch.randn(6, 8)
    for micro_batch in (None, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(Complex(), Complex())
        for rows in x.split(micro_batch or 6):
            model(rows).sum().backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        with TierStore(1 << 20, 1 << 22, tmp_path / str(micro_batch), device="cpu") as store:
            tiered = attach(model, store, list(model), micro_batch=micro_batch)
            model(x).sum().backward()
            for name, gradient in expected.items():
                assert gradient is not None
                found = tiered.gradient(name)
                assert found is not None
                torch.testing.assert_close(found, gradient)
