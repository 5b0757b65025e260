"""One regime: a model on a store, its steps timed, its bytes counted, and what it is held against."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from benchmarks.step_parts.floor import Compute, Work, floor
from benchmarks.step_parts.links import Probe
from benchmarks.step_parts.model import CONTEXT, SHAPES, Draws, Gpt, batches
from tierstore import TierStore
from tierstore.counters import Stats
from tierstore.training import TieredOptimizer, attach, empty_parameters
from tierstore.training.traffic import Settings, share_in_ram, traffic

GIB = 1 << 30
LINKS = ("h2d", "d2h", "nvme_read", "nvme_write")


@dataclass(frozen=True)
class Regime:
    """What is trained, and where its parts are.

    Attributes:
        model: A key of `SHAPES`.
        tokens: Of a step.
        gpu, ram: Budgets in bytes.
        weights: "gpu": all are held there; "ram": they pass through the device, "nvme": they are held on the drive, and the state too.
        nvme: Whether there is a drive.
        trains: False: forward only.
        micro_batch: Rows that a layer runs at a time.
        deferred_layers: Without clipping, so many layers are updated in their next forward pass. Their gradients lie beside the budget.
        repeats: Every step is taken on the same batch, so that its loss has to fall.
        context: Tokens of a row.
        targets: Least fraction without clipping, and with it.
    """

    model: str
    tokens: int
    gpu: int
    ram: int
    weights: Literal["gpu", "ram", "nvme"]
    nvme: bool = False
    trains: bool = True
    micro_batch: int | None = None
    deferred_layers: int = 0
    repeats: bool = False
    context: int = CONTEXT
    targets: tuple[float | None, float | None] = (None, None)

    @property
    def rows(self) -> int:
        return self.tokens // self.context


@dataclass
class Measured:
    """One run of a regime. Becomes one line of JSON."""

    regime: str
    clipped: bool
    settings: dict[str, Any]
    floor: dict[str, Any]
    compute: dict[str, float]
    rates: dict[str, list[float]]
    steps: list[float]
    median: float
    fraction: float
    target: float | None
    bytes_counted: dict[str, float]
    bytes_expected: dict[str, float]
    waits: dict[str, dict[str, float]]
    host: dict[str, float]
    memory: dict[str, int]
    losses: list[float] = field(default_factory=list)


class Steps:
    """When steps end, on the device: the host runs ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._host: list[float] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._host.append(time.perf_counter())

    def wait(self) -> None:
        if self._events:
            self._events[-1].synchronize()

    def seconds(self) -> list[float]:
        if self._events:
            self.wait()
            return [one.elapsed_time(other) / 1e3 for one, other in zip(self._events, self._events[1:], strict=False)]
        return [other - one for one, other in zip(self._host, self._host[1:], strict=False)]


@contextmanager
def opened(regime: Regime, directory: Path, device: torch.device) -> Iterator[tuple[TierStore, Gpt, Any]]:
    """The regime's model, attached."""
    shape = SHAPES[regime.model]
    with empty_parameters():
        model = Gpt(shape).to(torch.bfloat16)
    with (
        tempfile.TemporaryDirectory(dir=directory) as made,
        TierStore(regime.gpu, regime.ram, Path(made) / "swap" if regime.nvme else None, device=device, checksum=True) as store,
    ):
        tiered = attach(model, store, layers=model.layers, micro_batch=regime.micro_batch, init=Draws(shape.layers))
        if regime.weights != "ram":
            for block in tiered.structure.blocks:
                store.hold(block.name, regime.weights)
        yield store, model, tiered


