"""The bar chart: tokens per second, and memory, of each contender. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.plots import INK, LOOK

OURS, THEIRS, DEVICE = "#0072B2", "#9a9a9a", "#E69F00"


def draw(parts: Sequence[tuple[str, Sequence[dict[str, Any]]]], note: str, path: Path) -> None:
    """One line of panels for each part: speed on the left, memory on the right. A row without numbers says why in its place.

    Args:
        parts: (title, rows) each; a row as in the JSON file.
        note: The machine.
        path: Of the picture.
    """
    heights = [len(rows) + 1.3 for _, rows in parts]
    with plt.rc_context(LOOK):
        figure, axes = plt.subplots(
            len(parts), 2, figsize=(10.5, 0.42 * sum(heights) + 0.7), height_ratios=heights, squeeze=False, layout="constrained"
        )
        figure.suptitle("The same model, batch and cap", x=0.005, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.995, 0.985, note, ha="right", va="top", fontsize=9, color="#666666")
        for (title, rows), (speed, memory) in zip(parts, axes, strict=True):
            speed.set_title(title)
            speed.set_xlabel("tokens per second")
            memory.set_xlabel("GB: RAM, and below it the device")
            memory.set_title("memory")
            _speed(speed, rows)
            _memory(memory, rows)
            speed.set_yticks(range(len(rows)), ["\n".join(filter(None, (row["name"], row["mark"]))) for row in rows])
            memory.set_yticks(range(len(rows)), [""] * len(rows))
            for axis in (speed, memory):
                axis.set_ylim(len(rows) - 0.4, -0.6)
                axis.tick_params(length=0)
                axis.set_xlim(0, 1.18 * axis.get_xlim()[1])
        figure.savefig(path)
        plt.close(figure)


def _speed(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    largest = max((row["tokens_per_s"] or 0 for row in rows), default=0) or 1
    for at, row in enumerate(rows):
        ours = row["name"].startswith("tierstore")
        if row["tokens_per_s"] is None:
            axis.text(0.01 * largest, at, _short(row["error"]), va="center", fontsize=8.5, color="#777777")
            continue
        axis.barh(at, row["tokens_per_s"], color=OURS if ours else THEIRS, height=0.66)
        axis.text(
            row["tokens_per_s"] + 0.015 * largest,
            at,
            f"{row['tokens_per_s']:,.0f}",
            va="center",
            fontsize=8.5,
            color=INK,
            fontweight="bold" if ours else "normal",
        )
    axis.set_xlim(0, largest)


def _memory(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    shown = [
        (at + shift, row["memory"].get(key, 0) / 1e9, shade)
        for at, row in enumerate(rows)
        if row["tokens_per_s"] is not None
        for key, shift, shade in (("ram", -0.17, THEIRS), ("device peak", 0.17, DEVICE))
    ]
    largest = max((value for _, value, _ in shown), default=0) or 1
    for at, value, shade in shown:
        axis.barh(at, value, color=shade, height=0.3)
        axis.text(value + 0.015 * largest, at, f"{value:.1f}", va="center", fontsize=7.5, color=INK)
    axis.set_xlim(0, largest)


def _short(error: str | None) -> str:
    first = (error or "").splitlines()[0] if error else ""
    return first if len(first) <= 60 else first[:59] + "…"
