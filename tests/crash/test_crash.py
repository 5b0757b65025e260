"""Rotating seeds of the crash suite, and that a seed repeats a run exactly.

Which seeds rotates as those of the simulation do, see tests/README.md. `python -m tests.crash --level LEVEL --replay SEED` shows one.
"""

from __future__ import annotations

import os

import pytest

from tests.crash.cuts import run_cuts
from tests.crash.errors import run_errors
from tests.crash.seeds import run_seeds, silence
from tests.crash.store import run_store
from tierstore.nvme.files import Files
from tierstore.nvme.manifest import Manifest

ROTATION = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
MORE = 20 if NIGHTLY else 1

SEEDS = {"cuts": 10 * MORE, "errors": 6 * MORE, "store": 150 * MORE}
"""About 20, 6 and 15 seconds: 30 lives that crash at each change, a thousand errors, the whole store after 450 crashes."""

CHUNKS = {"cuts": 2, "errors": 3, "store": 25}


@pytest.mark.parametrize(
    ("level", "first"),
    [
        pytest.param(level, first, id=f"{level}-{first}")
        for level, seeds in SEEDS.items()
        for first in range(ROTATION * seeds, (ROTATION + 1) * seeds, CHUNKS[level])
    ],
)
def test_seeds(level: str, first: int) -> None:
    part = run_seeds(level, first, first + CHUNKS[level])
    assert not part.failures, "\n".join(f"seed {seed} fails: {message}" for seed, message in part.failures)
    assert part.steps > 0


def test_a_seed_repeats_a_run_exactly() -> None:
    """A failure that does not come again could not be understood."""
    with silence():
        first, second = run_cuts(3, lives=2), run_cuts(3, lives=2)
        assert first == second
        assert first.crashes > 100
        assert run_errors(1, every=16) == run_errors(1, every=16)
        (one, crashes), (other, again) = run_store(5), run_store(5)
        assert (one.digest, crashes) == (other.digest, again)


@pytest.mark.parametrize("bug", ["the model is not looked at", "a file that is gone", "the first write is taken for the model's"])
def test_what_is_wrong_with_adopted_blocks_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite adopts blocks, loses the model and writes to them; else these bugs would go by."""
    if bug == "the model is not looked at":
        monkeypatch.setattr("tierstore.nvme.shards.Shard.look_again", lambda *_: None)
    elif bug == "a file that is gone":

        async def refuse(files: Files, path: str, manifest: Manifest) -> dict[object, object]:
            for record in manifest.records:
                for file in record.adopted.files if record.adopted is not None else ():
                    await files.stat(file.path)
            return {}

        monkeypatch.setattr("tierstore.nvme.recovery.check_models", refuse)
    else:
        monkeypatch.setattr("tierstore.nvme.shards.Shard.working", property(lambda shard: shard.whole and not shard.references))
    with silence():
        assert any(run_cuts(seed).failure is not None for seed in range(6))
