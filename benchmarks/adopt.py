"""How fast adopted models are read from a cold cache, beside a bare threaded read of the same files.

python benchmarks/adopt.py [--part NAME ...] [--device cpu|cuda] [--dir DIRECTORY] [--quick] [--output FILE]

The store brings every block of a model into RAM; the bare loop reads the same files, whole, with `preadv` on four threads, 16 MiB at a
time, into the store's own transfer space. Both read past the page cache, or find it emptied where that cannot be had; they take turns
within one process. It prints a table, and writes every repetition to `benchmarks/results/adopt-DEVICE.json` with the machine and the
versions. `--quick` runs everything on a small scale: it shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core_parts import adopting, command

PARTS: command.Parts = {"ordered": adopting.ordered, "scattered": adopting.scattered}


def main(arguments: list[str] | None = None) -> int:
    return command.run("adopt", __doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