def measure(
    name: str,
    regime: Regime,
    compute: Compute,
    probe: Probe,
    device: torch.device,
    directory: Path,
    *,
    clipped: bool,
    warm_up: int,
    steps: int,
    timeline: Path | None = None,
    say: Callable[[str], None] = print,
) -> Measured:
    """Take steps of it, and put them beside the floor."""
    shape = SHAPES[regime.model]
    when: Literal["deferred", "backward"] = "deferred" if clipped else "backward"
    late = 0 if clipped else regime.deferred_layers
    begun = time.perf_counter()
    process = psutil.Process()
    probe.forget_drive()
    with opened(regime, directory, device) as (store, model, tiered):
        optimizer: Any = None
        if regime.trains:
            optimizer = TieredOptimizer(
                tiered,
                torch.optim.AdamW,
                lr=1e-4,
                master_dtype=torch.float32,
                when=when,
                deferred_layers=late,
                fused=device.type == "cuda",
            )
        say(f"  {name}{' clipped' if clipped else ''}: open and filled after {time.perf_counter() - begun:.0f} s")
        losses: list[Tensor] = []
        data = batches(regime.rows, regime.context, device)
        if regime.repeats:
            data = itertools.repeat(next(data))

        def step() -> None:
            inputs, targets = next(data)
            if not regime.trains:
                with torch.no_grad():
                    losses.append(model(inputs, targets))
                return
            loss = model(inputs, targets)
            loss.backward()
            if clipped:
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

        for number in range(warm_up):
            step()
            if regime.weights == "nvme" and not number:  # state is made by the first step
                for block in list(store):
                    store.hold(block, "nvme")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        if regime.nvme and not regime.repeats:
            probe.drive()
        before = store.stats()
        timer, host = Steps(device), Host()
        timer.mark()
        for _ in range(steps):
            step()
            timer.mark()
        timer.wait()
        spent = host.spent()
        after = store.stats()
        if timeline is not None:
            timeline.parent.mkdir(parents=True, exist_ok=True)
            store.timeline.save(timeline)
        seconds = timer.seconds()
        for _ in range(2):
            probe.links()
        if regime.nvme:
            probe.drive()
        expected = _expected(regime, store, tiered, when)
        memory = {
            "device peak": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            "device reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
            "retries": _retries(device),
            "gpu budget": regime.gpu,
            "gpu peak": after.tiers["gpu"].peak_bytes,
            "ram budget": regime.ram,
            "ram peak": after.tiers["ram"].peak_bytes,
            "page-locked": after.page_locked_bytes,
            "process": process.memory_info().rss,
        }
        values = [float(loss) for loss in losses]
    work = Work(
        shape.parameters,
        resident=1.0 if regime.weights == "gpu" else 0.0,
        state_in_ram=_state_in_ram(regime, shape.parameters, clipped=clipped),
        weights_in_ram=0.0 if regime.weights == "nvme" else 1.0,
        room=_room(regime),
        trains=regime.trains,
    )
    found = floor(work, compute, probe.rates, clipped=clipped)
    median = statistics.median(seconds)
    return Measured(
        regime=name,
        clipped=clipped,
        settings=asdict(regime) | {"when": when, "work": asdict(work), "warm_up": warm_up},
        floor=found.as_json(),
        compute=asdict(compute),
        rates=asdict(probe.rates),
        steps=seconds,
        median=median,
        fraction=found.seconds / median,
        target=regime.targets[clipped],
        bytes_counted={link: (after.links[link].bytes - before.links[link].bytes) / steps for link in LINKS if link in after.links},
        bytes_expected=expected,
        waits=_waits(before, after, steps),
        host={key: value / steps for key, value in spent.items()},
        memory=memory,
        losses=values,
    )


def _retries(device: torch.device) -> int:
    """How often torch's allocator came upon the cap, since the process began, and had the device give back what it kept: that waits."""
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


class Host:
    """Time of processors: of the calling thread, and of the whole process."""

    def __init__(self) -> None:
        self._thread, self._process, self._wall = time.thread_time(), time.process_time(), time.perf_counter()

    def spent(self) -> dict[str, float]:
        return {
            "training thread": time.thread_time() - self._thread,
            "all threads": time.process_time() - self._process,
            "wall": time.perf_counter() - self._wall,
        }


def _room(regime: Regime) -> int:
    """Bytes of the device beside what is held there. In a forward pass, beside a layer at work and one on its way."""
    shape = SHAPES[regime.model]
    if not regime.trains:
        return max(0, regime.gpu - 2 * 2 * shape.layer_parameters)
    return max(0, regime.gpu - (2 * shape.parameters if regime.weights == "gpu" else 0))


def _state_in_ram(regime: Regime, parameters: int, *, clipped: bool) -> float:
    """What RAM has left beside the weights that pass through it, and the gradients that wait for a clipped update and not on the device."""
    if not regime.nvme:
        return 1.0
    if regime.weights == "nvme":
        return 0.0
    left = regime.ram - (2 * parameters if regime.weights == "ram" else 0)
    if clipped:
        left -= max(0, 2 * parameters - _room(regime))
    return max(0.0, min(1.0, left / (12 * parameters)))


def _expected(regime: Regime, store: TierStore, tiered: Any, when: Literal["deferred", "backward"]) -> dict[str, float]:
    """Bytes a step by the documented function."""
    blocks = [store.info(block.name).nbytes for block in tiered.structure.blocks]
    if not regime.trains:
        return {"h2d": float(sum(blocks)), "d2h": 0.0}
    state = [store.info(name).nbytes for name in store if name.startswith("optimizer/")]
    gradients = [store.info(name).nbytes for name in store if name.startswith("gradients/")]
    settings = Settings(
        weights=sum(blocks),
        layer=max(blocks),
        state=sum(state),
        state_chunk=max(state),
        gradients=sum(gradients) if when != "backward" else 0,
        gradient_chunk=max(gradients, default=0) if when != "backward" else 0,
        when=when,
        masters=True,
        device=store.stats().tiers["gpu"].capacity_bytes,
        resident=1.0 if regime.weights == "gpu" else 0.0,
    )
    if regime.weights == "nvme":  # whatever passes through the device comes from the drive and goes back there
        moved = traffic(replace(settings, device=None))
        return {"h2d": moved.h2d, "d2h": moved.d2h, "nvme_read": moved.h2d, "nvme_write": moved.d2h}
    if regime.nvme:
        settings = replace(settings, state_in_ram=share_in_ram(settings, store.stats().tiers["ram"].capacity_bytes))
    return asdict(traffic(settings))


def _waits(before: Stats, after: Stats, steps: int) -> dict[str, dict[str, float]]:
    """Of the host, a step."""
    found = {}
    for cause, stats in after.waits.items():
        count = stats.count - (before.waits[cause].count if cause in before.waits else 0)
        ns = stats.ns - (before.waits[cause].ns if cause in before.waits else 0)
        if count:
            found[cause] = {"count": count / steps, "seconds": ns / 1e9 / steps}
    return found
