"""One contender measured: its steps timed, its memory read. And the process in which that is done."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.peers_parts.contenders import CONTENDERS, Contender
from benchmarks.step_parts.model import batches
from benchmarks.step_parts.regimes import Regime, Steps
from tierstore.hardware import machine_facts

PROBE_BYTES = 64 << 20
"""Page-locked to see where such memory is counted. A size that models need too, so that what torch keeps of it is used again."""


@dataclass
class Row:
    """What one contender did.

    Attributes:
        steps: Seconds of each, on the device.
        median: Of these.
        wall: Seconds a step by the host's clock, from before the first to after the last, the device idle at both.
        tokens_per_s: At the median.
        memory: Bytes: "device peak" and "device reserved" of torch's allocator, which the cap holds; "page-locked"; "process peak", the
            largest resident set; "ram", for which see [Note: RAM].
        losses: Of all steps, also those before the measured ones.
        error: Why there are no numbers; None: there are.
        machine: On which it was measured.
    """

    name: str
    title: str
    lacks: str
    mark: str
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    median: float | None = None
    wall: float | None = None
    tokens_per_s: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    error: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)


def blank(name: str, regime: Regime) -> Row:
    """A row without numbers."""
    contender = CONTENDERS[name]
    versions = {package: version(package) for package in ("torch", contender.package) if package and contender.installed}
    return Row(name, contender.title, contender.lacks, contender.mark, asdict(regime), versions)


def measure(name: str, regime: Regime, device: torch.device, cap_bytes: int | None, directory: Path, *, warm_up: int, steps: int) -> Row:
    """Take steps of it in this process, under the cap. Whatever it raises goes into its row."""
    row = blank(name, regime)
    row.settings |= {"warm_up": warm_up, "threads": torch.get_num_threads()}
    row.machine = machine_facts()
    contender = CONTENDERS[name]
    if not contender.installed:
        row.error = "not installed"
        return row
    if device.type == "cuda" and cap_bytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_bytes / total, device)
    try:
        _take_steps(contender, row, regime, device, directory, warm_up, steps)
    except Exception as error:  # a row says what went wrong, and the next contender is measured
        row.error = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    row.memory["process peak"] = peak_resident_bytes()
    return row


def _take_steps(contender: Contender, row: Row, regime: Regime, device: torch.device, directory: Path, warm_up: int, steps: int) -> None:
    losses: list[Tensor] = []
    data = batches(regime.rows, regime.context, device)
    ram = Ram(device)
    row.settings["page_locked_is_resident"] = ram.page_locked_is_resident
    with contender.ready(regime, directory, device) as ready:
        ram.look()
        for inputs, targets in itertools.islice(data, warm_up):
            losses.append(ready.step(inputs, targets))
            ram.look()
        measured = list(itertools.islice(data, steps))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timer, begun = Steps(device), time.perf_counter()
        timer.mark()
        for inputs, targets in measured:
            losses.append(ready.step(inputs, targets))
            timer.mark()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        row.wall = (time.perf_counter() - begun) / steps
        ram.look()
        row.steps = timer.seconds()
        row.median = statistics.median(row.steps)
        row.tokens_per_s = regime.tokens / row.median
        row.losses = [float(loss) for loss in losses]
        row.memory = {"ram": ram.most_bytes, "page-locked": locked_by_torch(device) + ready.page_locked_bytes()}
        if device.type == "cuda":
            row.memory["device peak"] = torch.cuda.max_memory_allocated(device)
            row.memory["device reserved"] = torch.cuda.max_memory_reserved(device)


class Ram:
    """The most RAM that this process was seen to take: as it had set up, after each step to warm up, and at the end.

    [Note: RAM] What cudaHostRegister locks is in the resident set; what cudaHostAlloc gives is missing there with some drivers, so the
    resident sets of two ways to train need not compare. Which it is here is tried out, and what is missing is added. The RAM that the
    machine has left would not do: virtual machines get freed memory back only long after a process has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.most_bytes = 0
        self.page_locked_is_resident = True
        if device.type == "cuda":
            torch.zeros(1, pin_memory=True)
            before = resident_bytes()
            torch.zeros(PROBE_BYTES, dtype=torch.uint8, pin_memory=True)
            self.page_locked_is_resident = resident_bytes() - before > PROBE_BYTES // 2
            if locked_by_torch(device) < PROBE_BYTES:
                raise RuntimeError("torch.cuda.host_memory_stats() does not count what is page-locked: RAM cannot be compared")

    def look(self) -> None:
        missing = 0 if self.page_locked_is_resident else locked_by_torch(self._device)
        self.most_bytes = max(self.most_bytes, resident_bytes() + missing)


def locked_by_torch(device: torch.device) -> int:
    """Bytes that torch's allocator of page-locked memory holds."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)) if device.type == "cuda" else 0


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident set that this process had. Where the system does not say: the one that it has."""
    try:
        # Not getrusage(): on Linux its peak is inherited from the process that started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code; None: it took too long, and was killed.
        output: The end of what it printed.
    """

    code: int | None
    output: str


def run(command: Sequence[str], timeout_s: float) -> Ended:
    """Run a process to its end."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        code, output = None, late.stdout or b""
    return Ended(code, output.decode(errors="replace")[-4000:].strip())
