"""A real training, committing every step, killed at random moments: what is found, and how it goes on.

A life is one forked child: it opens the store, says what it found, trains, and says each commit that returned. It is killed while it
opens, trains or closes. `TIERSTORE_KILLS` is how many times for each way to run; which moments rotates as the seeds of the simulation do.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from tests.durability.outside import disk_bytes, newest_commit
from tests.durability.processes import Child, Say
from tests.durability.training import GPU, LAYERS, RAM, Reference, Training, digest_of, digest_of_store
from tierstore import CommitHandle, TierStore
from tierstore.nvme import directory
from tierstore.nvme.local import LocalFiles

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
]

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
KILLS = int(os.environ.get("TIERSTORE_KILLS") or (50 if NIGHTLY else 5))
BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)

STATE_BYTES = LAYERS * (3 + 2 + 5 + 2) * 4096
"""Of all blocks, each with a page of header and one that is counted for its directory entry."""

MANIFEST_BYTES = 8 * 4096
"""Most of it the random numbers' state."""


@dataclass(frozen=True)
class Way:
    """How a run commits, and to what files."""

    wait: bool
    keep: int
    portable: bool = False
    checksum: bool = True

    @property
    def limit_bytes(self) -> int:
        """Its size twice, once more for each further generation and for a commit under way: so says the README."""
        generations = 1 + self.keep + (not self.wait) + self.portable
        return generations * (STATE_BYTES + MANIFEST_BYTES) + 6 * 4096

    def open(self, path: str) -> TierStore:
        files = lambda: LocalFiles(portable=self.portable)  # noqa: E731
        with mock.patch.object(directory, "LocalFiles", files):
            return TierStore(GPU, RAM, path, device="cpu", nvme_limit=self.limit_bytes, keep=self.keep, checksum=self.checksum)


def live(say: Say, way: Way, path: str, steps: int | None) -> None:
    """Open, say what is found, train and commit for ever, or `steps` times and close."""
    say("opening")
    store = way.open(path)
    found = store.committed
    training = Training(found.metadata if found else None)
    if found:
        say("opened", found.generation, training.step, digest_of_store(store, found.metadata))
    else:
        say("opened", 0, 0, "-")
        training.begin(store)
    under_way: CommitHandle | None = None
    known = 0
    while steps is None or steps > 0:
        training.advance(store)
        say("committing", training.step)
        if way.wait:
            say("committed", store.commit(training.metadata()), training.step)
        else:
            if under_way is not None:
                say("committed", under_way.result(), known)
            under_way, known = store.commit(training.metadata(), wait=False), training.step
        steps = None if steps is None else steps - 1
    if under_way is not None:
        say("committed", under_way.result(), known)
    stats = store.stats()
    say(
        "moved", stats.links["nvme_read"].bytes, stats.links["nvme_write"].bytes, stats.tiers["ram"].evictions, stats.tiers["gpu"].evictions
    )
    say("peak", stats.tiers["nvme"].peak_bytes)
    say("closing")
    store.close()
    say("closed")


