"""A training step of `benchmarks/step.py`, and a forward pass, beside what else there is for PyTorch.

python benchmarks/peers.py [--only NAME ...] [--dir DIRECTORY] [--quick] [--output FILE]

The same model from the same values, the same batches, 16 bits, and the same cap on the device memory of the process: trained by tierstore,
by FSDP2 with CPUOffloadPolicy and by torchao's CPUOffloadOptimizer; run forward by tierstore and by accelerate. Each contender has a fresh
process of its own, one after the other. A table is printed; the numbers go to `benchmarks/results/peers-DEVICE.json`, where a contender
replaces what it did last time, and a bar chart beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import step
from benchmarks.peers_parts.contenders import CONTENDERS, TRAINING
from benchmarks.peers_parts.measure import Row, blank, measure, run
from benchmarks.step_parts.regimes import Regime
from tierstore.hardware import machine_facts

ROOT = Path(__file__).parents[1]
PARTS = {TRAINING: "training, not clipped", "inference": "forward only"}
WANTED = 1.5
"""Times the tokens per second of FSDP2, with no more RAM."""


def regime_of(name: str, *, quick: bool) -> Regime:
    regime = step.REGIMES[CONTENDERS[name].regime]
    return replace(step.quick(regime), tokens=1_024) if quick else regime


def apart(name: str, options: argparse.Namespace) -> Row:
    """Measure a contender in a process of its own. One that dies has a row too."""
    if not CONTENDERS[name].installed:
        row = blank(name, regime_of(name, quick=options.quick))
        row.error = "not installed"
        return row
    with tempfile.TemporaryDirectory(prefix="tierstore-peers-") as made:
        path = Path(made) / "row.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--json", str(path), "--device", options.device]
        command += ["--warm-up", str(options.warm_up), "--steps", str(options.steps)]
        command += [*(["--quick"] if options.quick else []), *(["--dir", str(options.dir)] if options.dir else [])]
        ended = run(command, options.timeout)
        if path.exists():
            row = Row(**json.loads(path.read_text(encoding="utf-8")))
        else:
            row = blank(name, regime_of(name, quick=options.quick))
            how = f"took more than {options.timeout:.0f} s" if ended.code is None else f"ended with code {ended.code}"
            row.error = f"{how}: {ended.output.splitlines()[-1]}" if ended.output else how
        if row.error:
            print(ended.output, file=sys.stderr)
    return row


def compared(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What tierstore did beside FSDP2, if both were measured in one call."""
    ours, theirs = rows.get("tierstore"), rows.get("fsdp2")
    if not ours or not theirs or ours["call"] != theirs["call"] or ours["error"] or theirs["error"]:
        return None
    return {
        "speed": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "wanted": WANTED,
        "ram": [ours["memory"]["ram"], theirs["memory"]["ram"]],
        "process peak": [ours["memory"]["process peak"], theirs["memory"]["process peak"]],
    }


def merged(output: Path, row: Row, call: str, *, small: bool) -> dict[str, Any]:
    """Put a row in the place of its last one."""
    report: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"rows": {}}
    kept = asdict(row) | {"call": call, "quick": small}
    # The process that measured says it: this one leaves the GPU alone, which the context alone would take memory from.
    report["machine"] = kept.pop("machine") or report.get("machine") or machine_facts()
    report["cap_bytes"] = step.CAP_BYTES
    report["rows"][row.name] = kept | {"gpu": report["machine"].get("gpu")}
    report["tierstore and fsdp2"] = compared(report["rows"])
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def show(report: Mapping[str, Any]) -> None:
    """The table. Bytes are decimal gigabytes."""
    heads = ("step s", "tokens/s", "GPU GB", "RAM GB", "RSS GB", "locked GB", "first losses")
    for regime, title in PARTS.items():
        rows = [report["rows"][name] for name, contender in CONTENDERS.items() if contender.regime == regime and name in report["rows"]]
        if not rows:
            continue
        settings = rows[0]["settings"]
        print(f"\n{title}: {settings['model']}, {settings['tokens']:,} tokens")
        print(f"  {'':20}" + "".join(f"{head:>{26 if head == heads[-1] else 10}}" for head in heads))
        for row in rows:
            if row["error"]:
                print(f"  {row['name']:20}  {row['error'].splitlines()[0]}")
                continue
            keys = ("device peak", "ram", "process peak", "page-locked")
            memory = "".join(f"{row['memory'].get(key, 0) / 1e9:10.2f}" for key in keys)
            losses = " ".join(f"{loss:.4f}" for loss in row["losses"][:3])
            print(f"  {row['name']:20}{row['median']:10.3f}{row['tokens_per_s']:10,.0f}{memory}{losses:>26}")
        for row in rows:
            lacks = f"; lacks {row['lacks']}" if row["lacks"] else ""
            print(f"    {row['name']}: {row['title']}{lacks}")
    if comparison := report["tierstore and fsdp2"]:
        ram = "RAM {:.1f} GB against {:.1f} GB".format(*(nbytes / 1e9 for nbytes in comparison["ram"]))
        print(f"\ntierstore has {comparison['speed']:.2f} times the tokens/s of FSDP2 (wanted: {WANTED}), {ram}")


