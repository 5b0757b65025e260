"""Suites that every implementation of an interface must pass: ours, and a user's plug-in.

A suite is a class whose `test_` methods pytest collects; they use nothing of pytest and can be called one by one. Inherit from it,
say what is to be tested, and run pytest:

    class TestMine(PolicyContract):
        def make_policy(self) -> Policy:
            return Mine()
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from tierstore import TierStore
from tierstore.catalog import PAGE, BlockId
from tierstore.policies import Policy, resolve
from tierstore.residency import Tier
from tierstore.trace import Link

MEMORY = (Tier.GPU, Tier.RAM)
Call = tuple[str, BlockId, Any]


class FakeView:
    """What a policy may ask, answered from a dictionary. Asking about a block that was deleted fails, but for its size."""

    def __init__(self, capacity_bytes: int) -> None:
        self.sizes: dict[BlockId, int] = {}
        self.valid: dict[Tier, set[BlockId]] = {tier: set() for tier in Tier}
        self.dirty: set[BlockId] = set()
        self.capacity = capacity_bytes

    def nbytes(self, block: BlockId) -> int:
        return self.sizes.get(block, 0)

    def is_dirty(self, block: BlockId, tier: Tier) -> bool:
        return self._known(block) in self.dirty and block in self.valid[tier]

    def is_writable(self, block: BlockId) -> bool:
        return self._known(block) % 5 != 0

    def is_valid(self, block: BlockId, tier: Tier) -> bool:
        return self._known(block) in self.valid[tier]

    def capacity_bytes(self, tier: Tier) -> int:
        return self.capacity if tier is Tier.GPU else 2 * self.capacity

    def is_held(self, block: BlockId, tier: Tier) -> bool:
        return False

    def held_bytes(self, tier: Tier) -> int:
        return 0

    def load_cost(self, block: BlockId, tier: Tier) -> float:
        return self.sizes[block] * (1e-10 if tier is Tier.GPU else 2e-10)

    def save_cost(self, block: BlockId, tier: Tier) -> float:
        return self.sizes[block] * (1e-10 if tier is Tier.GPU else 5e-10)

    def seconds_per_byte(self, link: Link) -> float:
        return 1e-10

    def used_up(self, position: int) -> bool:
        return False

    def wrote_whole(self, position: int) -> bool:
        return False

    @property
    def seconds_between(self) -> float:
        return 1e-6

    def measure(self, wanted: bool) -> None:
        pass

    def computed(self, position: int) -> tuple[float, float] | None:
        return None

    def _known(self, block: BlockId) -> BlockId:
        assert block in self.sizes, f"the policy asks about block {block}, which was deleted"
        return block


class Play:
    """Calls a policy as the scheduler would, and keeps the book it must keep.

    Args:
        policy: Not yet bound.
        capacity_blocks: Room on the device; RAM has twice as much.
        look: Called before each eviction.
    """

    def __init__(self, policy: Policy, capacity_blocks: int, *, look: Callable[[Play], None] = lambda _: None) -> None:
        self.policy = policy
        self.room = {Tier.GPU: capacity_blocks, Tier.RAM: 2 * capacity_blocks}
        self.view = FakeView(2 * capacity_blocks * PAGE)
        self.inside: dict[Tier, dict[BlockId, None]] = {tier: {} for tier in MEMORY}
        self.now = 0
        self._look = look
        self._numbers = itertools.count()
        policy.bind(self.view)

    def new(self) -> BlockId:
        block = BlockId(next(self._numbers))
        self.view.sizes[block] = (1 + block % 3) * PAGE
        self.view.valid[Tier.NVME].add(block)
        return block

    def use(self, block: BlockId, *, write: bool = False) -> None:
        """A whole lease: asked for, brought up from NVMe with evictions as needed, perhaps written."""
        self.now += 1
        self.policy.accessed(block, write)
        self.policy.touched(block, Tier.GPU)
        for tier in (Tier.RAM, Tier.GPU):
            if block not in self.inside[tier] and not (tier is Tier.RAM and block in self.inside[Tier.GPU]):
                while len(self.inside[tier]) >= self.room[tier]:
                    self._evict(tier)
                self.admit(block, tier)
                if tier is Tier.GPU:
                    self.policy.touched(block, Tier.RAM)
        if write:
            self.view.dirty.add(block)
            if block in self.inside[Tier.RAM]:  # out of date now
                self.view.valid[Tier.RAM].discard(block)
                del self.inside[Tier.RAM][block]
                self.policy.removed(block, Tier.RAM)

    def admit(self, block: BlockId, tier: Tier) -> None:
        self.policy.admitted(block, tier)
        self.inside[tier][block] = None
        self.view.valid[tier].add(block)

    def remove(self, block: BlockId, tier: Tier) -> None:
        self.policy.removed(block, tier)
        del self.inside[tier][block]
        self.view.valid[tier].discard(block)

    def delete(self, block: BlockId) -> None:
        for tier in MEMORY:
            if block in self.inside[tier]:
                self.remove(block, tier)
        del self.view.sizes[block]

    def _evict(self, tier: Tier) -> None:
        self._look(self)
        victim = next(iter(self.policy.victims(tier)))
        assert victim in self.inside[tier], f"victims({tier}) begins with block {victim}, which is not there"
        if tier is Tier.GPU and victim in self.view.dirty and victim not in self.inside[Tier.RAM]:
            while len(self.inside[Tier.RAM]) >= self.room[Tier.RAM]:
                self._evict(Tier.RAM)
            self.admit(victim, Tier.RAM)
        self.remove(victim, tier)

    def random(self, seed: int, steps: int, *, num_blocks: int = 12, by_hand: bool = True) -> Iterator[None]:
        """Uses of all kinds, and deletions, removals by hand and new blocks, drawn from a seed; stops after each."""
        choose = random.Random(seed)
        blocks = [self.new() for _ in range(num_blocks)]
        for _ in range(steps):
            index = choose.randrange(len(blocks))
            what = choose.random()
            if what < 0.05 and by_hand:
                self.delete(blocks[index])
                blocks[index] = self.new()
            elif what < 0.1 and by_hand:
                for tier in MEMORY:
                    if blocks[index] in self.inside[tier]:
                        self.remove(blocks[index], tier)
            else:
                self.use(blocks[index], write=what > 0.7)
            yield


class PolicyContract:
    """What a policy must do, whatever it ranks by. Give `make_policy`.

    Attributes:
        seeds: How many random histories are played.
        settled_accesses: Accesses after which the policy must have stopped growing.
        max_growth: How much more an access may cost, at most, with ten times the blocks.
    """

    seeds = 20
    settled_accesses = 100_000
    max_growth = 3.0

    def make_policy(self) -> Policy:
        """A new policy, not yet bound."""
        raise NotImplementedError

    def test_it_has_the_protocol(self) -> None:
        """Every call of `tierstore.policies.Policy` is there, and two stores get two objects."""
        policy = self.make_policy()
        assert resolve(policy) is policy
        assert self.make_policy() is not policy, "each call must make a new object: a policy serves one store"

    def test_victims_are_the_admitted_ones_each_once(self) -> None:
        """After every call, on each tier, evictions, deletions and re-admissions included."""
        for seed in range(self.seeds):
            play = Play(self.make_policy(), 3 + seed % 4)
            for _ in play.random(seed, 80):
                for tier in MEMORY:
                    named = list(play.policy.victims(tier))
                    assert len(set(named)) == len(named), f"victims({tier}) names a block twice: {named}"
                    assert set(named) == set(play.inside[tier]), f"victims({tier}) is {named}, admitted are {list(play.inside[tier])}"

    def test_asking_changes_nothing(self) -> None:
        """A history with many questions in between leads to the same victims as one without.

        Nothing is deleted or removed by hand: a policy may take what leaves when it was just named for its victim.
        """
        for seed in range(self.seeds):
            quiet, asked = Play(self.make_policy(), 4), Play(self.make_policy(), 4)
            for _ in zip(quiet.random(seed, 80, by_hand=False), asked.random(seed, 80, by_hand=False), strict=True):
                for tier in MEMORY:
                    list(itertools.islice(asked.policy.victims(tier), seed % 4))
                    list(asked.policy.victims(tier))
                    assert quiet.inside == asked.inside, f"asking for victims changes which leave (seed {seed})"
            for tier in MEMORY:
                assert list(quiet.policy.victims(tier)) == list(asked.policy.victims(tier))

    def test_it_is_deterministic(self) -> None:
        """The same history gives the same order, whatever was drawn from `random` elsewhere."""
        for seed in range(self.seeds):
            told: list[list[list[BlockId]]] = []
            for other in range(2):
                random.seed(other)
                play, orders = Play(self.make_policy(), 4), []
                for _ in play.random(seed, 80):
                    orders += [list(play.policy.victims(tier)) for tier in MEMORY]
                told.append(orders)
            assert told[0] == told[1], f"two policies with the same history (seed {seed}) name different victims"

    def test_what_cannot_leave_is_passed_over(self) -> None:
        """The scheduler skips leased blocks: whichever victim it takes, the others are still named afterwards."""
        for seed in range(self.seeds):
            choose = random.Random(seed)
            play = Play(self.make_policy(), 8)
            for _ in play.random(seed, 60, num_blocks=20):
                for tier in MEMORY:
                    named = list(itertools.islice(play.policy.victims(tier), choose.randint(1, 8)))
                    if named and choose.random() < 0.3:
                        play.remove(choose.choice(named), tier)
                        assert set(play.policy.victims(tier)) == set(play.inside[tier])

    def test_expectations_agree_with_each_other(self) -> None:
        """`expected` names live positions, `next_use` is the first of them, and neither changes while `epoch` does not."""
        policy = self.make_policy()
        play = Play(policy, 4)
        blocks = [play.new() for _ in range(9)]
        told: dict[int, BlockId] = {}
        epoch = policy.epoch
        for lap in range(8):
            for index, block in enumerate(blocks):
                if lap == 5 and index == 4:
                    play.use(blocks[0])
                play.use(block, write=index % 4 == 0)
                if policy.epoch != epoch:
                    epoch, told = policy.epoch, {}
                first: dict[BlockId, int] = {}
                for position in range(play.now, play.now + len(blocks)):
                    expected = policy.expected(position)
                    if expected is None:
                        break
                    assert expected in play.view.sizes, f"expected({position}) is {expected}, which was never there"
                    assert told.setdefault(position, expected) == expected, f"expected({position}) changed in epoch {epoch}"
                    first.setdefault(expected, position)
                for known in blocks:
                    next_use = policy.next_use(known)
                    assert isinstance(next_use, int | float), f"next_use({known}) is {next_use!r}"
                    assert next_use >= play.now, f"next_use({known}) is {next_use}, which is past"
                    assert next_use == first.get(known, next_use), f"next_use({known}) is {next_use}, expected() says {first[known]}"
                    assert first or next_use == math.inf, f"next_use({known}) is {next_use}, expected() knows nothing"

    def test_its_memory_is_bounded(self) -> None:
        """It does not grow for ever on blocks that come and go, nor on accesses."""
        play = Play(self.make_policy(), 8)
        blocks = [play.new() for _ in range(24)]
        sizes = []
        for count in range(2 * self.settled_accesses):
            if count % self.settled_accesses == self.settled_accesses - 1:
                sizes.append(count_objects(play.policy, play.view))
            if count % 16 == 0:
                play.delete(blocks[count % 24])
                blocks[count % 24] = play.new()
            play.use(blocks[(count * 7) % 24], write=count % 3 == 0)
        assert sizes[1] <= 1.25 * sizes[0] + 100, f"it holds {sizes[0]} objects after {self.settled_accesses} accesses, then {sizes[1]}"

    def test_its_cost_hardly_depends_on_the_number_of_blocks(self) -> None:
        """Lines run and block ids compared, per access and eviction, for 100 and for 1,000 blocks: no clock is asked."""
        few, many = self._cost(100), self._cost(1_000)
        assert many <= self.max_growth * few + 20, f"an access costs {few:.0f} steps among 100 blocks, {many:.0f} among 1,000"

    def _cost(self, num_blocks: int) -> float:
        """Steps per access, on average over a lap, after two laps of learning."""
        play = Play(self.make_policy(), num_blocks // 4)
        counting = [CountedId(play.new()) for _ in range(num_blocks)]
        for block in counting:
            play.view.sizes[BlockId(block)] = PAGE
        for lap in range(3):
            CountedId.count = 0
            lines = LineCounter() if lap == 2 else None
            for index, block in enumerate(counting):
                if lines is None:
                    play.use(BlockId(block), write=index % 3 == 0)
                else:
                    with lines:
                        play.use(BlockId(block), write=index % 3 == 0)
        assert lines is not None
        return (lines.count + CountedId.count) / num_blocks

    def test_a_store_serves_the_newest_values_with_it(self) -> None:
        """A real store on the CPU, too small for its blocks, and without an error of the policy."""
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("tierstore")
        logger.addHandler(handler)
        try:
            with tempfile.TemporaryDirectory() as directory:
                _train(self.make_policy(), Path(directory))
        finally:
            logger.removeHandler(handler)
        failures = [text for text in heard if "replaced by lru" in text]
        assert not failures, failures[0]


def _train(policy: Policy, directory: Path) -> None:
    choose = random.Random(7)
    values = dict.fromkeys((f"block {number}" for number in range(12)), 0)
    with TierStore(4 * 2 * PAGE, 16 * 2 * PAGE, directory / "swap", device="cpu", policy=policy) as store:
        for number, name in enumerate(values):
            store.put(name, torch.zeros((1 + number % 2) * PAGE, dtype=torch.uint8))
        for name in [*values] * 4 + choose.choices([*values], k=60):
            with store.use(name, write=True, timeout=60) as tensor:
                assert (tensor == values[name]).all(), f"{name!r} does not hold its newest values"
                values[name] = (values[name] + 1) % 256
                tensor.fill_(values[name])
            if choose.random() < 0.05:
                store.delete(name)
                store.put(name, torch.full((PAGE,), values[name], dtype=torch.uint8))


class CountedId(int):
    """A block's id that counts how often ids are compared or hashed, which loops inside C do unseen."""

    count = 0

    def __hash__(self) -> int:
        CountedId.count += 1
        return int.__hash__(self)

    def __eq__(self, other: object) -> bool:
        CountedId.count += 1
        return int.__eq__(self, other)

    def __lt__(self, other: int) -> bool:
        CountedId.count += 1
        return int.__lt__(self, other)


class LineCounter:
    """Counts the lines that run within it on this thread, but those of this module."""

    def __init__(self) -> None:
        self.count = 0
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename == __file__:
            return None
        self.count += 1
        return self._trace


def count_objects(root: object, *not_into: object) -> int:
    """Objects that can be reached from `root`, leaving out code, classes, modules and what `not_into` names."""
    seen = {id(other) for other in not_into}
    waiting, count = [root], 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, type | ModuleType | FunctionType | CodeType):
            continue
        seen.add(id(found))
        count += 1
        if isinstance(found, dict | list | set | tuple):
            count += len(found)  # entries that share one object count each
        waiting.extend(gc.get_referents(found))
    return count
