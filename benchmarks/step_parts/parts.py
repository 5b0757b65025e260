"""The time of a step by how much of the optimizer's state RAM has room for, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Steps and their floors, of the runs `state-in-ram-*`.

    Raises:
        SystemExit: There are none.
    """
    import matplotlib as mpl  # noqa: PLC0415 - of the extra `demo`

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    found = [run for name, run in runs.items() if name.startswith("state-in-ram")]
    found.sort(key=lambda run: run["settings"]["work"]["state_in_ram"])
    if not found:
        raise SystemExit("no runs of state-in-ram in this file")
    shares = [run["settings"]["work"]["state_in_ram"] for run in found]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(shares, [run["median"] for run in found], "o-", label="a step")
    axes.plot(
        shares,
        [run["floor"]["seconds"] for run in found],
        "s--",
        color="0.5",
        label="its floor, by the rates of the same run",
    )
    for share, run in zip(shares, found, strict=True):
        axes.annotate(f"{run['fraction']:.2f}", (share, run["median"]), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axes.set_xlabel("RAM, as a share of the optimizer's state")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0)
    axes.set_title("RAM is a cache: the numbers are floor / step", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
