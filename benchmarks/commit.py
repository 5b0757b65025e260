"""What commits cost beside training steps of five seconds, in time, bytes and disk.

python benchmarks/commit.py [--part NAME ...] [--device cpu|cuda] [--dir DIRECTORY] [--quick] [--output FILE]

Every ratio is taken within one run: a commit beside the step before it, a step with a commit under way beside one without. It prints a
table, and writes every repetition to `benchmarks/results/commit-DEVICE.json` with the machine and the versions. `--quick` runs
everything on a small scale: it shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core_parts import command, commits

PARTS: command.Parts = {"wait": commits.waiting, "no-wait": commits.going_on, "unchanged": commits.unchanged}


def main(arguments: list[str] | None = None) -> int:
    return command.run("commit", __doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
