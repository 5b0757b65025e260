"""What a run will do, before its first step: what moves where, what it needs, and about how long a step takes."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tierstore.catalog import extent_bytes
from tierstore.errors import CapacityError
from tierstore.finetune.data import Batch
from tierstore.finetune.options import Recipe
from tierstore.finetune.tuning import Tuning
from tierstore.residency import Tier
from tierstore.sync import TierStore
from tierstore.training.gradients import part_bytes
from tierstore.training.leasing import rounded
from tierstore.training.traffic import SLOTS, Settings, Traffic, share_in_ram, traffic
from tierstore.units import LinkRates, format_bytes, format_duration

MOMENTS = 2
"""Of AdamW, in the precision of the masters, or of the weights where there are none."""

COPIED_BYTES = 32 << 20
"""What the speed of copies is measured with."""

PASSES, FROZEN_PASSES = 4, 3
"""Forward passes that a step's computing is worth: forward, once more in the backward pass, and that, which is twice as much, or as much
where nearly all is frozen."""

DRIVE = LinkRates()
"""Not measured: reading back what was just written tells of the system's cache."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        settings: Of the traffic.
        trained, frozen: Numbers of parameters.
        num_blocks: Of weights.
        per_step: Bytes over each link, about, once the period is known.
        copied_bytes_per_s: Measured.
        compute_s: Of a step, from a forward pass that was measured.
        commit_bytes: That one commit writes.
        drive_bytes: That the store's directory takes at most.
    """

    settings: Settings
    trained: int
    frozen: int
    num_blocks: int
    per_step: Traffic
    copied_bytes_per_s: float
    compute_s: float
    commit_bytes: int
    drive_bytes: int

    @property
    def step_s(self) -> float:
        """Of the busiest of all."""
        moved = max(self.per_step.h2d, self.per_step.d2h) / self.copied_bytes_per_s
        read, written = self.per_step.nvme_read / DRIVE.nvme_read_bytes_per_s, self.per_step.nvme_write / DRIVE.nvme_write_bytes_per_s
        return max(self.compute_s, moved, read + written)


def make_plan(tuning: Tuning, batch: Batch, tokens: int, activations: str) -> Plan:
    """Work it out.

    Args:
        tuning: Before its first step.
        batch: One of those to come.
        tokens: Of a step, at most.
        activations: Where inputs of layers wait.
    """
    store, tiered = tuning.store, tuning.tiered
    sizes = {block.name: store.info(block.name).nbytes for block in tiered.structure.blocks}
    trained = sum(sizes[block.name] for block in tiered.structure.blocks if block.trainable)
    chunks = list(_chunks(tuning))
    layers = sum(unit.kind.value == "layer" for unit in tiered.structure.units)
    arenas = store.engine.placement.arenas
    settings = Settings(
        weights=trained,
        layer=max(sizes.values()),
        state=sum(state for state, _ in chunks),
        state_chunk=max((state for state, _ in chunks), default=0),
        gradients=sum(gradient for _, gradient in chunks),
        gradient_chunk=max((gradient for _, gradient in chunks), default=0),
        frozen=sum(sizes.values()) - trained,
        when="deferred",
        masters=tuning.has_masters,
        activations=activations,  # type: ignore[arg-type]
        inputs=layers * tokens * tuning.hidden_bytes,
        device=arenas[Tier.GPU].capacity_bytes - sum(size for name, size in sizes.items() if store.info(name).hold == "gpu"),
    )
    ram = arenas[Tier.RAM].capacity_bytes
    held = tiered.buffers.held_on is not None
    settings = dataclasses.replace(settings, state_in_ram=1.0 if held else share_in_ram(settings, ram))
    durable = trained + settings.state
    frozen = [block for block in tiered.structure.blocks if not block.trainable]
    return Plan(
        settings,
        tuning.num_trained,
        tuning.num_frozen,
        len(sizes),
        _with_weights(settings, traffic(settings), ram, held=held),
        _measure_copies(store.device),
        (PASSES if tuning.num_trained > tuning.num_frozen else FROZEN_PASSES) * _measure_forward(tuning, batch),
        durable,
        2 * durable + sum(sizes[block.name] for block in frozen if not store.info(block.name).adopted),
    )


def _chunks(tuning: Tuning) -> Iterator[tuple[int, int]]:
    """Bytes of state and of gradients of each chunk."""
    masters = tuning.has_masters
    for chunk in tuning.optimizer.chunks:
        gradients = part_bytes(chunk.pieces)
        sizes = [piece.numel * (4 if masters else piece.weight.dtype.itemsize) for piece in chunk.pieces]
        state = extent_bytes(sizes * (MOMENTS + masters))
        yield rounded(state, gradients), gradients


def _with_weights(settings: Settings, moved: Traffic, ram: int, *, held: bool) -> Traffic:
    """What the drive carries besides, where RAM does not hold all weights and gradients: those that it lacks, in each pass.

    Args:
        held: Gradients and state are held in RAM: they leave less of it to the weights, and only those that nobody writes to pass through.
    """
    if held:
        left = max(0, ram - settings.gradients - settings.state - settings.layer)
        lacking = max(0.0, 1 - left / settings.frozen) if settings.frozen else 0.0
        return dataclasses.replace(moved, nvme_read=2 * lacking * settings.frozen, nvme_write=0.0)
    weights = settings.weights + settings.frozen
    often = weights + settings.gradients
    left = max(0, ram - SLOTS * max(settings.layer, settings.state_chunk))
    lacking = max(0.0, 1 - left / often) if often else 0.0
    read = lacking * (2 * weights + settings.gradients)
    written = lacking * (settings.weights + settings.gradients)
    return Traffic(moved.h2d, moved.d2h, moved.nvme_read + read, moved.nvme_write + written)


def _measure_forward(tuning: Tuning, batch: Batch) -> float:
    """Seconds of a forward pass, the second of two: the first finds nothing where it is wanted."""
    for _ in range(2):
        started_s = time.perf_counter()
        tuning.evaluate([batch])
        seconds = time.perf_counter() - started_s
    return seconds


def _measure_copies(device: torch.device) -> float:
    """From RAM to the device, in bytes per second."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8)
    source = source.pin_memory() if device.type == "cuda" else source
    target = torch.empty_like(source, device=device)
    return COPIED_BYTES / _time(lambda: target.copy_(source, non_blocking=True), device)


