"""What the links of this machine give: probed between steps, by loops that do nothing but move bytes."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.core_parts.bare import Copier, Drive
from benchmarks.core_parts.measure import timed

COPY_BYTES = 64 << 20
COPIES = 8
"""Of each size, in each of two sets: one travels in while the other travels out."""

FILES, FILE_BYTES = 8, 128 << 20


@dataclass
class Rates:
    """Bytes per second, one number for each time they were probed.

    Attributes:
        h2d, d2h: Alone.
        both: Of each direction, while both are busy.
        read, write: Of the drive, alone.
        mixed: Of both together, while both are busy.
    """

    h2d: list[float] = field(default_factory=list)
    d2h: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    mixed: list[float] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(getattr(self, name))


class Probe:
    """Measures all rates once at each call; keeps what it needs for it.

    Args:
        device: The compute device.
        directory: On the drive to be probed; None: no drive is.
    """

    def __init__(self, device: torch.device, directory: Path | None) -> None:
        self.rates = Rates()
        self._copier = Copier(device, COPY_BYTES, COPIES)
        self._drives: list[Drive] = []
        if directory is not None:
            noise = torch.randint(0, 256, (FILE_BYTES,), dtype=torch.uint8)
            directory.mkdir(parents=True, exist_ok=True)
            self._drives = [Drive(directory / name, FILES, noise, direct=True) for name in ("in", "out")]
        self.links()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def links(self) -> None:
        """The device's link: some tens of milliseconds."""
        self._copier.seconds(into=True, out=True)
        total = COPIES * COPY_BYTES
        self.rates.h2d.append(total / self._copier.seconds(into=True, out=False))
        self.rates.d2h.append(total / self._copier.seconds(into=False, out=True))
        self.rates.both.append(total / 2 / self._copier.seconds(into=True, out=True))

    def forget_drive(self) -> None:
        """Virtual drives give twice as much at one time as minutes later: a run is held against what is probed around it."""
        for rates in (self.rates.read, self.rates.write, self.rates.mixed):
            rates.clear()

    def drive(self) -> None:
        """The drive: seconds."""
        if not self._drives:
            return
        first, second = self._drives
        total = FILES * FILE_BYTES
        self.rates.read.append(total / timed(first.read))
        self.rates.write.append(total / timed(second.write))
        with ThreadPoolExecutor(2) as pool:
            self.rates.mixed.append(2 * total / timed(lambda: list(pool.map(lambda call: call(), (first.read, second.write)))))

    def close(self) -> None:
        self._copier.close()
        for drive in self._drives:
            drive.close()
