"""What the benchmarks of single parts share: options, a table as each part ends, and one JSON file that grows part by part."""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.core_parts.measure import Plan, Row
from tierstore.hardware import machine_facts

ROOT = Path(__file__).parents[2]
LIBRARIES = ("aiofiles", "filelock", "sortedcontainers", "torch", "xxhash")

Parts = Mapping[str, Callable[[Plan], list[Row]]]


def show(part: str, rows: list[Row], seconds: float, *, quick: bool) -> None:
    print(f"\n{part} ({seconds:.0f} s)")
    for row in rows:
        spread = f"{min(row.repetitions):.3g} to {max(row.repetitions):.3g}"
        verdict = "" if quick else {True: "met", False: "MISSED", None: ""}[row.met]
        print(f"  {row.what:66} {row.value:9.3g} {row.unit:8} {spread:>18}  {'' if quick else row.target:7} {verdict}")


def measure(plan: Plan, parts: Parts, output: Path) -> dict[str, Any]:
    """Run the parts, show each as it ends, and keep what is known so far in `output`."""
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"parts": {}}
    report["machine"] = machine_facts()
    report["versions"] = {library: version(library) for library in LIBRARIES}
    for name, part in parts.items():
        start = time.perf_counter()
        rows = part(plan)
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


def run(stem: str, description: str | None, parts: Parts, arguments: list[str] | None = None) -> int:
    """Measure what the arguments name. Returns the exit code.

    Args:
        stem: The results go to `benchmarks/results/STEM-DEVICE.json`.
        description: For `--help`.
        parts: All there are, by name.
        arguments: None: those of the process.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=parts, help="only this one; may be given several times")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dir", type=Path, help="where to make stores; on the drive to be measured (default: the system's temporary directory)"
    )
    parser.add_argument("--quick", action="store_true", help="a small scale, to see that it works")
    parser.add_argument("--output", type=Path, help=f"the JSON file (default: benchmarks/results/{stem}-DEVICE.json)")
    options = parser.parse_args(arguments)
    logging.getLogger("tierstore").setLevel(logging.ERROR)  # stores are closed with changes that were never to be kept
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured")
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    output = options.output or ROOT / "benchmarks" / "results" / f"{stem}-{options.device}.json"
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="tierstore-bench-") as directory:
        measure(Plan(device, Path(directory), options.quick), {name: parts[name] for name in options.part or parts}, output)
    if options.quick:
        print("\n--quick: on so small a scale these numbers mean nothing, and are not held against the targets")
    print(f"\n{output}")
    return 0
