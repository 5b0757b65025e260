"""Models attached to blocks that lie in their own files: trained and run bit for bit as in plain torch, and the files stay as they are."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.training.models import Mlp
from tierstore import TierStore
from tierstore.errors import TensorError
from tierstore.training import TieredOptimizer, attach

WIDTH, DEPTH, VOCABULARY = 32, 12, 64


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Mlp(WIDTH) for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = self.head(x)
        return result


def made(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model()


def batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randint(VOCABULARY, (4, 9), generator=generator), torch.randint(VOCABULARY, (36,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, store: TierStore | None = None, *, skip: int = 0, steps: int = 4) -> None:
    for number, (tokens, targets) in enumerate(batches(steps)):
        if number < skip:
            continue
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if store is not None:
            store.commit({"step": number + 1})


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A model as another program saves it: tensors sorted, nothing aligned."""
    path = tmp_path / "model.safetensors"
    save_file(made(0).state_dict(), path)
    before = path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()
    yield path
    assert (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) == before


def open_store(swap: Path | None, ram: str = "400KB") -> TierStore:
    """The parameters take 270 KB, with gradients and AdamW's state 1 MB; the device holds less than half of the parameters."""
    return TierStore("120KB", ram, swap, device="cpu")


def assert_streamed(store: TierStore) -> None:
    stats = store.stats()
    assert stats.tiers["gpu"].evictions > DEPTH
    assert stats.links["nvme_read"].transfers > DEPTH
    assert stats.models.requests > DEPTH


def assert_equal(model: nn.Module, reference: nn.Module) -> None:
    found, expected = model.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_training_begins_with_the_files_values_and_goes_on_from_a_commit(tmp_path: Path, file: Path) -> None:
    reference = made(0)
    train(reference, torch.optim.AdamW(reference.parameters(), lr=1e-2))
    with open_store(tmp_path / "swap") as store:
        store.adopt(file)
        model = made(1)  # other values, which count for nothing
        tiered = attach(model, store, layers=model.layers)
        assert not tiered.resumed, "nothing was trained yet"
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        assert tiered.resume() is None
        train(model, optimizer, store, steps=2)
        assert_streamed(store)
    with open_store(tmp_path / "swap") as store:
        assert not any(store.info(name).adopted for name in store if "/" not in name)
        model = made(2)
        tiered = attach(model, store, layers=model.layers)
        assert tiered.resumed
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2)
        assert tiered.resume() == {"step": 2}
        train(model, optimizer, store, skip=2)
        assert_equal(tiered.detach(), reference)


@pytest.mark.parametrize("tiers", ["two tiers", "three tiers"])
def test_frozen_parameters_stay_in_their_file(tmp_path: Path, file: Path, tiers: str) -> None:
    """Layers are streamed from the file and never written; the head is trained."""
    reference = made(0)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    model = copy.deepcopy(reference)
    train(reference, torch.optim.AdamW(reference.head.parameters(), lr=1e-2))
    with open_store(tmp_path / "swap" if tiers == "three tiers" else None) as store:
        store.adopt(file)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        tiered = attach(model, store, layers=model.layers)
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, params=["head.*"], lr=1e-2)
        train(model, optimizer, store if tiers == "three tiers" else None)
        assert_streamed(store)
        weights = [name for name in store if "/" not in name]
        assert {name for name in weights if not store.info(name).adopted} == {"head"}
        head_bytes = store.info("head").nbytes
        assert store.stats().links["nvme_write"].bytes <= 4 * 5 * head_bytes, "the head and what belongs to it, at four commits"
        assert_equal(tiered.detach(), reference)
    if tiers == "three tiers":
        files = {path.name for path in (tmp_path / "swap").glob("block-*")}
        assert not any("layers" in name or "embedding" in name for name in files), files


def test_a_model_is_run_with_no_directory_at_all(file: Path) -> None:
    reference = made(0)
    with open_store(None, ram="150KB") as store:
        store.adopt(file)
        model = made(1)
        attach(model, store, layers=model.layers)
        with torch.no_grad():
            for tokens, _ in batches(4):
                assert torch.equal(model(tokens), reference(tokens))
        assert_streamed(store)
        assert all(store.info(name).adopted for name in store)


def test_parameters_of_one_module_may_be_partly_frozen(tmp_path: Path, file: Path) -> None:
    """`attach` keeps these in a block of their own, which a function of the caller's makes; the order within does not matter."""
    reference = made(0)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not name.startswith("layers") or ".up." in name)
    model = copy.deepcopy(reference)
    train(reference, torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=1e-2))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def layout(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2] if parts[0] == "layers" else parts[:1]) + ("/frozen" if name in frozen else "")

    with open_store(tmp_path / "swap") as store:
        store.adopt(file, layout=layout)
        tiered = attach(model, store, layers=model.layers)
        trained = [name for name, parameter in reference.named_parameters() if parameter.requires_grad]
        train(model, TieredOptimizer(tiered, torch.optim.SGD, params=trained, lr=1e-2))
        assert_streamed(store)
        assert all(store.info(name).adopted == name.endswith("/frozen") for name in store if name.startswith("layers"))
        assert_equal(tiered.detach(), reference)


def test_another_model_is_refused(tmp_path: Path, file: Path) -> None:
    with open_store(tmp_path / "swap") as store:
        store.adopt(file)
        model = made(0)
        model.head = nn.Linear(WIDTH, VOCABULARY + 1)
        with pytest.raises(TensorError, match="does not fit the model") as caught:
            attach(model, store, layers=model.layers)
        assert caught.value.block == "head"
        assert next(iter(store)) == "embedding"
