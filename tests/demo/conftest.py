"""A demo of seconds: the same code with a model a hundredth of the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from tierstore import TierStore
from tierstore.cli import main
from tierstore.demo import picture, report, run
from tierstore.demo.model import Config

TINY = Config(layers=4, width=32, heads=2, context=32, batch=4, steps=6, warmup_steps=2)
SETTINGS = {
    "DEFAULTS": TINY,
    "GPU": "260kB",
    "RAM": "520kB",
    "COMMIT_EVERY_STEPS": 2,
    "EVALUATE_EVERY_STEPS": 3,
    "PROGRESS_WINDOWS": 8,
    "SCORE_WINDOWS": 16,
}


class Demo:
    """Runs `tierstore demo` in this process, in one directory, on the CPU."""

    settings: dict[str, Any] = SETTINGS

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, ["demo", "--device", "cpu", "--dir", str(self.directory), *arguments], catch_exceptions=False)

    def open_store(self) -> TierStore:
        return TierStore(gpu="1MB", ram="2MB", nvme=self.directory / "store", device="cpu")

    def state(self) -> dict[str, Tensor]:
        """All tensors that the run has committed, by block and name."""
        found: dict[str, Tensor] = {}
        with self.open_store() as store:
            for block in store:
                tensors = store.read(block)
                assert isinstance(tensors, dict)
                found |= {f"{block}/{name}": tensor for name, tensor in tensors.items()}
        return found


@pytest.fixture
def tiny() -> Config:
    return TINY


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Demo:
    """A tiny demo in a directory of the test's own, without a picture."""
    shrink(monkeypatch)
    monkeypatch.setattr(picture, "draw", lambda record, path: None)
    return Demo(tmp_path / "run")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Result]:
    """One whole run with `--check` and a picture, and what it printed."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        demo = Demo(tmp_path_factory.mktemp("demo") / "run")
        return demo, demo("--check")


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the tiny demo's defaults. The budgets shrink with the model: they still overflow fourfold and twofold."""
    for name, value in SETTINGS.items():
        monkeypatch.setattr(run, name, value)
    # A tiny model of a few steps has learnt nothing yet, and is not asked to.
    monkeypatch.setattr(report, "beats_bigram", lambda score: True)
