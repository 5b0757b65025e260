"""Starting and resuming are one script, and what comes back is what went in, to the bit."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training.harness import same
from tests.training.models import Language, Vision, batches
from tests.training.pair import Pair, opened, stack
from tierstore import TierStore
from tierstore.cli import main
from tierstore.errors import TensorError, TrainingError
from tierstore.training import Tiered, TieredOptimizer, attach, pieces
from tierstore.training import optimizer as optimizer_module
from tierstore.training.chunks import cut, even_share
from tierstore.training.packing import pack, unpack
from tierstore.training.state import read_state, write_state
from tierstore.training.structure import Weight, WeightBlock

pytestmark = pytest.mark.usefixtures("one_thread")


class Sampler:
    """Shuffles, and knows where it is."""

    def __init__(self) -> None:
        self.position = 0
        self.generator = torch.Generator().manual_seed(3)

    def next(self) -> int:
        self.position += 1
        return int(torch.randint(1000, (), generator=self.generator))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.get_state(), "rate": float("inf"), "seen": {1, 2}, "pair": (1, None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["rate"] == float("inf")
        assert state["seen"] == {1, 2}
        assert state["pair"] == (1, None)
        self.position = state["position"]
        self.generator.set_state(state["generator"])


def dropout_language() -> nn.Module:
    return Language(3, dropout=0.2)


@dataclass
class Script:
    """One training script: the same whether it begins or goes on.

    Attributes:
        losses: By step.
    """

    directory: Path
    make: Callable[[], nn.Module] = dropout_language
    data: str = "language"
    factory: Any = torch.optim.AdamW
    when: str = "deferred"
    master: bool = False
    gpu: int | str = "4MB"
    wait: bool = True
    accumulation: int = 2
    commit_within: bool = False
    seed: int = 0
    losses: dict[int, float] = field(default_factory=dict)

    def run(self, steps: int) -> dict[str, Tensor]:
        """Go on from the last commit until so many steps are done. Returns weights, buffers and state."""
        dtype = torch.bfloat16 if self.master else torch.float32
        torch.manual_seed(self.seed)  # another one each time: what is resumed must not depend on it
        random.seed(self.seed)
        np.random.seed(self.seed)
        self.seed += 1
        model = self.make().to(dtype)
        with TierStore(self.gpu, "16MB", self.directory, device="cpu") as store:
            tiered = attach(model, store)
            optimizer = TieredOptimizer(
                tiered,
                self.factory,
                lr=1e-2,
                when=self.when,  # type: ignore[arg-type]
                master_dtype=torch.float32 if self.master else None,
                params=[{"params": ["*bias"], "lr": 3e-2}, {"params": [n for n, p in model.named_parameters() if not n.endswith("bias")]}],
            )
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 2e-2], total_steps=20, cycle_momentum=False)
            sampler = Sampler()
            random.seed(11)
            np.random.seed(11)
            torch.manual_seed(11)
            done = tiered.resume(scheduler=scheduler, sampler=sampler) or {"step": 0, "part": 0}
            step, part = done["step"], done["part"]
            while step < steps:
                while part < self.accumulation:
                    self._accumulate(model, sampler, step, part)
                    part += 1
                    if self.commit_within:
                        self._commit(store, step, part)
                part = 0
                if self.when != "backward":
                    optimizer.clip_grad_norm_(0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
                self._commit(store, step, 0)
            return self.state(model, tiered, optimizer)

    def _accumulate(self, model: nn.Module, sampler: Sampler, step: int, part: int) -> None:
        inputs, targets = next(batches(self.data, 1, 4, seed=sampler.next()))
        if inputs.is_floating_point():
            inputs = inputs.to(torch.bfloat16 if self.master else torch.float32)
        loss = model(inputs, targets)
        loss.backward()
        self.losses[step * self.accumulation + part] = loss.item() + random.random() + float(np.random.rand())

    def _commit(self, store: TierStore, step: int, part: int) -> None:
        handle = store.commit({"step": step, "part": part}, wait=self.wait)
        if not isinstance(handle, int):
            handle.result()

    @staticmethod
    def state(model: nn.Module, tiered: Tiered, optimizer: TieredOptimizer) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.update({f"{name}/{key}": torch.as_tensor(value) for key, value in optimizer.state_of(name).items()})
        for group in optimizer.param_groups:
            found.update({f"group {len(found)} {key}": torch.tensor(value) for key, value in group.items() if type(value) is float})
        model = tiered.detach()
        found.update({name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]})
        return found


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name, value in one.items() if not same(value, other[name])]
    assert not different, different


class Scaled(nn.Module):
    """What the model owns itself is one number, in a block and a chunk of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.out = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(self.out(x * self.scale), targets)


