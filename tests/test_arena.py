"""The extent allocator against an array of bytes, and `pack` against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.helpers import check_arena
from tierstore.arena import Arena, Compaction, pack


class ArenaMachine(RuleBasedStateMachine):
    """Every extent is filled with its own number; a compaction is carried out on the bytes as the engine does it."""

    @initialize(capacity=st.integers(1, 80))
    def make(self, capacity: int) -> None:
        self.arena = Arena(capacity)
        self.memory = bytearray(capacity)
        self.extents: dict[int, tuple[int, int]] = {}  # number -> (offset, bytes)
        self.count = 0
        self.peak = 0

    @rule(nbytes=st.integers(1, 30), low=st.booleans())
    def allocate(self, nbytes: int, low: bool) -> None:
        largest = self.arena.largest_hole
        offset = self.arena.allocate(nbytes, low=low)
        assert (offset is None) == (nbytes > largest)
        if offset is None:
            return
        self.count = self.count % 255 + 1
        while self.count in self.extents:
            self.count = self.count % 255 + 1
        self.extents[self.count] = (offset, nbytes)
        self.memory[offset : offset + nbytes] = bytes([self.count]) * nbytes
        self.peak = max(self.peak, self.arena.used_bytes)

    @rule(index=st.integers(0, 40))
    def release(self, index: int) -> None:
        if self.extents:
            number = list(self.extents)[index % len(self.extents)]
            offset, nbytes = self.extents.pop(number)
            self.arena.release(offset)
            self.memory[offset : offset + nbytes] = bytes(nbytes)

    @rule(nbytes=st.integers(1, 60), seed=st.integers(0, 999), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]), take=st.booleans())
    def compact(self, nbytes: int, seed: int, share: float, take: bool) -> None:
        choose = random.Random(seed)
        fixed = {offset for offset, _ in self.extents.values() if choose.random() >= share}
        before = dict(self.arena.extents())
        plan = self.arena.plan_compaction(nbytes, lambda offset: offset not in fixed)
        assert dict(self.arena.extents()) == before, "a plan moves nothing"
        if plan is None:
            assert fixed or nbytes > self.arena.free_bytes, "with everything movable whatever is free can be had in one piece"
            return
        assert plan.hole_bytes >= nbytes
        assert not fixed & {move.source for move in plan.moves}, "what is fixed was moved"
        self._carry_out(plan)
        self.arena.apply(plan)
        check_arena(self.arena)
        assert self.arena.peak_bytes <= self.arena.capacity_bytes
        self.arena.release(plan.hole)
        assert self.arena.largest_hole >= nbytes
        assert self.arena.used_bytes == sum(length for _, length in self.extents.values())

    def _carry_out(self, plan: Compaction) -> None:
        where = {offset: number for number, (offset, _) in self.extents.items()}
        for move in plan.moves:
            number = where.pop(move.source)
            assert self.extents[number] == (move.source, move.nbytes)
            self.memory[move.target : move.target + move.nbytes] = self.memory[move.source : move.source + move.nbytes]
            self.extents[number] = (move.target, move.nbytes)

    @invariant()
    def every_extent_holds_its_bytes(self) -> None:
        if not hasattr(self, "arena"):
            return
        extents = check_arena(self.arena)
        assert extents == dict(self.extents.values())
        for number, (offset, nbytes) in self.extents.items():
            assert self.memory[offset : offset + nbytes] == bytes([number]) * nbytes, f"the bytes of extent {number} are gone"
        assert self.arena.peak_bytes >= self.peak


def test_extents_keep_their_bytes() -> None:
    run_state_machine_as_test(ArenaMachine, settings=settings(max_examples=2 * settings().max_examples, stateful_step_count=40))


def test_extents_keep_their_bytes_where_compactions_are_planned_nearby(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an arena of many extents, which looks around its largest holes first."""
    monkeypatch.setattr("tierstore.arena.FEW_EXTENTS", 1)
    monkeypatch.setattr("tierstore.arena.NEARBY_EXTENTS", 4)
    run_state_machine_as_test(ArenaMachine, settings=settings(max_examples=2 * settings().max_examples, stateful_step_count=40))


