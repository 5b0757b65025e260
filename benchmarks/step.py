"""How near a training step comes to the least time that this machine's links, drive and processor allow.

python benchmarks/step.py [--regime NAME ...] [--clipped | --unclipped] [--dir DIRECTORY] [--quick] [--output FILE]
    [--timelines DIRECTORY] [--plot FILE]

A GPT in 16 bits with fp32 masters and AdamW, the whole process capped at 8 GB of device memory. Each regime is trained without clipping
(updates in the backward pass) and with clipping (updates deferred), and held against its floor: the compute time, measured with everything
resident, and the bytes that have to cross each link over the rates that were probed in the same run. One JSON line per run is printed; all
go to `benchmarks/results/step-DEVICE.json`, where a run replaces its last one.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # what is reserved and not used counts under the cap too

import torch

from benchmarks.step_parts import parts, regimes, resident
from benchmarks.step_parts.links import Probe
from benchmarks.step_parts.model import SHAPES
from benchmarks.step_parts.regimes import GIB, Measured, Regime
from tierstore.hardware import machine_facts

ROOT = Path(__file__).parents[1]

CAP_BYTES = 8_000_000_000
"""Of device memory that the process may take, the CUDA context not counted."""

REGIMES = {
    "weights-resident-16k": Regime(
        "1.3B",
        16_384,
        4_800_000_000,
        20 * GIB,
        "gpu",
        micro_batch=8,
        deferred_layers=6,
        targets=(0.95, 0.90),
    ),
    "weights-resident-4k": Regime("1.3B", 4_096, 6_500_000_000, 20 * GIB, "gpu", targets=(0.92, 0.90)),
    "weights-streamed": Regime("6.7B", 16_384, 1_500_000_000, 112_000_000_000, "ram", micro_batch=1, targets=(0.92, 0.88)),
    "state-on-nvme": Regime("1.3B", 16_384, 4_300_000_000, 7 * GIB, "gpu", nvme=True, micro_batch=8, targets=(0.90, 0.88)),
    "all-on-nvme": Regime("1.3B", 16_384, 4_300_000_000, 4_000_000_000, "nvme", nvme=True, micro_batch=8, targets=(0.90, None)),
    "inference": Regime("6.7B", 1_024, 5_000_000_000, 16_000_000_000, "ram", trains=False, targets=(0.95, None)),
}

STATE_BYTES = 12 * SHAPES["1.3B"].parameters
PASSING_BYTES = 1_000_000_000
"""Of RAM, for what passes through where no state stays there."""

EXTRA = (
    {
        f"state-in-ram-{quarters}-of-4": Regime(
            "1.3B",
            4_096,
            4_300_000_000,
            max(PASSING_BYTES, quarters * STATE_BYTES // 4 + (quarters == 4) * PASSING_BYTES),
            "gpu",
            nvme=True,
            targets=(0.85, None),
        )
        for quarters in range(5)
    }
    | {
        f"micro-batches-{count}": Regime("1.3B", 16_384, 1_250_000_000, 20 * GIB, "ram", micro_batch=64 // count, context=256)
        for count in (1, 8, 64)
    }
    | {"largest": Regime("9B", 4_096, 2_500_000_000, 100_000_000_000, "ram", nvme=True, micro_batch=2, repeats=True)}
)
"""Run only when named: RAM for parts of the state, drawn by `--plot`; 64 rows in one micro-batch or many, which move the same bytes; and
the largest model that is to train (three steps, no warm-up)."""

FAMILIES = ("state-in-ram", "micro-batches")
"""Names for all that begin so."""


def quick(regime: Regime) -> Regime:
    """So small that it shows only that the benchmark works."""
    late = min(1, regime.deferred_layers)
    return replace(regime, model="tiny", tokens=2_048, gpu=40_000_000, ram=120_000_000, micro_batch=1, deferred_layers=late)


def merged(output: Path, measured: Measured, *, small: bool) -> dict[str, Any]:
    """Put a run in the place of its last one."""
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"runs": {}}
    report["machine"] = facts = machine_facts()
    report["versions"] = {"torch": version("torch")}
    key = f"{measured.regime} {'clipped' if measured.clipped else 'unclipped'}"
    report["runs"][key] = asdict(measured) | {"quick": small, "gpu": facts.get("gpu")}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def show(measured: Measured) -> None:
    target = "" if measured.target is None else f"  (wanted: {measured.target})"
    name = f"{measured.regime} {'clipped' if measured.clipped else 'unclipped'}"
    print(f"{name:32} step {measured.median:7.3f} s  floor {measured.floor['seconds']:7.3f} s by {measured.floor['busiest']}")
    print(f"{'':32} fraction {measured.fraction:.3f}{target}")
    print(json.dumps({key: value for key, value in asdict(measured).items() if key not in ("rates", "losses")}), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--regime", action="append", choices=[*REGIMES, *EXTRA, *FAMILIES], help="only this one; may be given several times"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--clipped", action="store_true", help="only with clipping")
    only.add_argument("--unclipped", action="store_true", help="only without")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dir", type=Path, help="on the drive to be measured (default: the system's temporary directory)")
    parser.add_argument("--warm-up", type=int, default=20, help="steps that are not measured (default: 20: a plan takes about ten)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are (default: 5)")
    parser.add_argument("--timelines", type=Path, help="a directory for the timelines of all runs")
    parser.add_argument("--quick", action="store_true", help="a small scale, to see that it works")
    parser.add_argument("--plot", type=Path, help="draw the runs with RAM for parts of the state to this file, and measure nothing")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/step-DEVICE.json)")
    options = parser.parse_args(arguments)
    logging.getLogger("tierstore").setLevel(logging.ERROR)
    output = options.output or ROOT / "benchmarks" / "results" / f"step-{options.device}.json"
    if options.plot is not None:
        parts.draw(json.loads(output.read_text(encoding="utf-8"))["runs"], options.plot)
        return 0
    if options.device == "cpu" and not options.quick:
        print("no CUDA device here: only --quick runs")
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    computed: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="tierstore-step-") as made:
        directory = Path(made)
        for name in _named(options.regime):
            regime = (REGIMES | EXTRA)[name]
            regime = quick(regime) if options.quick else regime
            key = (regime.model, regime.tokens, regime.context, regime.micro_batch, regime.trains)
            if key not in computed:
                _cap(device, None)
                computed[key] = resident.measure(
                    SHAPES[regime.model], regime.rows, regime.context, regime.micro_batch, device, trains=regime.trains
                )
                _forget(device)
            print(f"{name}: computing alone takes {computed[key].total:.3f} s", flush=True)
            _cap(device, None if options.quick else CAP_BYTES)
            probe = Probe(device, directory / f"probe {name}" if regime.nvme else None)
            try:
                for clipped in (False, True):
                    once = not regime.trains or name == "all-on-nvme" or name in EXTRA
                    if (clipped and (options.unclipped or once)) or (options.clipped and not clipped):
                        continue
                    file = f"{name}-{'clipped' if clipped else 'unclipped'}.json"
                    timeline = options.timelines / file if options.timelines else None
                    measured = regimes.measure(
                        name,
                        regime,
                        computed[key],
                        probe,
                        device,
                        directory,
                        clipped=clipped,
                        warm_up=0 if regime.repeats else options.warm_up,
                        steps=options.steps,
                        timeline=timeline,
                    )
                    show(measured)
                    merged(output, measured, small=options.quick)
                    _forget(device)
            finally:
                probe.close()
    print(output)
    return 0


def _named(names: list[str] | None) -> list[str]:
    """The regimes to run."""
    found: list[str] = []
    for name in names or REGIMES:
        found += [extra for extra in EXTRA if extra.startswith(name + "-")] if name in FAMILIES else [name]
    return found


def _cap(device: torch.device, nbytes: int | None) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if nbytes is None else nbytes / total, device)


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