WAYS: dict[str, dict[str, Any]] = {
    "deferred": {},
    "step": {"when": "step"},
    "backward": {"when": "backward", "accumulation": 1},
    "masters": {"master": True},
    "not waited for": {"wait": False},
    "batch norm": {"make": Vision, "data": "vision"},
    "within accumulation": {"commit_within": True, "accumulation": 3},
    "within accumulation, masters": {"commit_within": True, "accumulation": 3, "master": True},
    "a state of two kinds": {"factory": torch.optim.Adafactor},
    "numbers in groups": {"factory": torch.optim.ASGD},
    "state of one element, made with the optimizer": {"make": Scaled, "data": "stack", "factory": torch.optim.Adagrad},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_script_begun_and_resumed_is_one_that_ran_through(way: str, tmp_path: Path) -> None:
    options = WAYS[way]
    whole = Script(tmp_path / "whole", **options)
    expected = whole.run(4)
    parts = Script(tmp_path / "parts", **options)
    for steps in (1, 2, 4):
        state = parts.run(steps)
    assert parts.losses == whole.losses
    assert_same_state(state, expected)
    assert any("/" in name for name in state)


SMALL, LARGER = 96 << 10, 160 << 10


class Wide(nn.Module):
    """Parameters that a small device cuts into ranges, one of a few elements, and one that is not used at first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.into = nn.Linear(8, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
        self.table = nn.Embedding(65, 64)
        self.long = nn.Parameter(torch.randn(2049))
        self.unused = nn.Linear(2, 2)
        self.out = nn.Linear(64, 4)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.into(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = x + self.table(torch.arange(len(x)) % 65) * self.long.sum()
        return F.mse_loss(self.out(x).float(), targets)


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize(("first", "then"), [("4MB", SMALL), (SMALL, "4MB"), (SMALL, LARGER)])
@pytest.mark.parametrize("master", [False, True])
def test_resumed_with_another_budget_state_is_cut_anew(
    first: int | str, then: int | str, factory: Any, master: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of accumulation, too: gradients are in the same pieces as state."""
    options: dict[str, Any] = {"make": Wide, "data": "stack", "commit_within": True, "factory": factory, "master": master}
    whole = Script(tmp_path / "whole", **options)
    expected = whole.run(3)
    script = Script(tmp_path / "parts", gpu=first, **options)
    with monkeypatch.context() as patch:
        accumulate = Script._accumulate

        def stop(self: Script, model: nn.Module, sampler: Sampler, step: int, part: int) -> None:
            if (step, part) == (1, 1):
                raise KeyboardInterrupt
            accumulate(self, model, sampler, step, part)

        patch.setattr(Script, "_accumulate", stop)
        with pytest.raises(KeyboardInterrupt):
            script.run(3)
    script.gpu = then
    with TierStore("4MB", "16MB", tmp_path / "parts", device="cpu") as store:
        before = {name for name in store if name.startswith(("optimizer/", "gradients/"))}
    state = script.run(3)
    assert script.losses == whole.losses
    assert_same_state(state, expected)
    with TierStore("4MB", "16MB", tmp_path / "parts", device="cpu") as store:
        after = {name for name in store if name.startswith(("optimizer/", "gradients/"))}
        known = json.loads(bytes(read_state(store)["json"].numpy()))
        owned = {name for chunk in known["optimizers"]["0"]["chunks"].values() for name in chunk["blocks"]}
        assert {name for name in after if name.startswith("optimizer/")} == owned, "blocks of the former cut are still there"
    if factory is not torch.optim.Adafactor:
        assert before != after, "the budgets cut alike: this test shows nothing"


def test_no_range_is_a_single_element(tmp_path: Path) -> None:
    """Its state could not be told from a number, such as the count of steps."""
    with opened() as store:
        pair = Pair(store, Wide)
        weight = next(weight for weight in pair.tiered.structure.weights if weight.name == "long")
        for limit in range(64 * 8, 2100 * 8, 64 * 8):
            ranges = cut(weight.block, [weight], lambda _: 8.0, limit, ranges=[weight])
            bounds = [pieces.bounds(piece) for chunk in ranges for piece in chunk]
            assert bounds[0][0] == 0
            assert bounds[-1][1] == 2049
            assert all(one[1] == other[0] and one[1] % 64 == 0 for one, other in pairwise(bounds))
            assert min(stop - start for start, stop in bounds) > 1


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.booleans()), min_size=1, max_size=6),
    st.integers(1, 60),
    st.sampled_from([4.0, 8.0, 12.0]),
)
def test_chunks_are_filled(sizes: list[tuple[int, bool]], units: int, each: float) -> None:
    """Each is as long as may be, so that they take each other's places; every element is in one of them, in order."""
    limit = int(units * 64 * each)
    weights = [Weight(f"w{number}", number, torch.Size([numel]), torch.float32, True) for number, (numel, _) in enumerate(sizes)]
    ranges = [weight for weight, (_, may_cut) in zip(weights, sizes, strict=True) if may_cut]
    chunks = cut(WeightBlock("block", weights), weights, lambda _: each, limit, ranges=ranges)
    pieces_in_order = [piece for chunk in chunks for piece in chunk]
    for weight in weights:
        bounds = [pieces.bounds(piece) for piece in pieces_in_order if piece.weight is weight]
        assert [bounds[0][0], *(stop for _, stop in bounds)] == [*(start for start, _ in bounds), weight.numel]
    assert [piece.weight.index for piece in pieces_in_order] == sorted(piece.weight.index for piece in pieces_in_order)
    taken = [sum(piece.numel for piece in chunk) * each for chunk in chunks]
    for number, chunk in enumerate(chunks):
        last = chunk[-1].weight
        if len(chunk) > 1 or last in ranges:
            assert taken[number] <= limit + each, "one element more than fits, where it would be alone"
        if number + 1 < len(chunks) and chunks[number + 1][0].weight in ranges:
            assert taken[number] > limit - 2 * 64 * each, "room was left that the next weight could have filled"


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(20, 200), st.sampled_from([4.0, 8.0, 12.0]))
def test_chunks_are_even(rows: list[int], units: int, each: float) -> None:
    """Of the kind of block that most bytes are in: their sizes differ by a range's step at most."""
    limit = int(units * 64 * each)
    weights = [Weight(f"w{number}", number, torch.Size([64 * count]), torch.float32, True) for number, count in enumerate(rows)]
    size = sum(weight.numel for weight in weights) * each
    share = even_share([size, size, size / 2], limit, 64 * each)
    chunks = cut(WeightBlock("block", weights), weights, lambda _: each, limit, ranges=weights, share_bytes=share)
    taken = [sum(piece.numel for piece in chunk) * each for chunk in chunks]
    assert max(taken) <= limit
    assert max(taken) - min(taken) <= 64 * each
    assert len(chunks) <= size / (limit - 64 * each) + 1, "no more of them than it takes"