@dataclass
class Run:
    """Lives one after the other, and what must be true after each."""

    way: Way
    path: str
    reference: Reference
    rng: random.Random
    generation: int = 0  # of the last commit that is known to have happened
    step: int = 0
    opening_s: float = 0.05
    step_s: float = 0.05
    moments: Counter[str] = field(default_factory=Counter)

    def kill_at(self, moment: str) -> None:
        steps = self.rng.randrange(1, 4)
        child = Child(lambda say: live(say, self.way, self.path, None if moment != "closing" else steps))
        began = child.wait_for("opening")
        if moment == "opening":
            time.sleep(self.rng.uniform(0, self.opening_s))
        elif moment == "training":
            opened = child.wait_for("opened")
            assert began is not None
            assert opened is not None, "it ended by itself"
            self.opening_s = opened - began
            heard = child.wait_for("committing", steps)
            assert heard is not None
            self.step_s = (heard - opened) / steps
            time.sleep(self.rng.uniform(0, 1.5 * self.step_s))
        else:
            assert child.wait_for("closing") is not None
            time.sleep(self.rng.uniform(0, 0.01))
        child.kill()
        said = {words[0] for words in child.heard}
        assert child.exit == -9 or "closed" in said, f"it ended by itself: {child.exit} {child.heard[-3:]}"
        self.moments["closed" if "closed" in said else moment if "opened" in said else "opening"] += 1
        self.judge(child)

    def judge(self, child: Child) -> None:
        """What it found and what it left."""
        for words in child.heard:
            if words[0] == "opened":
                self.check_found(int(words[1]), int(words[2]), words[3])
            elif words[0] == "committed":
                assert (int(words[1]), int(words[2])) == (self.generation + 1, self.step + 1), "generations have no gaps here"
                self.generation, self.step = int(words[1]), int(words[2])
            elif words[0] == "peak":
                assert int(words[1]) <= self.way.limit_bytes
        seen = newest_commit(self.path) if Path(self.path).exists() else None
        if seen is not None:
            self.check_found(seen.generation, seen.metadata["step"], digest_of(seen.blocks, seen.metadata))
        else:
            assert self.generation == 0, "a commit is gone"
        if Path(self.path).exists():
            assert disk_bytes(self.path) <= self.way.limit_bytes

    def check_found(self, generation: int, step: int, digest: str) -> None:
        """The last commit whose return was heard of, or the one that was under way then: whole."""
        assert generation - self.generation in (0, 1), (generation, self.generation)
        assert step - self.step == generation - self.generation
        assert generation == 0 or digest == self.reference.digest(step)
        self.generation, self.step = generation, step

    def finish(self) -> None:
        """A last life, not killed: it ends as the undisturbed run does, and leaves nothing behind."""
        child = Child(lambda say: live(say, self.way, self.path, 3))
        assert child.wait() == 0
        self.judge(child)
        moved = next(words for words in child.heard if words[0] == "moved")
        assert all(int(count) > 0 for count in moved[1:]), "drive, RAM and device are all in use"
        files = sorted(os.listdir(self.path))
        kept = self.way.keep + self.way.portable
        assert sum(name.startswith("manifest-") for name in files) <= kept
        assert sum(name.startswith("block-") for name in files) <= 2 * LAYERS * kept
        assert {name for name in files if not name.startswith(("manifest-", "block-"))} == {"CURRENT", "tierstore.lock"}


WAYS = {
    "wait": Way(wait=True, keep=1),
    "wait, keep 3": Way(wait=True, keep=3, checksum=False),
    "at once, keep 2": Way(wait=False, keep=2),
    "at once, portable": Way(wait=False, keep=1, portable=True),
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.mark.timeout(120 + 5 * KILLS)
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment(way: str, tmp_path: Path, reference: Reference) -> None:
    run = Run(WAYS[way], str(tmp_path / "swap"), reference, random.Random(f"{way} {BASE}"))
    moments = ["training", "opening", "training", "closing", "training"]
    for number in range(KILLS):
        run.kill_at(moments[number % len(moments)])
    run.finish()
    assert run.moments.total() == KILLS
    print(way, "killed while", dict(run.moments), "and reached step", run.step)


@pytest.mark.parametrize("keep", [1, 3])
def test_killed_in_every_commit_before_old_generations_are_dropped(keep: int, tmp_path: Path, reference: Reference) -> None:
    """The commit has happened, and so each life adds a generation; were none dropped before the next, they would fill the drive."""
    path = str(tmp_path / "swap")
    way = Way(wait=True, keep=keep)
    run = Run(way, path, reference, random.Random(0))

    async def die(files: LocalFiles, where: str, data: bytes, *, sync: bool) -> None:
        if where.endswith("CURRENT.tmp"):
            os.kill(os.getpid(), signal.SIGKILL)
        await save(files, where, data, sync=sync)

    save = LocalFiles.save
    for life in range(1, keep + 5):
        with mock.patch.object(LocalFiles, "save", die):
            child = Child(lambda say: live(say, way, path, 1))
        assert child.wait() == -9
        run.judge(child)
        assert (run.generation, run.step) == (life, life)
        assert len(list(Path(path).glob("manifest-*.json"))) == min(life, keep + 1)
    run.finish()
