"""Random calls under random faults, on both faces; a failing example shrinks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.driver import Driver, opened, pages, reopened
from tests.faults.plan import FAULTS, FaultyFiles, Plan, Strike, put_under
from tests.faults.workloads import GPU, RAM
from tests.quiet import assert_quiet
from tierstore import AsyncTierStore
from tierstore.catalog import PAGE
from tierstore.errors import TierFullError, TierstoreError, TransferError

NAMES = [f"b{number}" for number in range(7)]
names = st.sampled_from(NAMES)
tiers = st.sampled_from(["gpu", "ram", "nvme"])
calls = st.one_of(
    st.tuples(st.just("use"), names, names, st.booleans()),
    st.tuples(st.sampled_from(["read", "write", "evict", "prefetch", "renew"]), names),
    st.tuples(st.just("hold"), tiers),
    st.tuples(st.sampled_from(["unhold", "flush", "commit"])),
)
strikes = st.sampled_from([(kind, fault) for kind in FAULTS for fault in FAULTS[kind]])


def carry_out(driver: Driver, script: list[tuple[object, ...]]) -> None:
    for call, *arguments in script:
        if call == "use":
            one, other, both = arguments
            chosen = dict.fromkeys((str(one), str(other)))
            driver.use(*chosen, write=list(chosen) if both else [str(one)])
        elif call == "renew":
            driver.delete(str(arguments[0]))
            driver.put(str(arguments[0]), 3, "nvme")
        elif call == "hold":
            driver.hold("b0", str(arguments[0]))
        elif call == "unhold":
            driver.unhold("b0")
        elif call == "evict" and arguments == ["b0"]:
            driver.unhold("b0")
            driver.evict("b0")
        else:
            getattr(driver, str(call))(*arguments)


@settings(max_examples=settings().max_examples // 2)
@given(st.lists(calls, min_size=5, max_size=25), strikes, st.integers(0, 30), st.booleans())
def test_random_calls_under_a_fault(script: list[tuple[object, ...]], what: tuple[str, str], number: int, lasting: bool) -> None:
    plan = Plan(Strike(what[0], number, what[1], lasting))
    with TemporaryDirectory() as path:
        with opened(Path(path), plan, gpu=GPU + 2, ram=RAM) as store:
            driver = Driver(store, plan)
            for name in NAMES:
                driver.put(name, 2, "ram")
            carry_out(driver, script)
            plan.heal()
            driver.check()
        found = reopened(Path(path))
        assert found.keys() == driver.committed.keys()
        assert all(torch.equal(found[name], value) for name, value in driver.committed.items())


@pytest.mark.parametrize(
    ("kind", "fault"), [("read", "EIO"), ("write", "ENOSPC"), ("h2d", "torn"), ("d2h", "killed"), ("host", "no thread")]
)
def test_tasks_hear_of_what_they_depend_on(tmp_path: Path, kind: str, fault: str) -> None:
    """Many tasks at once; of those that fail each names a block, and all succeed when they ask again."""
    plan = Plan()

    failures: list[TierstoreError] = []

    async def train(store: AsyncTierStore, name: str, turns: int) -> None:
        for _ in range(turns):
            try:
                async with store.use(name, write=True, timeout=60) as tensor:
                    tensor.add_(1)
                    continue
            except (TransferError, TierFullError) as error:
                failures.append(error)
            plan.heal()
            async with store.use(name, write=True, timeout=60) as tensor:
                tensor.add_(1)

    async def go() -> None:
        with mock.patch("tierstore.nvme.directory.LocalFiles", return_value=FaultyFiles(plan)):
            store = await AsyncTierStore(gpu=GPU * PAGE, ram=(RAM + 4) * PAGE, nvme=tmp_path / "swap", device="cpu")
        async with store:
            put_under(plan, store.engine)
            for number, name in enumerate(NAMES):
                await store.put(name, pages(number, 2))
            plan.counts.clear()
            plan.strike = Strike(kind, 0, fault, lasting=True)
            if kind == "host":
                with pytest.raises(TransferError):
                    await store.read("b0")
            else:
                await asyncio.gather(*(train(store, name, 4) for name in NAMES))
                assert failures
                assert {error.block for error in failures} <= set(NAMES)
                assert {error.tier for error in failures} <= {"gpu", "ram", "nvme"}
            plan.heal()
            grown = 0 if kind == "host" else 4
            for number, name in enumerate(NAMES):
                value = await store.read(name)
                expected = pages(number, 2)
                for _ in range(grown):
                    expected.add_(1)
                assert torch.equal(value, expected), name  # type: ignore[arg-type]
            await asyncio.to_thread(assert_quiet, store)

    asyncio.run(go())
