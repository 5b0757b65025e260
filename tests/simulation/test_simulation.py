"""Rotating seeds of the simulation; that a seed repeats a run exactly; and what the simulation has found, so that it does not come back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.run import run
from tests.simulation.scenario import BlockPlan, Scenario, draw
from tests.simulation.seeds import run_seeds

ROOT = Path(__file__).parents[2]

BASE = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0) * 1000
SEEDS = int(os.environ.get("TIERSTORE_SIMULATION_SEEDS") or 1000)
CHUNK = 50


@pytest.mark.parametrize("first", range(BASE, BASE + SEEDS, CHUNK))
def test_seeds(first: int) -> None:
    """See tests/README.md for how the seeds rotate. `python -m tests.simulation --replay SEED` shows one."""
    part = run_seeds(first, min(first + CHUNK, BASE + SEEDS))
    assert not part.failures, "\n".join(f"seed {seed} fails: {message}" for seed, message in part.failures)


def test_a_seed_repeats_a_run_exactly() -> None:
    """Twice here, and in processes that hash otherwise."""
    seeds = range(300, 312)
    here = [run(draw(seed), seed).digest for seed in seeds]
    assert here == [run(draw(seed), seed).digest for seed in seeds]
    program = (
        "from tests.simulation.run import run; from tests.simulation.scenario import draw\n"
        f"print([run(draw(seed), seed).digest for seed in range({seeds.start}, {seeds.stop})])"
    )
    for number in ("1", "77"):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        settings = os.environ | {"PYTHONHASHSEED": number, "PYTHONPATH": path}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=settings, cwd=ROOT)
        assert done.stdout.strip() == repr(here)


def test_a_script_repeats_a_run_exactly() -> None:
    """What a seed decided, written down, leads to the same run: this is what shrinking relies on."""
    scenario = draw(301)
    first = run(scenario, 301)
    assert run(scenario, 0, first.world.decisions.taken).digest == first.digest


def hunt(scenario: Scenario, seeds: Iterable[int] = range(40)) -> None:
    """A scenario holds whatever happens first."""
    for seed in seeds:
        outcome = run(scenario, seed)
        assert outcome.failure is None, f"with the decisions of seed {seed}: {outcome.failure}\n{outcome.world.story(60)}"


def test_a_read_lease_right_after_a_write_on_the_device() -> None:
    """write() let go of the block before the engine had noted that its bytes are others: the next reader was blamed for the change."""
    block = BlockPlan("b0", 1, tier="gpu")
    writer = (("write", "b0", 0), ("sleep", 10)) * 5
    reader = (("use", (("b0", False),), None, 5, ()), ("sleep", 10)) * 5
    hunt(Scenario((block,), (), 1, 1, threads=(writer, reader)))


def test_a_lease_granted_while_the_store_is_closed() -> None:
    """The device's memory was gone between the grant and the tensors: an AttributeError, where ClosedError is promised."""
    blocks = (BlockPlan("b0", 1), BlockPlan("b1", 1))
    reader = (("use", (("b0", False),), None, 0, ()), ("use", (("b1", False),), None, 0, ())) * 8
    hunt(Scenario(blocks, (), 1, 2, threads=(reader, reader), nvme=False, slow=0.2, close_after=20), range(60))


def test_a_hold_in_ram_that_cannot_come_from_the_device() -> None:
    """The copy from the device failed, and was ordered again, and again, without end: hold() never heard of it."""
    block = BlockPlan("b0", 1, tier="gpu")
    for nvme in (True, False):
        scenario = Scenario((block,), (), 1, 1, threads=((("use", (("b0", True),), None, 0, ()), ("hold", "b0", "ram")),), nvme=nvme)
        hunt(replace(scenario, stuck=("d2h", "b0")), range(10))


def test_a_commit_holds_one_instant_even_if_it_had_to_wait_for_it() -> None:
    """A block that was put while the commit waited for a writer was left out, though what that writer wrote later was in."""
    writer = (("use", (("b0", True),), None, 500, ()),) * 4
    committer = (("commit", False), ("put", "x0"), ("sleep", 200), ("commit", False), ("put", "x1"))
    extra = (BlockPlan("x0", 1), BlockPlan("x1", 1))
    hunt(Scenario((BlockPlan("b0", 1),), extra, 2, 4, threads=(writer, committer)))


def test_a_holder_of_a_lease_overtakes_a_commit_that_waits_for_him() -> None:
    """Nothing was found here: it is what tells whether a standstill is broken in favour of the right one."""
    blocks = (BlockPlan("b0", 1), BlockPlan("b1", 1), BlockPlan("b2", 1))
    reader = (("use", (("b0", False),), None, 100, (("use", (("b1", True),), None, 0, ()),)),) * 3
    writer = (("use", (("b2", True),), None, 100, (("use", (("b0", True),), None, 0, ()),)),) * 3
    committer = (("commit", True), ("sleep", 50)) * 4
    hunt(Scenario(blocks, (), 3, 3, threads=(reader, writer, committer)))


def test_a_read_that_was_given_up_returns_as_everything_comes_to_rest() -> None:
    """Of the simulation itself: it looked for extents that belong to nobody before the engine had heard that the read has returned."""
    reader = (("use", (("b0", False),), 30, 20, ()),) * 2
    hunt(Scenario((BlockPlan("b0", 1, tier="nvme"),), (), 1, 1, threads=(reader,), faults=0.5), range(100))


def test_room_that_is_being_moved_when_its_request_times_out() -> None:
    """Nobody gave it back: it stayed taken for good, and who needed the whole device got CapacityError."""
    blocks = (BlockPlan("b0", 4), BlockPlan("b1", 2, tier="nvme"), BlockPlan("b2", 1), BlockPlan("b3", 3), BlockPlan("b4", 4, tier="gpu"))
    blocks += (BlockPlan("b5", 3), BlockPlan("b6", 1, tier="nvme"))
    one = (
        ("use", (("b4", True), ("b2", False), ("b5", True)), None, 0, ()),
        ("use", (("b6", True), ("b1", True), ("b3", True)), 30, 0, ()),
        ("use", (("b5", False), ("b4", False)), None, 0, ()),
    ) * 2
    two = (("use", (("b2", False), ("b1", False), ("b3", False)), 30, 20, ()), ("use", (("b5", False), ("b0", False)), 30, 0, ())) * 2
    hunt(Scenario(blocks, (), 9, 18, threads=(one, two), orders=1, slow=0.05, policy="lru"), range(60))
