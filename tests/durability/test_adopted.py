"""Adopted blocks and commits, killed at random moments: what is found is a commit whole, and the model is untouched.

A life is one forked child. Each of its steps writes one block more, so a store goes from all adopted to none; between them blocks are
read, evicted and committed, some with checksums that were just learned. `TIERSTORE_KILLS` is how many times.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.durability.processes import Child, Say
from tierstore import TierStore
from tierstore.nvme.local import LocalFiles

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")]

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
KILLS = int(os.environ.get("TIERSTORE_KILLS") or (50 if NIGHTLY else 6))
BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)
LAYERS = 24


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {f"layers.{layer}.{part}": torch.randn(31, 33, generator=generator) for layer in range(LAYERS) for part in ("a", "b")}


def expected(step: int) -> dict[str, torch.Tensor]:
    """Step s adds s + 1 to one layer."""
    values = tensors()
    for number in range(step):
        values[f"layers.{number % LAYERS}.b"] += number + 1
    return values


def open_store(swap: Path) -> TierStore:
    return TierStore(9 * 4096, 17 * 4096, swap, device="cpu", keep=2)


def live(say: Say, model: Path, swap: Path, seed: int) -> None:
    rng = random.Random(f"adopted {BASE} {seed}")
    say("opening")
    with open_store(swap) as store:
        found = store.committed
        step = found.metadata["step"] if found else 0
        if found is None:
            store.adopt(model)
        say("opened", step)
        while True:
            for _ in range(rng.randrange(4)):
                name = f"layers.{rng.randrange(LAYERS)}"
                if rng.random() < 0.5:
                    store.read(name)
                else:
                    with store.use(name):
                        pass
            with store.use(f"layers.{step % LAYERS}", write=True) as leased:
                leased[f"layers.{step % LAYERS}.b"].add_(step + 1)
            step += 1
            say("committing", step)
            handle = store.commit({"step": step}, wait=False)
            if rng.random() < 0.3:
                store.evict(f"layers.{rng.randrange(LAYERS)}")
            handle.result()  # type: ignore[union-attr]
            say("committed", step)


def check(swap: Path, least: int) -> int:
    """What a store finds: a commit that had returned, or the one behind it, and which blocks are still the model's."""
    with open_store(swap) as store:
        step = store.committed.metadata["step"] if store.committed else 0
        assert least <= step <= least + 1
        if store.committed is None:
            return step
        values = expected(step)
        for layer in range(LAYERS):
            name = f"layers.{layer}"
            assert store.info(name).adopted == (layer >= step), name
            found = store.read(name)
            assert all(torch.equal(tensor, values[key]) for key, tensor in found.items())  # type: ignore[union-attr]
        assert store.stats().links["nvme_write"].bytes == 0
    return int(step)


@pytest.mark.timeout(120 + 5 * KILLS)
def test_killed_at_any_moment(tmp_path: Path) -> None:
    model, swap = tmp_path / "model.safetensors", tmp_path / "swap"
    save_file(tensors(), model)
    state = model.stat().st_mtime_ns, hashlib.sha256(model.read_bytes()).hexdigest()
    rng = random.Random(f"adopted {BASE}")
    step = 0
    for number in range(KILLS):
        child = Child(partial(live, model=model, swap=swap, seed=number))
        if number % 4 == 0:
            child.wait_for("opening")
            time.sleep(rng.uniform(0, 0.05))
        else:
            assert child.wait_for("opened") is not None
            assert child.wait_for("committing", rng.randrange(1, 4)) is not None, child.heard
            time.sleep(rng.uniform(0, 0.03))
        child.kill()
        assert child.exit == -9, f"it ended by itself: {child.exit} {child.heard[-3:]}"
        for words in child.heard:
            if words[0] == "opened":
                assert int(words[1]) in (step, step + 1)
                step = int(words[1])
            elif words[0] == "committed":
                step = int(words[1])
        step = check(swap, step)
    assert step > KILLS // 2
    assert (model.stat().st_mtime_ns, hashlib.sha256(model.read_bytes()).hexdigest()) == state


def test_killed_between_a_manifest_and_its_name(tmp_path: Path) -> None:
    """The commit that first names adopted blocks has not happened: the directory is as new, and the model can be adopted again."""
    model, swap = tmp_path / "model.safetensors", tmp_path / "swap"
    save_file(tensors(), model)

    def die(say: Say) -> None:
        async def replace(files: LocalFiles, source: str, target: str) -> None:
            os.kill(os.getpid(), 9)

        with open_store(swap) as store:
            store.adopt(model)
            LocalFiles.replace = replace  # type: ignore[method-assign]
            store.commit({"step": 0})

    child = Child(die)
    assert child.wait() == -9
    with open_store(swap) as store:
        assert store.committed is None
        assert not list(store)
        assert len(store.adopt(model)) == LAYERS
        assert store.commit({"step": 0}) == 1
    assert check(swap, 0) == 0