def _time(work: object, device: torch.device) -> float:
    """Seconds of the fastest of a few."""
    assert callable(work)
    best = float("inf")
    for _ in range(4):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started_s)
    return best


def check(plan: Plan, store: TierStore, nvme: Path, output: Path, export_bytes: int) -> None:
    """Refuse a run that would stop for want of space in the middle.

    Raises:
        CapacityError: The drive, or RAM, is too small.
    """
    used = store.stats().tiers["nvme"].used_bytes
    free = min(shutil.disk_usage(nvme).free, store.stats().tiers["nvme"].capacity_bytes - used)
    if plan.drive_bytes - used > free:
        raise CapacityError(
            f"the drive of {nvme} is too small for this run: weights and state twice, for what is under way and for the last commit",
            need=format_bytes(plan.drive_bytes - used),
            have=f"{format_bytes(free)} free",
            remedy="free some, name another --nvme, raise --nvme-limit, or train adapters (--lora-rank) instead of all weights",
        )
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if export_bytes > free:
        raise CapacityError(
            f"the drive of {output} is too small for the result",
            need=format_bytes(export_bytes),
            have=f"{format_bytes(free)} free",
            remedy="free some, or name another --output",
        )
    ram = store.engine.placement.arenas[Tier.RAM].capacity_bytes
    if plan.settings.activations == "ram" and plan.settings.inputs > ram:
        raise CapacityError(
            "the inputs of layers do not fit RAM",
            need=format_bytes(plan.settings.inputs),
            have=format_bytes(ram),
            remedy="--activations nvme, a smaller --batch or --seq-len, or more --ram",
        )


def describe(plan: Plan, store: TierStore, recipe: Recipe, steps: int, commits: int) -> Iterator[str]:
    """What will happen, in lines."""
    stats, settings = store.stats(), plan.settings
    moved = plan.per_step
    kind = f"LoRA of rank {recipe.lora_rank}" if recipe.lora_rank is not None else "all weights"
    yield f"Model     {plan.trained + plan.frozen:,} parameters; {kind}: {plan.trained:,} are trained, {plan.frozen:,} stay as they are"
    weights = f"{format_bytes(settings.weights)} trained, {format_bytes(settings.frozen)} frozen"
    state = f"{format_bytes(settings.gradients)} of gradients, {format_bytes(settings.state)} of optimizer state"
    yield f"Blocks    {plan.num_blocks} of weights, the largest {format_bytes(settings.layer)}; {weights}, {state}"
    budgets = ", ".join(f"{tier} {format_bytes(stats.tiers[tier].capacity_bytes)}" for tier in ("gpu", "ram"))
    yield f"Tiers     {budgets}; the drive at most {format_bytes(plan.drive_bytes)}"
    drive = f"{format_bytes(moved.nvme_read)} read from the drive, {format_bytes(moved.nvme_write)} written to it"
    yield f"A step    about {format_bytes(moved.h2d)} to the device, {format_bytes(moved.d2h)} back; {drive}"
    computing = f"computing {format_duration(plan.compute_s)}"
    copying = f"copies at {format_bytes(plan.copied_bytes_per_s)}/s"
    measured = f"{computing}, {copying} (both measured)"
    yield f"Time      about {format_duration(plan.step_s)} a step: {measured}, the drive as planned for a PCIe 4 one"
    written = format_bytes(moved.nvme_write * steps + plan.commit_bytes * commits)
    yield (
        f"Run       {plural(steps, 'step')}, about {format_duration(plan.step_s * steps)}; {plural(commits, 'commit')} of at most "
        f"{format_bytes(plan.commit_bytes)}; {written} written to the drive in all"
    )


def plural(count: int, what: str) -> str:
    """A number of things, in words."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
