"""Lives of one training script, each killed in the middle: run by `test_killed_training.py` in a process of its own.

A process that has run a backward pass can fork no child that does, so this one only imports torch, and every life is a child of it.

    python -m tests.training.killed DIRECTORY WAY KILLS SEED
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.durability.processes import Child, Say
from tests.training.models import Language, batches
from tierstore import TierStore
from tierstore.training import TieredOptimizer, attach

STEPS = 5
"""Of a run that nobody kills; one that is killed goes on until it has done as many."""

MOMENTS = ("opening", "forward", "backward", "update", "commit")
GPU = 160 << 10
"""Weights, gradients and state are more than the device holds, and more than RAM does."""


@dataclass(frozen=True)
class Way:
    """How a run trains, with so much RAM."""

    ram: int = 700 << 10
    when: str = "deferred"
    master: bool = False
    accumulation: int = 2
    wait: bool = True


WAYS = {
    "deferred, masters": Way(480 << 10, master=True),
    "step, not waited for": Way(480 << 10, when="step", wait=False),
    "backward": Way(320 << 10, when="backward", accumulation=1),
}


class Sampler:
    """Where in the data the run is."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def next(self) -> int:
        return int(torch.randint(1 << 30, (), generator=self.generator))

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.generator.set_state(state["generator"])


def digest(store: TierStore) -> str:
    """Of every bit that a commit has but gradients: between steps there are none, only blocks that were not dropped in time."""
    running = hashlib.sha256()
    for name in sorted(store):
        if name.startswith(("gradients/", "activations/")):
            continue
        read = store.read(name)
        values = read if isinstance(read, dict) else {name: read}
        for key, tensor in sorted(values.items()):
            running.update(f"{name}/{key}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            running.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return running.hexdigest()


def live(say: Say, directory: Path, way: Way, seed: int) -> None:
    """The script: begins or goes on, and ends when all steps are done."""
    say("opening")
    dtype = torch.bfloat16 if way.master else torch.float32
    with TierStore(GPU, way.ram, directory, device="cpu") as store:
        found = store.committed
        if found is not None:
            say("found", found.metadata["step"], digest(store))
        torch.manual_seed(seed if found is not None else 0)  # what it begins with counts only once
        model = Language(4, dropout=0.2).to(dtype)
        tiered = attach(model, store)
        masters = torch.float32 if way.master else None
        optimizer = TieredOptimizer(tiered, torch.optim.AdamW, lr=1e-2, when=way.when, master_dtype=masters)  # type: ignore[arg-type]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1, cycle_momentum=False)
        sampler = Sampler()
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        done = tiered.resume(scheduler=scheduler, sampler=sampler) or {"step": 0, "losses": []}
        losses: list[str] = done["losses"]
        under_way: Any = None
        for step in range(done["step"], STEPS):
            total = 0.0
            for _ in range(way.accumulation):
                say("forward", step)
                inputs, targets = next(batches("language", 1, 4, seed=sampler.next()))
                loss = model(inputs, targets)
                say("backward", step)
                loss.backward()
                total += loss.item() + random.random() + float(np.random.rand())
            say("update", step)
            if way.when != "backward":
                optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(total.hex())
            if under_way is not None:
                say("committed", step, under_way.result())
            say("commit", step)
            handle = store.commit({"step": step + 1, "losses": losses}, wait=way.wait)
            under_way = handle if not isinstance(handle, int) else None
            if under_way is None:
                say("committed", step + 1, handle)
        if under_way is not None:
            say("committed", STEPS, under_way.result())
        moved = store.stats()
        say("moved", *(moved.links[link].bytes for link in ("h2d", "d2h", "nvme_read", "nvme_write")))
        say("end", *losses, digest(store))


def undisturbed(directory: Path, way: Way) -> tuple[list[str], dict[int, str]]:
    """The losses of a run that nobody kills, then the digest of its end; and the digest of each step's commit."""
    digests: dict[int, str] = {}
    child = Child(lambda say: live(say, directory, way, 0))
    assert child.wait() == 0, child.heard[-3:]
    moved = [int(count) for count in next(words for words in child.heard if words[0] == "moved")[1:]]
    assert all(moved), "it streams"
    end = next(words for words in child.heard if words[0] == "end")[1:]
    digests[STEPS] = end[-1]
    return end, digests


class Run:
    """Lives one after the other."""

    def __init__(self, directory: Path, way: Way, seed: int) -> None:
        self.directory = directory
        self.way = way
        self.rng = random.Random(seed)
        self.number = 0
        self.committed = 0  # of the last commit whose return was heard of
        self.took_s = dict.fromkeys(MOMENTS, 0.02)
        self.killed_in: Counter[str] = Counter()
        self.found: dict[int, str] = {}

    def life(self, moment: str | None) -> Child:
        self.number += 1
        child = Child(lambda say: live(say, self.directory, self.way, self.number))
        if moment is not None:
            began = child.wait_for(moment, self.rng.randrange(1, 4) if moment != "opening" else 1)
            if began is not None:
                time.sleep(self.rng.uniform(0, self.took_s[moment]))
            child.kill()
            if child.exit == -9:
                self.killed_in[moment] += 1
        else:
            assert child.wait() == 0, child.heard[-3:]
        for words in child.heard:
            if words[0] == "found":
                assert int(words[1]) in (self.committed, self.committed + 1), f"step {words[1]} was found, {self.committed} was committed"
                self.committed = int(words[1])
                self.found[self.committed] = words[2]
            elif words[0] == "committed":
                self.committed = max(self.committed, int(words[1]))
        return child


def main(directory: str, way: str, kills: str, seed: str) -> None:
    base = Path(directory)
    torch.optim.AdamW([torch.zeros(1)])  # torch imports much when it makes its first optimizer: once for all children
    expected, digests = undisturbed(base / "undisturbed", WAYS[way])
    rng = random.Random(int(seed))
    total: Counter[str] = Counter()
    attempt = 0
    while total.total() < int(kills):
        run = Run(base / f"killed {attempt}", WAYS[way], rng.randrange(1 << 30))
        while run.committed < STEPS - 1 and total.total() + run.killed_in.total() < int(kills):
            run.life(run.rng.choice(MOMENTS))
        child = run.life(None)
        end = next(words for words in child.heard if words[0] == "end")[1:]
        assert end == expected, f"it does not end as the undisturbed run does: {end} {expected} {child.heard[:3]}"
        for step, found in run.found.items():
            assert digests.setdefault(step, found) == found, f"two runs differ at step {step}"
        total += run.killed_in
        attempt += 1
    print(f"killed {dict(total)} in {attempt} runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
