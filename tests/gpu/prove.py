"""Runs on a machine with a GPU what continuous integration, which has none, cannot: and keeps the outcome as JSON.

python tests/gpu/prove.py benchmarks/results/gpu-NAME.json [PART ...]

Named parts only are run anew; the rest of an existing file stays.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

MUTANTS = {
    "a lease does not wait for the copy that fills its extent": (
        "                else:\n                    stream.wait_event(ready[1])",
        "                else:\n                    pass",
    ),
    "copies do not wait for earlier uses of their extent": (
        "                        if not over:\n                            stream.wait_event(event)",
        "                        if not over:\n                            pass",
    ),
    "a copy out does not wait for the move that put the block there": (
        "if order.action is Action.D2H and ready is not None:",
        "if False and ready is not None:",
    ),
    "the end of a lease notes no use": (
        "                self._note_use(offset, nbytes, stream, event)\n            self._run",
        "                pass\n            self._run",
    ),
    "a copy out notes no use": (
        "                self._note_use(order.offset_gpu, order.nbytes, stream, event)",
        "                pass",
    ),
    "a lease does not wait for uses on other streams": (
        "                    if key != stream.cuda_stream and not event.query():\n                        stream.wait_event(event)",
        "                    if key != stream.cuda_stream and not event.query():\n                        pass",
    ),
    "a copy is reported done before it has landed": (
        "        self._waiters[order.action].wait_for(flight)",
        "        flight.land(None)",
    ),
}
FRESH_MUTANTS = {
    "a lease that writes all of its extent does not wait for what used it before": (
        "        stream = self._callers_stream()\n        for offset, nbytes in offsets:\n",
        "        return\n        for offset, nbytes in offsets:\n",
    ),
    "a lease that writes all of its extent does not wait for what nobody came to use": (
        "                if start < end and offset < stop and not ready.query():",
        "                if False and not ready.query():",
    ),
    "a move is no use of where it comes from": (
        "                    self._note_use(source, nbytes, stream, event)",
        "                    pass",
    ),
    "a use is forgotten behind a later one of a smaller extent": (
        "        here[stream.cuda_stream, offset + nbytes] = event\n",
        "        here = {key: use for key, use in here.items() if key[0] != stream.cuda_stream}\n"
        "        here[stream.cuda_stream, offset + nbytes] = event\n        self._uses[offset] = here\n",
    ),
    "a copy in is forgotten behind a later one of a smaller extent": (
        "                self._note_use(offset, earlier[0] - offset, self._h2d, earlier[1])",
        "                pass",
    ),
}
"""The same of leases that write all of their extent themselves."""

MUTANTS |= FRESH_MUTANTS
"""Faults planted in tierstore/mover/streams.py, each of which tests/gpu must notice."""

HUNT = "reused_ranges or mixed or another_stream or values_from or written_whole or (race_hunt and True and not static)"
"""The tests that hunt for races."""

FIRST = ("tests/gpu/test_reused_ranges.py", "tests/gpu")
"""The order in which they run: those that take a second first."""

DURABLE = (
    *("tests/nvme", "tests/crash", "tests/durability", "tests/golden"),
    *("tests/test_commit.py", "tests/test_disk_use.py", "tests/test_export.py", "tests/faults/test_lost_syncs.py"),
)
"""What depends on the machine's drive and file system rather than on its GPU."""

QUIET = ("-q", "-p", "no:cacheprovider", "-p", "no:benchmark")


def run(*command: str, **environment: str) -> tuple[int, str, float]:
    """(exit code, output, seconds) of a Python command."""
    start = time.perf_counter()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, cwd=ROOT, env=settings)
    return done.returncode, done.stdout + done.stderr, round(time.perf_counter() - start, 1)


def pytest(*arguments: str, **environment: str) -> dict[str, Any]:
    code, output, seconds = run("-m", "pytest", *QUIET, *arguments, **environment)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output.splitlines()[-1])}
    if code:
        print(output[-6000:])
    return {"exit_code": code, **counts, "seconds": seconds}


def plant_mutants() -> dict[str, str]:
    """Plant each mutant in turn and run tests/gpu until the first failure."""
    path = ROOT / "tierstore" / "mover" / "streams.py"
    original = path.read_text(encoding="utf-8")
    outcome: dict[str, str] = {}
    try:
        for name, (right, wrong) in MUTANTS.items():
            assert original.count(right) == 1, f"the mutant {name!r} no longer fits the code"
            path.write_text(original.replace(right, wrong), encoding="utf-8")
            code, output, _ = run("-m", "pytest", *QUIET, "-x", "--timeout", "60", *FIRST, "-k", HUNT)
            first = re.search(r"^FAILED \S+::(\S+)", output, re.MULTILINE)
            outcome[name] = f"caught by {first[1]}" if code == 1 and first else "survived"
    finally:
        path.write_text(original, encoding="utf-8")
    return outcome


def demo() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        code, output, seconds = run("-m", "tierstore", "demo", "--check", "--device", "cuda", "--dir", f"{directory}/demo")
    print(output[-3000:])
    verdict = re.search(r"^Check passed.*$", output, re.MULTILINE)
    return {"exit_code": code, "verdict": verdict[0] if verdict else None, "seconds": seconds}


def main(target: str, *only: str) -> int:
    sys.path.insert(0, str(ROOT))
    from tierstore.hardware import machine_facts  # noqa: PLC0415 - the path is set only now

    before = json.loads(Path(target).read_text(encoding="utf-8")) if only else {}
    report: dict[str, Any] = before | {"machine": machine_facts()}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tests/gpu": lambda: pytest("tests/gpu"),
        "state machine on cuda": lambda: pytest("tests/test_state_machine.py", TIERSTORE_TEST_DEVICE="cuda", HYPOTHESIS_PROFILE="ci"),
        "demo --check on cuda": demo,
        "files, commits and crashes": lambda: pytest(*DURABLE),
        "planted bugs": plant_mutants,
    }
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if only and name not in only:
            continue
        report[name] = part()
        Path(target).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    failed = any(isinstance(part, dict) and part.get("exit_code") for part in report.values())
    return int(failed or "survived" in report.get("planted bugs", {}).values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