def test_cutting_anew_holds_no_more_than_a_chunk_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from outside: what is read from the store and kept, and what is put back."""
    options: dict[str, Any] = {"make": Wide, "data": "stack"}
    Script(tmp_path / "swap", gpu=SMALL, **options).run(1)
    largest = [0]
    gather = pieces.gather

    def watched(store: TierStore, *args: Any) -> Any:
        found = gather(store, *args)
        largest.append(sum(value.numel() * value.element_size() for value in found.values()))
        return found

    monkeypatch.setattr(optimizer_module, "gather", watched)
    Script(tmp_path / "swap", gpu=LARGER, **options).run(2)
    assert 0 < max(largest) <= LARGER // 8 + 64 * 8, "one new chunk"


def test_gradients_and_their_none_flags_come_back(tmp_path: Path) -> None:
    with opened(tmp_path / "swap") as store:
        pair = Pair(store, Wide)
        pair.backward()
        pair.backward()
        expected = {name: pair.tiered.gradient(name) for name, _ in pair.plain.named_parameters()}
        pair.assert_same_gradients()
        store.commit()
        assert expected["unused.weight"] is None
    with opened(tmp_path / "swap") as store:
        again = Wide()
        tiered = attach(again, store)
        for name, value in expected.items():
            mine = tiered.gradient(name)
            assert (mine is None) == (value is None), name
            assert mine is None or same(mine, value), name
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        tiered.resume()
        optimizer.step()
        optimizer.zero_grad()
        pair.other.step()
        for name, parameter in pair.plain.named_parameters():
            block = next(weight.block for weight in tiered.structure.weights if weight.name == name)
            assert same(store.read(block.name)[name], parameter.detach()), name  # type: ignore[call-overload, index]


@pytest.mark.parametrize("master", [False, True])
def test_what_was_clipped_is_clipped_after_resuming(master: bool, tmp_path: Path) -> None:
    with opened(tmp_path / "swap") as store:
        pair = Pair(store, master=master)
        pair.backward()
        pair.clip(0.01)
        store.commit()
    with opened(tmp_path / "swap") as store:
        pair.store, pair.model = store, stack().to(pair.dtype)
        pair.tiered = attach(pair.model, store)
        masters = torch.float32 if master else None
        pair.optimizer = TieredOptimizer(pair.tiered, torch.optim.AdamW, lr=1e-2, master_dtype=masters)
        pair.tiered.resume()
        pair.step()
        pair.zero_grad()
        pair.assert_same()
        pair.assert_usable()


def test_a_commit_carries_out_what_was_put_off(tmp_path: Path) -> None:
    with opened(tmp_path / "swap") as store:
        pair = Pair(store)
        pair.advance()
        pair.backward()
        pair.step()
        assert pair.optimizer._pending
        handle = store.commit(wait=False)
        assert not pair.optimizer._pending
        assert not isinstance(handle, int)
        handle.result()
        pair.zero_grad()
    with opened(tmp_path / "swap") as store:
        pair.store, pair.model = store, stack()
        pair.tiered = attach(pair.model, store)
        pair.optimizer = TieredOptimizer(pair.tiered, torch.optim.AdamW, lr=1e-2)
        pair.tiered.resume()
        pair.optimizer.zero_grad()  # gradients were still there when it was committed
        pair.assert_usable()


def test_gradients_erased_right_behind_a_commit_are_in_it(tmp_path: Path) -> None:
    """The state is that of the call."""
    with opened(tmp_path / "swap") as store:
        pair = Pair(store)
        pair.backward()
        handle = store.commit(wait=False)
        pair.optimizer.zero_grad()
        assert not isinstance(handle, int)
        handle.result()
    with opened(tmp_path / "swap") as store:
        pair.tiered = attach(stack(), store)
        pair.assert_same_gradients()


def test_models_never_whole_take_the_commit_too(tmp_path: Path) -> None:
    first = Script(tmp_path / "swap", make=stack, data="stack")
    first.run(2)

    def empty() -> nn.Module:
        with torch.device("meta"):
            return stack()

    expected = Script(tmp_path / "other", make=stack, data="stack").run(3)
    first.make = empty
    assert_same_state(first.run(3), expected)


def test_resuming_behind_a_step(tmp_path: Path) -> None:
    """Schedules and random numbers would be set back in the middle of the run."""
    for run in range(2):
        with opened(tmp_path) as store:
            tiered = attach(stack(), store)
            optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
            optimizer.step()
            with pytest.raises(TrainingError, match=r"resume\(\) after a step"):
                tiered.resume()
            store.commit({"step": run})


def test_a_commit_without_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is one to go on from; but where the loop was, nobody knows."""
    for expected in (None, {}):
        with opened(tmp_path) as store:
            tiered = attach(stack(), store)
            optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
            assert tiered.resume() == expected
            optimizer.step()
            store.commit()
    assert caplog.text.count("no metadata") == 1


