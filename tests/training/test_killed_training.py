"""SIGKILL in the middle of training, and the same script once more: it ends as a run that nobody killed, to the bit.

`TIERSTORE_TRAINING_KILLS` is how many times for each way to train; see `killed.py` for what a life is. The losses of all steps, the
weights, all state and the random numbers are compared at the end, and the state that each life finds with that of other runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.killed import WAYS

ROOT = Path(__file__).parents[2]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
KILLS = int(os.environ.get("TIERSTORE_TRAINING_KILLS") or (20 if NIGHTLY else 1))
BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.timeout(240 + 60 * KILLS)
@pytest.mark.parametrize("way", WAYS)
def test_killed_in_the_middle_of_training(way: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path), way, str(KILLS), str(BASE)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200 + 60 * KILLS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(way, done.stdout.strip())
