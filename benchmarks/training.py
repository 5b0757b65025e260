"""What training through a store costs where everything would have fitted, beside plain torch.

python benchmarks/training.py [--part NAME ...] [--device cpu|cuda] [--dir DIRECTORY] [--quick] [--output FILE]

100 layers of a million parameters each, all resident. Three loops take their steps in turn: through the store; the resident reference,
which recomputes its layers as streaming does; and the plain loop, which keeps all activations. Ratios are taken step by step. It prints
a table, and writes every repetition to `benchmarks/results/training-DEVICE.json` with the machine and the versions. `--quick` runs
everything on a small scale: it shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core_parts import command, training

PARTS: command.Parts = {"step": training.at_step, "deferred": training.deferred, "backward": training.in_backward}


def main(arguments: list[str] | None = None) -> int:
    return command.run("training", __doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