# -- what does not fit is refused by name ----------------------------------------------------------------------------------


def committed(path: Path, make: Callable[[], nn.Module] = stack, factory: Any = torch.optim.AdamW, **options: Any) -> None:
    with opened(path) as store:
        tiered = attach(make(), store)
        optimizer = TieredOptimizer(tiered, factory, lr=1e-2, **options)
        tiered.resume(scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3))
        tiered.model(*next(batches("stack", 1, 4))).backward()
        optimizer.step()
        store.commit({"step": 1})


class Other(nn.Module):
    def __init__(self, width: int = 32, layers: int = 3, frozen: bool = False) -> None:
        super().__init__()
        model: Any = stack()
        self.into, self.layers, self.out = model.into, model.layers[:layers], nn.Linear(width, 4)
        self.layers.requires_grad_(not frozen)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros(())


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    committed(tmp_path / "swap")
    with opened(tmp_path / "swap") as store:
        before = sorted(store)
        with pytest.raises(TensorError, match=r"'out' of the store does not fit the model.*out\.weight.*\(4, 16\).*\(4, 32\)"):
            attach(Other(width=16), store)
        with pytest.raises(TensorError, match=r"'layers\.0'.*frozen"):
            attach(Other(frozen=True), store)
        with pytest.raises(TensorError, match="does not fit the model"):
            attach(stack().double(), store)
        with pytest.raises(TensorError, match=r"of another model, or of other layers.*'into'"):
            attach(nn.Sequential(stack()), store)
        with pytest.raises(TensorError, match=r"of another model, or of other layers.*'layers\.2'"):
            attach(Other(layers=2), store)
        with pytest.raises(TensorError, match=r"layers.*'layers\.0'"):
            attach(stack(), store, layers="layers.*.up")
        assert sorted(store) == before
        tiered = attach(stack(), store)  # and it is whole still
        TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)


