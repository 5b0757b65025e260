"""How fast the core of the store is, beside a bare loop that does nothing else.

python benchmarks/core.py [--part NAME ...] [--device cpu|cuda] [--dir DIRECTORY] [--quick] [--output FILE]

Each part runs the store and what it is compared with in turns within one process, so that whatever else the machine does
touches both. It prints a table, and writes every repetition to `benchmarks/results/core-DEVICE.json` with the machine and the
versions. Named parts only are measured anew; the rest of an existing file stays. `--quick` runs everything on a small scale: it
shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.core_parts import calls, command, long, streaming

PARTS: command.Parts = {
    "use": calls.use,
    "copies": streaming.copies,
    "drive": streaming.drive,
    "scale": calls.scale,
    "waiters": calls.waiters,
    "directory": long.directory,
    "million": long.million,
}


def main(arguments: list[str] | None = None) -> int:
    return command.run("core", __doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
