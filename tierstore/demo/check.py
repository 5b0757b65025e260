"""`--check`: the same run in plain torch, in a process that knows nothing of tierstore, compared bit for bit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tierstore import TierStore
from tierstore.demo import plain
from tierstore.demo.record import Ledger, Record


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What the comparison found.

    Attributes:
        differences: One clause per tensor or loss that differs, and per thing that should have happened and did not.
        seconds: That the plain run took.
    """

    num_tensors: int
    num_bytes: int
    num_losses: int
    differences: tuple[str, ...]
    seconds: float


def compare_with_plain(store: TierStore, record: Record, directory: Path) -> CheckResult:
    """Train again without tierstore and compare every weight, every moment and the loss of every step.

    Args:
        directory: Where the exchanged file may lie for a while.

    Raises:
        subprocess.CalledProcessError: The plain run failed; it has said why on standard error.
    """
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="check-", dir=directory) as scratch:
        config_path, result_path = Path(scratch, "config.json"), Path(scratch, "plain.safetensors")
        config_path.write_text(json.dumps(dataclasses.asdict(record.config)), encoding="utf-8")
        # By path, not with -m: importing the module by its name would import the package first.
        subprocess.run([sys.executable, plain.__file__, str(config_path), str(result_path)], check=True)
        seconds = time.monotonic() - started_s
        expected = load_file(result_path)
    losses = expected.pop("losses").tolist()
    differences = [
        f"the loss of step {step} was {ours!r}, in plain torch {theirs!r}"
        for step, (ours, theirs) in enumerate(zip(record.losses, losses, strict=True))
        if ours != theirs
    ]
    differences += compare_blocks(store, expected)
    differences += missing_traffic(record)
    return CheckResult(len(expected), sum(tensor.nbytes for tensor in expected.values()), len(losses), tuple(differences), seconds)


def compare_blocks(store: TierStore, expected: dict[str, Tensor]) -> list[str]:
    """Differences between what the store reads back and `expected`, which is keyed by block, slash, name."""
    by_block: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in expected.items():
        block, _, name = full_name.rpartition("/")
        by_block.setdefault(block, {})[name] = tensor
    differences = []
    for block, tensors in by_block.items():
        ours = store.read(block)
        assert isinstance(ours, dict)
        if ours.keys() != tensors.keys():
            differences.append(f"block {block} holds {sorted(ours)} and not {sorted(tensors)}")
            continue
        apart = [name for name, tensor in tensors.items() if not same_bits(ours[name], tensor)]
        differences += [describe(f"{block}/{name}", ours[name], tensors[name]) for name in apart]
    return differences


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two fp32 tensors are equal to the bit."""
    # As integers: `torch.equal` on floats takes -0.0 for 0.0.
    same_kind = ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
    return same_kind and torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


def describe(name: str, ours: Tensor, theirs: Tensor) -> str:
    """How two tensors differ, in one clause."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return f"{name} is {tuple(ours.shape)} {ours.dtype}, in plain torch {tuple(theirs.shape)} {theirs.dtype}"
    apart = (ours - theirs).abs()
    return f"{name} differs in {int((ours != theirs).sum()):,} of {ours.numel():,} numbers, by up to {float(apart.max()):.3g}"


def missing_traffic(record: Ledger) -> list[str]:
    """What should have happened on tiers this small and did not; nothing is asked of budgets that hold the whole state."""
    overfull = {
        tier: f"the state is {record.overflow(tier):.1f} times the {tier} tier" for tier in ("gpu", "ram") if record.overflow(tier) > 1
    }
    links = {"gpu": ("h2d", "d2h"), "ram": ("nvme_read", "nvme_write")}
    missing = [f"{reason}, yet nothing was evicted from it" for tier, reason in overfull.items() if not record.tiers[tier].evictions]
    missing += [
        f"{reason}, yet no byte crossed {link}" for tier, reason in overfull.items() for link in links[tier] if not record.links[link].bytes
    ]
    if "ram" in overfull and not record.links["nvme_write"].by_kind.get("write-back"):
        missing.append(f"{overfull['ram']}, yet no dirty copy was written back to NVMe")
    return missing
