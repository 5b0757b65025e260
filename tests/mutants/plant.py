"""Plants a bug in a copy of the package, and runs against the copy what should catch it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.planted import Mutant

ROOT = Path(__file__).parents[2]
SEEDS = 1000
CRASH_SEEDS = 100
HANGS_AFTER_S = 600.0
"""A mutant may make the engine spin under its lock, where no simulation can end it."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        caught: By what, empty if it survived.
        seeds: Seeds of the simulation or the crash suite that it took; 0 where a test file caught it.
        how: The first line of the failure.
    """

    caught: str
    seeds: int
    how: str
    seconds: float


@contextmanager
def planted(mutant: Mutant) -> Iterator[Path]:
    """A directory with the tests and a package that has the bug."""
    path = ROOT / "tierstore" / mutant.module
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.right) != 1:
        raise AssertionError(f"the mutant {mutant.name!r} no longer fits {mutant.module}: plant it anew")
    with tempfile.TemporaryDirectory(prefix="tierstore-mutant-") as directory:
        root = Path(directory)
        shutil.copytree(ROOT / "tierstore", root / "tierstore", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        mutated = text.replace(mutant.right, mutant.wrong)
        compile(mutated, mutant.module, "exec")
        (root / "tierstore" / mutant.module).write_text(mutated, encoding="utf-8")
        yield root


def hunt(mutant: Mutant, *, seeds: int = SEEDS) -> Verdict:
    """Plant a mutant, and run its suite until the first failure."""
    begun = time.monotonic()
    with planted(mutant) as root:
        if mutant.suite == "simulation":
            command = ["-m", "tests.simulation", "--seeds", f"0:{seeds}", "--stop"]
        elif mutant.suite.startswith("crash "):
            command = ["-m", "tests.crash", "--level", mutant.suite.split()[1], "--seeds", f"0:{min(seeds, CRASH_SEEDS)}", "--stop"]
        else:
            command = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", "60", mutant.suite]
        try:
            done = run_in(root, *command)
        except subprocess.TimeoutExpired:
            return Verdict(mutant.suite, 0, "hangs", time.monotonic() - begun)
    seconds = time.monotonic() - begun
    if done.returncode not in (0, 1):
        raise AssertionError(f"the suite could not run on {mutant.name!r}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if not done.returncode:
        return Verdict("", 0, "survived", seconds)
    found = re.search(r"^seed (\d+) fails: (.*)$", done.stdout, re.MULTILINE)
    if found:
        return Verdict(mutant.suite, int(found[1]) + 1, found[2], seconds)
    if mutant.suite.split()[0] in ("simulation", "crash"):
        raise AssertionError(f"the {mutant.suite} suite could not run on {mutant.name!r}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    first = re.search(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE)
    return Verdict(mutant.suite, 0, first[1] if first else "failed", seconds)


def run_in(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=root, env=settings, capture_output=True, text=True, check=False, timeout=HANGS_AFTER_S
    )