def test_a_compaction_of_many_extents_looks_at_few(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    for num_extents in (1_000, 10_000):
        arena = Arena(2 * num_extents)
        offsets = [arena.allocate(2) for _ in range(num_extents)]
        for offset in offsets[::10]:
            assert offset is not None
            arena.release(offset)
        before = len(asked)
        plan = arena.plan_compaction(4, lambda offset: asked.append(offset) is None)
        assert plan is not None
        assert plan.hole_bytes >= 4
        asked[before:] = [len(asked) - before]
    assert asked[0] == asked[1] < 300


def test_releasing_twice_is_a_bug_that_raises() -> None:
    arena = Arena(10)
    offset = arena.allocate(4)
    assert offset is not None
    arena.release(offset)
    with pytest.raises(KeyError):
        arena.release(offset)


def test_held_blocks_and_others_grow_from_opposite_ends() -> None:
    arena = Arena(100)
    assert (arena.allocate(10, low=True), arena.allocate(10), arena.allocate(10, low=True), arena.allocate(10)) == (0, 90, 10, 80)


def test_the_smallest_hole_that_fits_is_taken() -> None:
    arena = Arena(60)
    offsets = [arena.allocate(10) for _ in range(6)]
    assert sorted(offset for offset in offsets if offset is not None) == [0, 10, 20, 30, 40, 50]
    for offset in (0, 10, 30):  # a hole of 20 and one of 10
        arena.release(offset)
    assert arena.allocate(10) == 30
    assert arena.allocate(20) == 0


def test_an_empty_arena_is_no_special_case() -> None:
    arena = Arena(0)
    assert arena.allocate(1) is None
    assert arena.largest_hole == arena.used_bytes == 0
    assert arena.plan_compaction(1, lambda _: True) is None


def fits_by_trying(gaps: list[int], sizes: list[int]) -> bool:
    return any(
        all(sum(size for size, gap in zip(sizes, choice, strict=True) if gap == index) <= length for index, length in enumerate(gaps))
        for choice in itertools.product(range(len(gaps)), repeat=len(sizes))
    )


@given(gaps=st.lists(st.integers(0, 12), min_size=1, max_size=4), sizes=st.lists(st.integers(0, 8), max_size=6))
def test_pack_says_what_trying_everything_says(gaps: list[int], sizes: list[int]) -> None:
    assert pack(gaps, sizes) == fits_by_trying(gaps, sizes)
    assert pack(gaps, sizes, effort=0) >= fits_by_trying(gaps, sizes)  # a no is certain, a yes may be a perhaps


def test_pack_gives_up_in_bounded_time() -> None:
    assert pack([1001] * 30, [501] * 30)
    assert not pack([1000] * 30, [501] * 31, effort=1000)


@given(
    sizes=st.lists(st.sampled_from([113, 14, 7, 1]), min_size=1, max_size=12),
    leave=st.lists(st.booleans(), min_size=12, max_size=12),
    fixed=st.lists(st.booleans(), min_size=12, max_size=12),
    nbytes=st.sampled_from([113, 14, 7, 1]),
)
def test_compaction_finds_a_hole_beside_what_is_fixed(sizes: list[int], leave: list[bool], fixed: list[bool], nbytes: int) -> None:
    """Whenever packing says that a request fits beside what cannot move, and one region has the room by itself, moves make the hole."""
    arena = Arena(sum(sizes))
    offsets = [arena.allocate(size, low=True) for size in sizes]
    for offset, keep in zip(offsets, leave, strict=False):
        if not keep and offset is not None:
            arena.release(offset)
    immovable = {offset for offset, stays in zip(offsets, fixed, strict=False) if stays}
    borders = [(offset, length) for offset, length in arena.extents() if offset in immovable]
    regions, position = [], 0
    for offset, length in [*borders, (arena.capacity_bytes, 0)]:
        taken = sum(n for o, n in arena.extents() if position <= o < offset)
        regions.append(offset - position - taken)
        position = offset + length
    assume(max(regions) >= nbytes)
    plan = arena.plan_compaction(nbytes, lambda offset: offset not in immovable)
    assert plan is not None
    assert plan.hole_bytes >= nbytes
