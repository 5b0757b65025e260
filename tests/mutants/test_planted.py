"""The suites catch the bugs that are planted for them: one in each run, which rotates, and all of them in nightly runs.

`python -m tests.mutants` runs all, and prints the table that tests/README.md keeps.
"""

from __future__ import annotations

import os

import pytest

from tests.mutants.plant import ROOT, hunt
from tests.mutants.planted import MUTANTS, Mutant

A_FEW = 1
ROTATION = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)
CAUGHT = [mutant for mutant in MUTANTS if not mutant.at_large]
QUICK = [mutant for mutant in CAUGHT if not mutant.rare]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
CHOSEN = CAUGHT if NIGHTLY else [QUICK[(ROTATION * A_FEW + index) % len(QUICK)] for index in range(A_FEW)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda mutant: mutant.name)
def test_it_is_caught(mutant: Mutant) -> None:
    verdict = hunt(mutant)
    assert verdict.caught, f"nothing notices that {mutant.name}"


@pytest.mark.parametrize("module", sorted({mutant.module for mutant in MUTANTS}))
def test_every_one_fits_the_code(module: str) -> None:
    text = (ROOT / "tierstore" / module).read_text(encoding="utf-8")
    lost = [mutant.name for mutant in MUTANTS if mutant.module == module and text.count(mutant.right) != 1]
    assert not lost, f"what these change has changed: plant them anew, in tests/mutants/planted.py: {lost}"


def test_names_tell_them_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len(CAUGHT) >= 40
