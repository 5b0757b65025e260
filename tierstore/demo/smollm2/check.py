"""`--check`: the same fine-tuning in plain torch, in a process that knows nothing of tierstore, compared bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tierstore import TierStore
from tierstore.catalog import STATE_PREFIXES
from tierstore.demo.check import CheckResult, describe, missing_traffic, same_bits
from tierstore.demo.smollm2 import plain
from tierstore.demo.smollm2.record import Record
from tierstore.demo.smollm2.train import FineTuning

MOMENTS = ("exp_avg", "exp_avg_sq")


def compare_with_plain(tuning: FineTuning, record: Record, model: Path, directory: Path) -> CheckResult:
    """Train again without tierstore and compare every weight, every moment and the loss of every step.

    Args:
        model: Directory of the converted model.
        directory: Where the exchanged file may lie for a while: four bytes thrice for each parameter.

    Raises:
        subprocess.CalledProcessError: The plain run failed; it has said why on standard error.
    """
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check-", dir=directory) as scratch:
        recipe_path, result_path = Path(scratch, "recipe.json"), Path(scratch, "plain.safetensors")
        recipe_path.write_text(json.dumps(dataclasses.asdict(record.recipe)), encoding="utf-8")
        # By path, not with -m: importing the module by its name would import the package first.
        command = [sys.executable, plain.__file__, str(model), str(recipe_path), str(result_path)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        seconds = time.monotonic() - started_s
        # Read and not mapped: a mapping of 1.6 GB counts as memory, on Windows against what all processes may have.
        with safe_open(result_path, "pt", backend="pread") as expected:
            return _compare(tuning, record, expected, seconds)


def _compare(tuning: FineTuning, record: Record, expected: Any, seconds: float) -> CheckResult:
    """Tensor by tensor: neither side is whole in memory but for what `state_dict` returns."""
    losses = expected.get_tensor("losses").tolist()
    differences = [
        f"the loss of step {step} was {ours!r}, in plain torch {theirs!r}"
        for step, (ours, theirs) in enumerate(zip(record.losses, losses, strict=True))
        if ours != theirs
    ]
    missing = {name for name in expected.keys() if name != "losses"}  # noqa: SIM118  # a file, not a dictionary
    num_tensors, num_bytes = len(missing), 0
    for name, ours in (*weights(tuning.store), *moments(tuning)):
        if name not in missing:
            differences.append(f"the streamed run holds {name}, which plain torch does not know")
            continue
        missing.remove(name)
        theirs = expected.get_tensor(name)
        num_bytes += theirs.nbytes
        if not same_bits(ours, theirs):
            differences.append(describe(name, ours, theirs))
    differences += [f"the streamed run holds no {name}" for name in sorted(missing)]
    return CheckResult(num_tensors, num_bytes, len(losses), (*differences, *missing_traffic(record)), seconds)


def weights(store: TierStore) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its name, as `tierstore export` finds them: in the blocks that are no training state."""
    for block in store:
        if not block.startswith(STATE_PREFIXES):
            tensors = store.read(block)
            yield from tensors.items() if isinstance(tensors, dict) else [(block, tensors)]


def moments(tuning: FineTuning) -> Iterator[tuple[str, Tensor]]:
    """AdamW's two moments of every parameter, from the optimizer's `state_dict`, which is laid out as torch's own."""
    state = tuning.optimizer.state_dict()["state"]
    for index, (name, _) in enumerate(tuning.model.named_parameters()):
        of_parameter = state.pop(index)  # let go one by one
        yield from ((f"{moment}.{name}", of_parameter[moment].cpu()) for moment in MOMENTS)
