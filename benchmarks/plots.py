"""Two pictures: how time falls with the budget, and what crosses the links at one budget.

Colours are from Okabe and Ito's set, which people with any colour vision can tell apart; every line is named where it ends.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.workloads import Workload

if TYPE_CHECKING:
    from benchmarks.policies import Result

LOUD = {"lookahead": "#0072B2", "static": "#009E73", "lru": "#D55E00"}
YOURS = ("#CC79A7", "#E69F00", "#56B4E9")
QUIET = "#9a9a9a"
BOUND = "#000000"
INK, FAINT = "#222222", "#dddddd"
LOOK: dict[str, Any] = {
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.dpi": 110,
    "savefig.dpi": 160,
}
OURS = ("lookahead", "static", "lru", "fifo", "clock", "sieve", "s3fifo", "arc")


def draw(
    results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], budgets: Sequence[int], out: Path
) -> list[Path]:
    """Write both pictures. Returns their paths."""
    with plt.rc_context(LOOK):
        paths = [out / "policies-bytes.png"]
        draw_bytes(results, workloads, policies, _middle(budgets), paths[0])
        if len(budgets) > 2:
            paths.insert(0, out / "policies.png")
            draw_time(results, workloads, policies, budgets, paths[0])
    return paths


def _middle(budgets: Sequence[int]) -> int:
    return min(budgets, key=lambda budget: abs(budget - 30))


def colour(policy: str, policies: Sequence[str]) -> str:
    yours = [name for name in policies if name not in OURS]
    if policy in yours:
        return YOURS[yours.index(policy) % len(YOURS)]
    return LOUD.get(policy, QUIET)


def _head(figure: Any, title: str, note: str, columns: int) -> None:
    """The title, and the note beside it; below the panels where the picture is too narrow for both."""
    figure.suptitle(textwrap.fill(title, 36 * columns), x=0.005, ha="left", fontsize=13, fontweight="bold")
    if columns >= 3:
        figure.text(0.995, 0.985, note, ha="right", va="top", fontsize=9, color="#666666")
    else:
        figure.supxlabel(textwrap.fill(note, 60 * columns), fontsize=9, color="#666666")


# -- time by budget -------------------------------------------------------------------------------------------------------


def draw_time(
    results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], budgets: Sequence[int], path: Path
) -> None:
    """One panel a workload: time of a period over the budget, down to what no policy can go below.

    A workload that takes as long with any policy, as its computing takes longer than all transfers, is left out.
    """
    workloads = [workload for workload in workloads if _differs(workload, results)] or workloads
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.1 * columns, 3.15 * rows + 0.75), squeeze=False, layout="constrained")
    for axis, workload in zip(axes.flat, workloads, strict=False):
        _time_panel(axis, [result for result in results if result.workload == workload.name], policies)
        axis.set_title(workload.title)
    for axis in axes.flat[len(workloads) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds a period")
    for axis in axes[-1]:
        axis.set_xlabel("RAM, as a share of all blocks (device: a quarter of it)")
    quiet = [name for name in policies if colour(name, policies) == QUIET]
    note = "shaded: no policy can get there" + (f"; grey: {', '.join(quiet)}" if quiet else "")
    _head(figure, "Time of one period against memory, by policy", note, columns)
    figure.savefig(path)
    plt.close(figure)


def _differs(workload: Workload, results: Sequence[Result]) -> bool:
    times = [result.ns for result in results if result.workload == workload.name]
    return max(times) > 1.02 * min(times)


def _time_panel(axis: Any, results: Sequence[Result], policies: Sequence[str]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for result in sorted(results, key=lambda result: result.budget):
        lines.setdefault(result.policy, []).append((result.budget, result.ns / 1e9))
    floor = sorted({(result.budget, result.bound_ns / 1e9) for result in results})
    quiet = [name for name in policies if colour(name, policies) == QUIET]
    for name in [*quiet, *(name for name in reversed(policies) if name not in quiet)]:
        loud = name not in quiet
        width, order = (2.2, 5) if loud else (0.9, 3)
        axis.plot(*zip(*lines[name], strict=True), color=colour(name, policies), linewidth=width, zorder=order, solid_capstyle="round")
    axis.plot(*zip(*floor, strict=True), color=BOUND, linewidth=1, linestyle=(0, (1, 1.5)), zorder=4)
    values = [seconds for line in lines.values() for _, seconds in line] + [seconds for _, seconds in floor]
    axis.set_ylim(0, max(values) * 1.06)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.fill_between(*zip(*floor, strict=True), axis.get_ylim()[0], color="#f1f1f1", zorder=1, linewidth=0)
    budgets = [budget for budget, _ in floor]
    axis.set_xlim(budgets[0], budgets[-1] + 0.34 * (budgets[-1] - budgets[0]))
    axis.set_xticks([budget for budget in (5, 25, 50, 75, 95) if budgets[0] <= budget <= budgets[-1]])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} %"))
    axis.grid(axis="y", color=FAINT, linewidth=0.6, zorder=0)
    axis.tick_params(length=0)
    axis.tick_params(axis="x", pad=6)
    _name_ends(axis, lines, quiet, floor, policies)


def _name_ends(
    axis: Any,
    lines: dict[str, list[tuple[int, float]]],
    quiet: Sequence[str],
    floor: Sequence[tuple[int, float]],
    policies: Sequence[str],
) -> None:
    """Names at the right ends of the lines, moved apart where they would lie over one another."""
    wanted = [(lines[name][-1][1], name, colour(name, policies), "bold") for name in policies if name not in quiet]
    wanted.append((floor[-1][1], "bound", BOUND, "normal"))
    if quiet:
        ends = sorted(lines[name][-1][1] for name in quiet)
        wanted.append((ends[len(ends) // 2], quiet[0] if len(quiet) == 1 else "others", "#777777", "normal"))
    to_axis = axis.transScale + axis.transLimits
    places = sorted(((float(to_axis.transform((0, value))[1]), value, *rest) for value, *rest in wanted), key=lambda item: item[0])
    gap, shown = 0.075, [place for place, *_ in places]
    for index in range(1, len(shown)):
        shown[index] = max(shown[index], shown[index - 1] + gap)
    over = shown[-1] - 1.0
    if over > 0:
        shown = [min(place, 1.0 - gap * (len(shown) - 1 - index)) for index, place in enumerate(shown)]
    last = floor[-1][0]
    for place, (_, value, name, shade, weight) in zip(shown, places, strict=True):
        axis.annotate(
            name,
            xy=(last, value),
            xytext=(0.80, place),
            textcoords="axes fraction",
            va="center",
            color=shade,
            fontweight=weight,
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )


def _tick(value: float) -> str:
    return f"{value:g}" if value >= 0.01 else f"{value:.1g}"


# -- bytes at one budget --------------------------------------------------------------------------------------------------


def draw_bytes(results: Sequence[Result], workloads: Sequence[Workload], policies: Sequence[str], budget: int, path: Path) -> None:
    """One panel a workload: bytes read from and written to NVMe by each policy, and the least that must be."""
    columns = min(3, len(workloads))
    rows = -(-len(workloads) // columns)
    height = 0.26 * len(policies) + 0.75
    figure, axes = plt.subplots(rows, columns, figsize=(4.1 * columns, height * rows + 0.75), squeeze=False, layout="constrained")
    title = f"What crosses the drive's link in one period, with RAM for {budget} % of all blocks"
    note = "dark: read, light: written; dotted: the least that must be"
    _head(figure, title, note, columns)
    for axis, workload in zip(axes.flat, workloads, strict=False):
        found = {result.policy: result for result in results if result.workload == workload.name and result.budget == budget}
        _bytes_panel(axis, [found[name] for name in policies], policies)
        axis.set_title(workload.title)
    for axis in axes.flat[len(workloads) :]:
        axis.set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def _bytes_panel(axis: Any, results: Sequence[Result], policies: Sequence[str]) -> None:
    largest = max(result.nvme for result in results) or 1e6
    unit, name = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for row, result in enumerate(results):
        shade = colour(result.policy, policies)
        axis.barh(row, result.nvme_read / unit, color=shade, height=0.72)
        axis.barh(row, result.nvme_write / unit, left=result.nvme_read / unit, color=shade, alpha=0.45, height=0.72)
        axis.text(result.nvme / unit + 0.015 * largest / unit, row, f"{result.nvme / unit:.3g}", va="center", fontsize=8.5)
    bound = results[0].bound_nvme / unit
    axis.axvline(bound, color=BOUND, linewidth=1, linestyle=(0, (1, 1.5)))
    axis.text(bound + 0.01 * largest / unit, -0.62, "least", ha="left", va="bottom", fontsize=8, color="#444444")
    axis.set_yticks(range(len(results)), [result.policy for result in results])
    axis.set_ylim(len(results) - 0.4, -1.1)
    axis.set_xlim(0, 1.17 * largest / unit)
    axis.set_xlabel(f"{name} a period")
    axis.tick_params(length=0)
