"""What every part of the benchmark needs: rows, the scale to measure on, and a stopwatch."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PAGE = 4096
MIB = 1 << 20


@dataclass
class Row:
    """One measured thing.

    Attributes:
        what: What was measured.
        unit: Of `repetitions`.
        repetitions: One number each.
        target: What their median should be, e.g. "<= 20"; empty for what is only told.
        detail: Whatever else was counted.
        value: The median.
    """

    what: str
    unit: str
    repetitions: list[float]
    target: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    value: float = 0.0

    def __post_init__(self) -> None:
        self.value = statistics.median(self.repetitions)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if not self.target:
            return None
        relation, bound = self.target.split()
        return self.value <= float(bound) if relation == "<=" else self.value >= float(bound)


@dataclass(frozen=True)
class Plan:
    """What to measure where, and on which scale.

    Attributes:
        device: The compute device.
        directory: Where stores and bare files are made; on the drive to be measured.
        quick: Only to see that it works.
    """

    device: torch.device
    directory: Path
    quick: bool

    def scaled(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @contextmanager
    def empty(self) -> Iterator[Path]:
        """A directory of its own for one store."""
        with tempfile.TemporaryDirectory(dir=self.directory) as made:
            yield Path(made) / "swap"

    def settle(self) -> None:
        """Let queued device work end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed(function: Callable[[], object]) -> float:
    """Seconds it takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