def draw(report: Mapping[str, Any], path: Path) -> None:
    try:
        from benchmarks.peers_parts import picture  # noqa: PLC0415 - matplotlib is an extra
    except ImportError:
        print('No picture: it needs matplotlib (pip install ".[demo]").')
        return
    parts = []
    for regime, title in PARTS.items():
        rows = [report["rows"][name] for name, contender in CONTENDERS.items() if contender.regime == regime and name in report["rows"]]
        if rows:
            settings = rows[0]["settings"]
            parts.append((f"{title}: {settings['model']}, {settings['tokens']:,} tokens", rows))
    facts = report["machine"]
    cap = "" if facts["gpu"] is None else f", process capped at {report['cap_bytes'] / 1e9:.0f} GB"
    picture.draw(parts, f"{facts['gpu'] or facts['cpu']}{cap}", path)
    print(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=CONTENDERS, help="only this one; may be given several times")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dir", type=Path, help="for the files that a contender makes (default: the system's temporary directory)")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not measured (default: 4)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are (default: 5)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds that a contender may take (default: 240)")
    parser.add_argument("--quick", action="store_true", help="a small scale, to see that it works")
    parser.add_argument("--output", type=Path, help="the JSON file (default: benchmarks/results/peers-DEVICE.json)")
    parser.add_argument("--json", type=Path, help="measure the one contender of --only in this process, and write its row there")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.warm_up < 0:
        parser.error("--steps wants at least 1, --warm-up at least 0")
    if options.json and len(options.only or ()) != 1:
        parser.error("--json wants one --only")
    if options.device == "cpu" and not options.quick:
        print("no CUDA device here: only --quick runs")
        return 0
    if options.json:
        row = here(options.only[0], options)
        options.json.write_text(json.dumps(asdict(row)), encoding="utf-8")
        return 0
    output = options.output or ROOT / "benchmarks" / "results" / f"peers-{options.device}.json"
    call = time.strftime("%Y-%m-%dT%H:%M:%S")
    report: dict[str, Any] = {}
    for name in dict.fromkeys(options.only or CONTENDERS):
        begun = time.perf_counter()
        row = apart(name, options)
        print(f"{name}: {row.error or f'{row.median:.3f} s a step'} ({time.perf_counter() - begun:.0f} s in all)", flush=True)
        report = merged(output, row, call, small=options.quick)
    show(report)
    print(output)
    draw(report, output.with_suffix(".png"))
    return 0


def here(name: str, options: argparse.Namespace) -> Row:
    """Measure a contender in this process."""
    logging.getLogger("tierstore").setLevel(logging.ERROR)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    regime = regime_of(name, quick=options.quick)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="tierstore-peers-") as made:
        cap_bytes = None if options.quick else step.CAP_BYTES
        return measure(name, regime, device, cap_bytes, Path(made), warm_up=options.warm_up, steps=options.steps)


if __name__ == "__main__":
    sys.exit(main())