def test_an_optimizer_that_does_not_fit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    committed(tmp_path / "swap")
    with opened(tmp_path / "swap") as store:
        before = sorted(store)
        tiered = attach(stack(), store)
        with pytest.raises(TrainingError, match=r"another optimizer '0'; needed SGD.*found AdamW|needed SGD.*have AdamW"):
            TieredOptimizer(tiered, torch.optim.SGD, lr=1e-2)
        assert not tiered.optimizers
        with pytest.raises(TrainingError, match=r"masters torch\.float64"):
            TieredOptimizer(tiered, torch.optim.AdamW, master_dtype=torch.float64)
        with pytest.raises(TrainingError, match=r"one has 'into\.bias'"):
            TieredOptimizer(tiered, torch.optim.AdamW, params=["layers.*"])
        assert sorted(store) == before
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        for objects in ({}, {"schedule": torch.optim.lr_scheduler.StepLR(optimizer, 3)}):
            with pytest.raises(TrainingError, match=r"the commit has the state of other objects.*scheduler"):
                tiered.resume(**objects)
        with pytest.raises(TrainingError, match="no state_dict"):
            tiered.resume(scheduler=object())
        assert tiered.resume(scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3)) == {"step": 1}
        with caplog.at_level(logging.WARNING, "tierstore"):
            tiered.detach()
    with opened(tmp_path / "swap") as store:
        tiered = attach(stack(), store)
        with caplog.at_level(logging.WARNING, "tierstore"):
            optimizer = TieredOptimizer(tiered, torch.optim.SGD, lr=1e-2, name="another")
            assert "it begins anew" in caplog.text
            tiered.model(*next(batches("stack", 1, 4))).backward()
            optimizer.step()
        assert "tiered.resume() was not called" in caplog.text


# -- data, never code ------------------------------------------------------------------------------------------------------


def test_what_is_packed_comes_back_equal() -> None:
    tensors: dict[str, Tensor] = {}
    value = {
        "numbers": [1, -(2**80), 0.1, float("inf"), float("-inf"), -0.0, True, None],
        ("a", 1): deque([1, 2]),
        "sets": (frozenset({1}), {2}, torch.Size([1, 2])),
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("aab"),
        "bytes": b"\x00\xff",
        "dtype": torch.bfloat16,
        "tensors": [torch.arange(3), torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([True]), torch.zeros(0, 3)],
        "arrays": [np.arange(3, dtype=np.uint32), np.float64(0.1), np.array(3, dtype=">i4"), np.zeros((2, 0))],
        "text": "\u2028 \U0001f600 \u0000",
    }
    packed = json.loads(json.dumps(pack(value, tensors), allow_nan=False))
    again = unpack(packed, tensors, torch.device("cpu"))
    assert list(map(repr, again)) == list(map(repr, value))
    for key in value:
        mine, theirs = again[key], value[key]
        if key in ("tensors", "arrays"):
            assert [(type(a), a.dtype, a.shape) for a in mine] == [(type(a), a.dtype, a.shape) for a in theirs]
            assert all(bool((torch.as_tensor(a.tolist()) == torch.as_tensor(b.tolist())).all()) for a, b in zip(mine, theirs, strict=True))
        else:
            assert (type(mine), repr(mine)) == (type(theirs), repr(theirs))


