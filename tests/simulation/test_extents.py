"""Leases that write all of their extent themselves, on a simulated GPU: right behind evictions, moves, and copies in that nobody awaited.

Small extents and large ones take turns at the same place, which drawn scenarios do too seldom.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.simulation.run import run
from tests.simulation.scenario import FRESH, SCRATCH, SPENT, BlockPlan, Call, Scenario

ROTATION = int(os.environ.get("TIERSTORE_SIMULATION_BASE") or os.environ.get("GITHUB_RUN_NUMBER") or 0)
SEEDS = 1500 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 60
CHUNK = 30


def crowded(seed: int) -> Scenario:
    """One or two threads, blocks and gradients of many lengths, and a device on which about half of them fit."""
    choose = random.Random(f"extents {seed}")
    blocks = tuple(BlockPlan(f"b{index}", choose.choice((1, 2, 3, 4))) for index in range(choose.randint(2, 4)))
    blanks = tuple(BlockPlan(f"g{index}", choose.choice((1, 1, 2, 3, 4))) for index in range(choose.randint(2, 4)))
    pages = {plan.name: plan.pages for plan in (*blocks, *blanks)}
    total = sum(pages.values())

    def call() -> Call:
        draw = choose.random()
        block, blank = choose.choice(blocks).name, choose.choice(blanks).name
        if draw < 0.5:
            return ("use", ((blank, choose.choice((FRESH, FRESH, SCRATCH, SCRATCH, SPENT))),), None, 0, ())
        if draw < 0.8:
            return ("use", ((block, choose.random() < 0.7),), None, 0, ())
        return choose.choice((("prefetch", block), ("evict", block), ("evict", blank), ("sleep", 10)))

    threads = tuple(tuple(call() for _ in range(30)) for _ in range(choose.choice((1, 1, 2))))
    return Scenario(
        blocks,
        (),
        gpu_pages=choose.randint(max(pages.values()), max(*pages.values(), total * 2 // 3)),
        ram_pages=total,
        threads=threads,
        nvme=choose.random() < 0.5,
        policy=choose.choice(("lru", "lookahead", "hostile")),
        slow=choose.choice((0.0, 0.02)),
        sticky=0.8,
        cuda=True,
        blanks=blanks,
    )


@pytest.mark.parametrize("first", range(ROTATION * SEEDS, (ROTATION + 1) * SEEDS, CHUNK))
def test_every_earlier_use_is_waited_for(first: int) -> None:
    for seed in range(first, first + CHUNK):
        outcome = run(crowded(seed), seed)
        assert outcome.failure is None, f"seed {seed}: {outcome.failure}\n{outcome.world.story(60)}"


def test_a_copy_in_that_nobody_awaited_is_waited_for_behind_a_shorter_one() -> None:
    """The long block is fetched ahead and given up, a short one takes its beginning, and a lease that writes all of its extent the rest."""
    blocks, gradient = (BlockPlan("long", 4), BlockPlan("short", 1)), BlockPlan("g0", 3)
    ahead = (("prefetch", "long"), ("sleep", 5), ("evict", "long"), ("hold", "short", "gpu"))  # what is held lies at the low end
    calls = (*ahead, ("use", (("g0", SCRATCH),), None, 0, ()), ("unhold", "short"), ("evict", "short"))
    for seed in range(40):
        outcome = run(Scenario(blocks, (), 4, 8, threads=(calls * 4,), nvme=False, slow=0.0, cuda=True, blanks=(gradient,)), seed)
        assert outcome.failure is None, f"seed {seed}: {outcome.failure}\n{outcome.world.story(60)}"
