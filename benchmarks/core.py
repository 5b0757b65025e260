"""How fast the core of the store is, beside a bare loop that does nothing else.

python benchmarks/core.py [--part NAME ...] [--device cpu|cuda] [--dir DIRECTORY] [--quick] [--output FILE]

Each part runs the store and what it is compared with in turns within one process, so that whatever else the machine does
touches both. It prints a table, and writes every repetition to `benchmarks/results/core-DEVICE.json` with the machine and the
versions. Named parts only are measured anew; the rest of an existing file stays. `--quick` runs everything on a small scale: it
shows that the benchmark works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.core_parts import calls, long, streaming  # noqa: E402 - the path is set only now
from benchmarks.core_parts.measure import Plan, Row  # noqa: E402
from tierstore.hardware import machine_facts  # noqa: E402

PARTS: dict[str, Callable[[Plan], list[Row]]] = {
    "use": calls.use,
    "copies": streaming.copies,
    "drive": streaming.drive,
    "scale": calls.scale,
    "waiters": calls.waiters,
    "directory": long.directory,
    "million": long.million,
}

LIBRARIES = ("aiofiles", "filelock", "sortedcontainers", "torch", "xxhash")


def show(part: str, rows: list[Row], seconds: float, *, quick: bool) -> None:
    print(f"\n{part} ({seconds:.0f} s)")
    for row in rows:
        spread = f"{min(row.repetitions):.3g} to {max(row.repetitions):.3g}"
        verdict = "" if quick else {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"  {row.what:66} {row.value:9.3g} {row.unit:8} {spread:>18}  {'' if quick else row.target:7} {verdict}")


def measure(plan: Plan, parts: list[str], output: Path) -> dict[str, Any]:
    """Run the parts, show each as it ends, and keep what is known so far in `output`."""
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"parts": {}}
    report["machine"] = machine_facts()
    report["versions"] = {library: version(library) for library in LIBRARIES}
    for name in parts:
        start = time.perf_counter()
        rows = PARTS[name](plan)
        seconds = time.perf_counter() - start
        show(name, rows, seconds, quick=plan.quick)
        report["parts"][name] = {
            "device": str(plan.device),
            "quick": plan.quick,
            "seconds": round(seconds, 1),
            "rows": [asdict(row) | {"met": row.met} for row in rows],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given several times")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dir", type=Path, help="where to make stores; on the drive to be measured (default: the system's temporary directory)"
    )
    parser.add_argument("--quick", action="store_true", help="a small scale, to see that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/core-DEVICE.json)")
    options = parser.parse_args(arguments)
    logging.getLogger("tierstore").setLevel(logging.ERROR)  # stores are closed with changes that were never to be kept
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    output = options.output or ROOT / "benchmarks" / "results" / f"core-{options.device}.json"
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="tierstore-bench-") as directory:
        measure(Plan(device, Path(directory), options.quick), options.part or list(PARTS), output)
    if options.quick:
        print("\n--quick: on so small a scale these numbers mean nothing, and are not held against the targets")
    print(f"\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
