"""The losses of a run as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from tierstore.finetune.options import FinetuneError

INSTALL = 'pip install "tierstore[demo]"'


def require_matplotlib() -> None:
    """Say before a run that it could not be drawn.

    Raises:
        FinetuneError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise FinetuneError(f"matplotlib, which draws the losses, is not installed: {INSTALL}, or add --no-plot")


def draw(path: Path, losses: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> None:
    """Write a PNG: (step, loss) of training, and of what was held out."""
    import matplotlib  # noqa: PLC0415  # slow to import, and of an extra

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415  # as above

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    try:
        axes.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=1, color="#4878a8", label="training")
        if held_out:
            axes.plot([step for step, _ in held_out], [loss for _, loss in held_out], "o-", color="#c44e52", label="held out")
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)
