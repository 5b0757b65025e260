"""`from_pretrained`: architectures of transformers from their folders, run, trained, saved and loaded again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.deterministic import deterministic
from tests.huggingface.folders import ARCHITECTURES, contents, ram_for, save, tokens, weight_bytes
from tests.training.harness import same
from tierstore import TierStore
from tierstore.testing.reference import resident_reference
from tierstore.training import TieredOptimizer

transformers = pytest.importorskip("transformers")

from tierstore.huggingface import from_pretrained  # noqa: E402  # needs transformers


def opened(folder: Path, directory: Path, device: str) -> TierStore:
    """A store whose device holds half of the model, and RAM a little more than that."""
    total = weight_bytes(folder)
    return TierStore(gpu=total // 2, ram=ram_for(int(total * 0.6)), nvme=directory, device=device)


def assert_streamed(store: TierStore, folder: Path) -> None:
    stats = store.stats()
    assert stats.tiers["gpu"].capacity_bytes <= weight_bytes(folder) / 2
    assert stats.tiers["gpu"].evictions
    assert stats.links["nvme_read"].bytes


def plain(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)


@pytest.fixture(autouse=True)
def same_bits(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    with deterministic():
        yield


def train(model: nn.Module, optimizer: Any, device: str) -> list[float]:
    model.train()
    torch.manual_seed(3)
    losses = []
    for step in range(2):
        batch = tokens(2, 12, seed=step).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_an_architecture_runs_generates_trains_and_is_saved(name: str, device: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model")
    before = contents(folder)
    resident = plain(folder).to(device)
    batch = tokens().to(device)
    with opened(folder, tmp_path / "store", device) as store:
        model, tiered = from_pretrained(folder, store)
        assert not model.training
        assert same(model(batch).logits, resident(batch).logits)
        ours, theirs = (each.generate(batch, max_new_tokens=6, do_sample=False) for each in (model, resident))
        assert torch.equal(ours, theirs)
        with torch.enable_grad():
            resident.config.use_cache = False
            layers = max((module for module in resident.modules() if isinstance(module, nn.ModuleList)), key=len)
            reference = resident_reference(resident, list(layers), micro_batch=None)
            expected = train(resident, reference.optimizer(torch.optim.AdamW, lr=1e-2), device)
            assert train(model, TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when="deferred"), device) == expected
        model.save_pretrained(tmp_path / "saved")
        assert_streamed(store, folder)
        logits = model(batch).logits
        store.commit()
    assert contents(folder) == before
    again = plain(tmp_path / "saved").to(device)
    assert same(again(batch).logits, logits)
    assert same(resident(batch).logits, logits)
    assert {**again.config.to_dict(), "_name_or_path": ""} == {**plain(folder).config.to_dict(), "_name_or_path": ""}
    with opened(folder, tmp_path / "store", device) as store:
        model, tiered = from_pretrained(folder, store)
        assert tiered.resumed
        assert same(model(batch).logits, logits)
        assert_streamed(store, folder)
        store.commit()
