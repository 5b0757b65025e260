"""Every kind of fault, on every operation of every workload: the call that depends on it says so, nothing is lost, and a retry succeeds."""

from __future__ import annotations

import os
import random
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.faults.driver import Driver, opened, reopened
from tests.faults.plan import FAULTS, INVISIBLE, Plan, Strike
from tests.faults.workloads import GPU, RAM, WORKLOADS

ALL = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
SAMPLES = 2
"""Operations struck per workload, kind and fault, where not all are."""

CASES = [(work, kind, fault) for work in WORKLOADS for kind in FAULTS for fault in FAULTS[kind]]


def run(work: str, strike: Strike | None, path: Path, *, portable: bool = False) -> tuple[Plan, Driver]:
    """Do the work under the fault, and check all there is to check."""
    plan = Plan(strike)
    with opened(
        path, plan, gpu=GPU, ram=RAM, portable=portable, policy="lru" if strike is not None and strike.number % 2 else "lookahead"
    ) as store:
        driver = Driver(store, plan)
        WORKLOADS[work](driver)
        plan.heal()
        plan.done = plan.counts.copy()
        driver.check()
        if driver.committed:
            assert store.committed is not None
    found = reopened(path)
    assert found.keys() == driver.committed.keys()
    for name, value in driver.committed.items():
        assert torch.equal(found[name], value), f"{name!r} was committed with other values"
    return plan, driver


@cache
def counts(work: str) -> Counter[str]:
    """Operations of each kind when nothing fails."""
    with TemporaryDirectory() as path:
        plan, driver = run(work, None, Path(path))
    assert not driver.errors
    return plan.done


@pytest.mark.parametrize(("work", "kind", "fault"), CASES, ids=["-".join(case).replace(" ", "_") for case in CASES])
def test_one_operation_fails(tmp_path: Path, work: str, kind: str, fault: str) -> None:
    total = counts(work)[kind]
    numbers = list(range(total))
    if not ALL:
        numbers = sorted(random.Random(f"{work} {kind} {fault}").sample(numbers, min(SAMPLES, total)))
    for number in numbers:
        for lasting in (False, True) if ALL else (number % 2 == 1,):
            strike = Strike(kind, number, fault, lasting)
            plan, driver = run(work, strike, tmp_path / f"{number}-{lasting}", portable=number % 4 == 3)
            if (kind, fault) in INVISIBLE or not plan.struck:  # background work may differ from run to run
                assert not driver.errors, driver.errors
            elif not lasting:
                assert len(driver.errors) <= 1, driver.errors


def test_every_kind_of_operation_is_struck_somewhere() -> None:
    total = sum((counts(work) for work in WORKLOADS), Counter[str]())
    assert all(total[kind] >= 2 for kind in FAULTS), total
