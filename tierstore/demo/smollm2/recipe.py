"""What one fine-tuning run is made of. Imports nothing of tierstore. Two runs of equal recipes give equal bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Recipe:
    """One run.

    Attributes:
        steps: Optimizer steps of the whole run.
        batch: Windows per step.
        window: Tokens per window.
        clip_norm: Largest global gradient norm.
        threads: Compute threads on a CPU: another number adds up in another order, so a run keeps the one it began with.
        device: "cpu" or "cuda"; the two round differently.
    """

    steps: int = 40
    batch: int = 2
    window: int = 128
    lr: float = 1e-4
    clip_norm: float = 1.0
    seed: int = 0
    threads: int = 1
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.window


@contextlib.contextmanager
def deterministic(recipe: Recipe) -> Iterator[None]:
    """Ask torch for results that depend on nothing but the inputs; what was set before is restored."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; without it cuBLAS may vary from run to run
    mode = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic  # its flag is made at run time, unseen by type checkers
    fill, threads, precision = memory.fill_uninitialized_memory, torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_deterministic_debug_mode("error")  # as `use_deterministic_algorithms`, which imports torch's compiler: seconds
    memory.fill_uninitialized_memory = False  # nothing here reads memory that it has not written
    torch.set_num_threads(recipe.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        memory.fill_uninitialized_memory = fill
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
