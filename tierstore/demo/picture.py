"""The end of a run in one picture. The only module that needs matplotlib, which the demo can do without."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tierstore.demo.record import Record
from tierstore.monitor.tui import LINK_ARROWS
from tierstore.units import format_bytes

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, PALE, GREEN = "#2f6fb0", "#d9730d", "#c9d9ea", "#3f8f5f"
SMOOTHING_STEPS = 9

TIER_TITLES = {"gpu": "device", "ram": "RAM", "nvme": "NVMe"}


def draw(record: Record, path: Path) -> None:
    """Write the picture: losses against entropies, memory against budgets, hit rates, bytes per link."""
    figure = Figure(figsize=(12, 6.4), dpi=150, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04))
    grid = figure.add_gridspec(3, 2, width_ratios=(1.35, 1), height_ratios=(3.2, 2, 4))
    _draw_losses(figure.add_subplot(grid[:, 0]), record)
    _draw_peaks(figure.add_subplot(grid[0, 1]), record)
    _draw_hits(figure.add_subplot(grid[1, 1]), record)
    _draw_links(figure.add_subplot(grid[2, 1]), record)
    figure.savefig(path)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    axes.set_axisbelow(True)


def _draw_losses(axes: Axes, record: Record) -> None:
    _style(axes, f"A {record.config.layers}-layer transformer learns Python's standard library")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    steps = range(1, len(record.losses) + 1)
    axes.plot(steps, record.losses, color=PALE, linewidth=0.9)
    axes.plot(steps, _smooth(record.losses), color=BLUE, linewidth=1.8, label=f"training, mean of {SMOOTHING_STEPS} steps")
    held_out = list(record.held_out)
    axes.plot(*zip(*held_out, strict=True), color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="held-out files")
    unigram, bigram = record.entropies
    right = 1.09 * max(1, record.step)
    for name, value in (("unigram entropy", unigram), ("bigram entropy", bigram)):
        axes.axhline(value, color=INK, linewidth=1, linestyle=(0, (5, 4)))
        axes.text(right, value + 0.02, f"{name} {value:.2f}", ha="right", va="bottom", color=INK, fontsize=9)
    if record.score is not None:
        last = record.score.held_out
        axes.text(record.step + 0.015 * right, last, f"{last:.2f}", va="center", color=ORANGE, fontsize=10, fontweight="bold")
    lowest = min([*record.losses, *(loss for _, loss in held_out), bigram])
    # The first steps are off the top, so that what matters, the way down past the two lines, has room.
    axes.set_ylim(max(0.0, lowest - 0.15), unigram + 1.2)
    axes.set_xlim(0, right)
    axes.set_xlabel("step", color=MUTED, fontsize=9)
    axes.set_ylabel("loss, nats per byte", color=MUTED, fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def _smooth(values: list[float]) -> list[float]:
    half = SMOOTHING_STEPS // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _draw_peaks(axes: Axes, record: Record) -> None:
    _style(axes, "Peak memory of each tier (blue) against its budget (grey)")
    names = [name for name in record.tiers if name in TIER_TITLES]
    # The budget of the drive may be large: what lies far beyond its peak is cut off.
    span = max(record.state_bytes, *(min(record.tiers[name].budget_bytes, 2 * record.tiers[name].peak_bytes) for name in names))
    for row, name in enumerate(names):
        tier = record.tiers[name]
        axes.barh(row, min(tier.budget_bytes, span), color=GRID, height=0.62)
        axes.barh(row, tier.peak_bytes, color=BLUE, height=0.34)
        text = f"{format_bytes(tier.peak_bytes)} of {format_bytes(tier.budget_bytes)}"
        axes.text(span * 1.02, row, text, va="center", color=INK, fontsize=9)
    axes.axvline(record.state_bytes, color=INK, linewidth=1, linestyle=(0, (5, 4)))
    axes.text(record.state_bytes + 0.015 * span, 0, f"whole state {format_bytes(record.state_bytes)}", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(names)), [TIER_TITLES[name] for name in names])
    axes.set_xticks([])
    axes.set_xlim(0, span * 1.42)
    axes.invert_yaxis()


def _draw_hits(axes: Axes, record: Record) -> None:
    _style(axes, "Hit rate: found on the tier when it was needed")
    rates = {name: tier.hit_rate for name, tier in record.tiers.items() if tier.hit_rate is not None}
    for row, (name, rate) in enumerate(rates.items()):
        tier = record.tiers[name]
        axes.barh(row, 1, color=GRID, height=0.62)
        axes.barh(row, rate, color=GREEN, height=0.62)
        axes.text(1.02, row, f"{rate:.0%} of {tier.hits + tier.misses:,}", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(rates)), [TIER_TITLES.get(name, name) for name in rates])
    axes.set_xticks([])
    axes.set_xlim(0, 1.42)
    axes.invert_yaxis()


def _draw_links(axes: Axes, record: Record) -> None:
    _style(axes, "Bytes over each link, per step")
    per_step = {name: link.bytes / max(1, record.step) for name, link in record.links.items()}
    span = max([*per_step.values(), 1.0])
    for row, (name, nbytes) in enumerate(per_step.items()):
        axes.barh(row, nbytes, color=BLUE if name in ("h2d", "d2h") else ORANGE, height=0.62)
        total = format_bytes(record.links[name].bytes)
        axes.text(nbytes + span * 0.02, row, f"{format_bytes(nbytes)}  ({total} in all)", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(per_step)), [LINK_ARROWS.get(name, name) for name in per_step])
    axes.set_xticks([])
    axes.set_xlim(0, span * 1.42)
    axes.invert_yaxis()