@pytest.mark.parametrize("value", [object(), lambda: None, print, type, nn.Linear(1, 1), 1j, range(3), Path("x")])
def test_what_is_no_data_is_refused(value: object) -> None:
    with pytest.raises(TrainingError, match="cannot be saved as data"):
        pack({"a": [value]}, {})


HOSTILE: list[Any] = [
    {"dtype": "load"},
    {"dtype": "ops"},
    {"dtype": "__builtins__"},
    {"dtype": "float32.__class__"},
    {"dtype": 3},
    {"number": 1, "dtype": "load", "shape": [], "device": "cpu"},
    {"number": 1, "dtype": "compile", "shape": [], "device": "cpu"},
    {"number": {"list": []}, "dtype": "float32", "shape": [1 << 40], "device": "cpu"},
    {"array": "0", "dtype": "O", "shape": [1], "scalar": False},
    {"array": "0", "dtype": "|O8", "shape": [1], "scalar": True},
    {"array": "0", "dtype": "V8", "shape": [1 << 50], "scalar": False},
    {"array": "0", "dtype": "S3", "shape": [1], "scalar": False},
    {"array": "none", "dtype": "<f4", "shape": [1], "scalar": False},
    {"tensor": "none", "device": "cpu"},
    {"tensor": {"list": []}, "device": "cpu"},
    {"bytes": "%%%"},
    {"bytes": 7},
    {"float": "__import__('os')"},
    {"float": {"list": []}},
    {"list": 7},
    {"dict": [[1]]},
    {"dict": [[{"list": []}, 1]]},
    {"set": [{"list": []}]},
    {"counter": 3},
    {"py/object": "os.system"},
    {"__reduce__": ["os.system", ["false"]]},
    {},
    {"size": ["a"]},
    [1, 2],
]


@pytest.mark.parametrize("packed", HOSTILE, ids=lambda value: json.dumps(value)[:40])
def test_hostile_json_is_refused_and_nothing_of_it_runs(packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"0": torch.zeros(8, dtype=torch.uint8)}
    for name in ("load", "compile"):
        monkeypatch.setattr(torch, name, lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(TensorError, match="training/state"):
        unpack(packed, tensors, torch.device("cpu"))


def test_a_damaged_state_is_refused_when_it_is_attached(tmp_path: Path) -> None:
    committed(tmp_path / "swap")
    damages: list[Callable[[dict[str, Any]], object]] = [
        lambda state: state.pop("optimizers"),
        lambda state: state.update(version=99),
        lambda state: state.update(buffers={"nothing": {"tensor": "0", "device": "cpu"}}),
        lambda state: state.update(gradients=3),
        lambda state: state.update(gradients={"gradients/out": ["nothing"]}),
        lambda state: state["optimizers"]["0"]["chunks"].clear(),
        lambda state: next(iter(state["optimizers"]["0"]["chunks"].values())).pop("pieces"),
        lambda state: next(iter(state["optimizers"]["0"]["chunks"].values())).update(blocks=["missing"]),
        lambda state: state.pop("random"),
    ]
    for damage in damages:
        with opened(tmp_path / "swap") as store:
            stored = read_state(store)
            state = json.loads(bytes(stored["json"].numpy()))
            damage(state)
            stored["json"] = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
            write_state(store, stored)
            with pytest.raises((TensorError, TrainingError)):
                tiered = attach(stack(), store)
                optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
                tiered.resume(scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3))


# -- export ----------------------------------------------------------------------------------------------------------------


def test_weights_are_exported_without_state(tmp_path: Path) -> None:
    model = Language(3)
    with opened(tmp_path / "swap") as store:
        tiered = attach(model, store)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        inputs, targets = next(batches("language", 1, 4))
        model(inputs, targets).backward()
        optimizer.step()
        model(inputs, targets).backward()
        store.commit()
        tiered.detach()
    result = CliRunner().invoke(main, ["export", str(tmp_path / "swap"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    loaded: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        loaded.update(load_file(tmp_path / "out" / file))
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert loaded.keys() == expected.keys(), "shared weights once, no state"
    assert all(same(loaded[name], value) for name, value in expected.items())
    fresh = Language(3)
    missing, unexpected = fresh.load_state_dict(loaded, strict=False)
    assert missing == ["head.weight"]  # tied
    assert not unexpected
    fresh.eval(), model.eval()
    assert same(fresh(inputs, targets).detach(), model(inputs, targets).detach())
