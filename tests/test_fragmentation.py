"""Room is judged on extents: what fits after moving unleased blocks succeeds, and what does not is refused or waits."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quiet import assert_quiet
from tierstore import TierStore
from tierstore.arena import pack
from tierstore.errors import CapacityError
from tierstore.mover.streams import slide
from tierstore.residency import Tier

MB = 10**6
PAGE = 4096


def put(store: TierStore, name: str, nbytes: int, value: int, tier: str = "ram") -> None:
    tensor = torch.full((nbytes,), value, dtype=torch.uint8)
    store.put(name, tensor, tier=tier)


def check(tensor: torch.Tensor, value: int) -> None:
    assert tensor[0] == tensor[-1] == value
    assert (tensor == value).all()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TierStore]:
    with TierStore(gpu=300 * MB, ram=620 * MB, nvme=tmp_path_factory.mktemp("large") / "swap", device="cpu", policy="lru") as store:
        for number in range(3):
            put(store, f"113 {number}", 113 * MB, number)
        for number in range(12):
            put(store, f"14 {number}", 14 * MB, 10 + number)
        for number in range(12):
            put(store, f"7 {number}", 7 * MB, 30 + number)
        for number in range(6):
            put(store, f"few {number}", 5, 50 + number)
        yield store
        assert_quiet(store)


def test_mixed_sizes_in_one_arena(large: TierStore) -> None:
    """Two of 113 MB need all but 74 MB, wherever the small ones happened to land."""
    chance = random.Random(0)
    before = large.stats().compactions
    for turn in range(4):
        small = (
            [f"14 {number}" for number in range(12)] + [f"7 {number}" for number in range(12)] + [f"few {number}" for number in range(6)]
        )
        chance.shuffle(small)
        for name in small:
            with large.use(name, write=turn % 2 == 0) as block:
                assert block[0] == block[-1]
        first, second = chance.sample(range(3), 2)
        with large.use(f"113 {first}", f"113 {second}") as (one, two):
            check(one, first)
            check(two, second)
            with large.use("14 0", "14 1", "7 0", "few 0") as (a, _, b, c):
                check(a, 10)
                check(b, 30)
                check(c, 50)
    assert large.stats().compactions > before
    assert large.stats().tiers["gpu"].peak_bytes <= 300 * MB


def test_ones_own_nested_leases_stay_where_they_are(large: TierStore) -> None:
    """Each lies somewhere in the arena; what can still be placed is granted, what cannot is refused at once."""
    for seed in range(4):
        chance = random.Random(seed)
        for name in chance.sample([f"7 {number}" for number in range(12)], 12):
            with large.use(name):
                pass
        own = chance.sample([f"7 {number}" for number in range(12)], 2)
        with large.use(own[0]) as first, large.use(own[1]) as second:
            where = [first.data_ptr(), second.data_ptr()]
            for wanted in (["113 0"], ["113 0", "113 1"], ["14 1", "14 2", "14 3", "113 2"]):
                try:
                    with large.use(*wanted, timeout=60) as leased:
                        for name, block in zip(wanted, leased if len(wanted) > 1 else (leased,), strict=True):
                            check(block, (0 if name.startswith("113") else 10) + int(name.split()[1]))
                except CapacityError as error:
                    assert len(wanted) > 1, error  # noqa: PT017
            assert [first.data_ptr(), second.data_ptr()] == where
            check(first, 30 + int(own[0].split()[1]))


def test_held_blocks_move_but_stay(large: TierStore) -> None:
    for number in range(4):
        large.hold(f"14 {number}", "gpu")
    large.hold("few 1", "gpu")
    large.hold("7 3", "ram")
    try:
        with large.use("113 0", "113 1") as (one, _):
            check(one, 0)
            for number in range(4):
                assert "gpu" in large.info(f"14 {number}").tiers
        with pytest.raises(CapacityError):
            large.use("113 0", "113 1", "14 8", "14 9").__enter__()
        with large.use("14 2") as held:
            check(held, 12)
    finally:
        for name in ("14 0", "14 1", "14 2", "14 3", "few 1", "7 3"):
            large.unhold(name)


def test_ram_is_compacted_too(tmp_path: Path) -> None:
    with TierStore(gpu=40 * PAGE, ram=68 * PAGE, nvme=tmp_path / "swap", device="cpu", policy="lru") as store:
        sizes = [1, 2, 3, 5, 8, 13, 21]
        for number, size in enumerate(sizes * 3):
            put(store, str(number), size * PAGE, number)
        chance = random.Random(5)
        for _ in range(300):
            number = chance.randrange(len(sizes) * 3)
            with store.use(str(number), write=chance.random() < 0.5) as block:
                check(block, number)
        assert store.stats().compactions > 0


def test_two_tiers_compact_the_homes_in_ram() -> None:
    """Without NVMe nothing leaves RAM, so a hole can only be made by moving."""
    with TierStore(gpu=16 * PAGE, ram=64 * PAGE, device="cpu") as store:
        count = 0
        while True:
            try:
                put(store, str(count), PAGE, count)
            except CapacityError:
                break
            count += 1
        for number in range(0, count, 2):
            store.delete(str(number))
        free = count - count // 2
        put(store, "big", free * PAGE if free <= 16 else 16 * PAGE, 99)
        for number in range(1, count, 2):
            with store.use(str(number)) as block:
                check(block, number)
        with store.use("big") as block:
            check(block, 99)
        assert store.stats().compactions > 0


@settings(max_examples=40)
@given(data=st.data())
def test_what_fits_is_granted_and_what_does_not_is_refused(data: st.DataObject) -> None:
    """Against the definition: own leases fixed, held blocks and wanted ones packed into what is left."""
    capacity = data.draw(st.integers(4, 24), label="pages")
    sizes = data.draw(st.lists(st.integers(1, max(1, capacity // 2)), min_size=2, max_size=12), label="sizes")
    ram = 6 + max(sizes) + data.draw(st.integers(0, 40), label="ram")
    with (
        tempfile.TemporaryDirectory() as path,
        TierStore(
            gpu=capacity * PAGE, ram=ram * PAGE, nvme=path, device="cpu", policy=data.draw(st.sampled_from(["lru", "lookahead"]))
        ) as store,
    ):
        for number, size in enumerate(sizes):
            put(store, str(number), size * PAGE, number, tier=data.draw(st.sampled_from(["ram", "nvme"])))
        for number in data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=10), label="warm up"):
            with store.use(str(number), write=number % 2 == 0):
                pass
        own = data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3), label="own")
        wanted = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1), label="wanted")
        if sum(sizes[number] for number in own) > capacity:
            return
        leases = {number: store.use(str(number)) for number in sorted(own)}
        for number, lease in leases.items():
            try:
                lease.__enter__()
            except CapacityError:  # beside those before it, which lie where they lie
                own.discard(number)
        try:
            scheduler = store.engine.scheduler
            fixed = sorted((scheduler.names[str(number)].gpu.offset // PAGE, sizes[number]) for number in own)
            edges = [0, *itertools.chain.from_iterable((offset, offset + size) for offset, size in fixed), capacity]
            gaps = [stop - start for start, stop in itertools.batched(edges, 2)] if hasattr(itertools, "batched") else _pairs(edges)
            fits = pack(gaps, [sizes[number] for number in wanted - own])
            if not own and data.draw(st.booleans()):
                assert fits == (sum(sizes[number] for number in wanted) <= capacity)
            try:
                with store.use(*map(str, sorted(wanted)), timeout=20) as leased:
                    assert fits
                    for number, block in zip(sorted(wanted), leased if len(wanted) > 1 else (leased,), strict=True):
                        check(block, number)
            except CapacityError:
                assert not fits
        finally:
            for lease in reversed(leases.values()):
                if lease._ticket is not None:
                    lease.__exit__(None, None, None)
        assert_quiet(store)
        for number in range(len(sizes)):
            value = store.read(str(number))
            assert isinstance(value, torch.Tensor)
            check(value, number)
        assert store.engine.placement.arenas[Tier.GPU].peak_bytes <= capacity * PAGE


def _pairs(edges: list[int]) -> list[int]:
    return [edges[index + 1] - edges[index] for index in range(0, len(edges), 2)]


@given(st.data())
def test_a_block_slides_over_itself(data: st.DataObject) -> None:
    """However far it moves, and however little of it one copy takes, its bytes come to lie where they are to."""
    nbytes = data.draw(st.integers(1, 400))
    source, target = data.draw(st.tuples(st.integers(0, 500), st.integers(0, 500)).filter(lambda pair: pair[0] != pair[1]))
    arena = torch.arange(1000, dtype=torch.int64).remainder(251).to(torch.uint8)
    before = arena.clone()
    lane = torch.zeros(data.draw(st.sampled_from([0, 1, 7, 50, 600])), dtype=torch.uint8)
    slide(arena, lane, source, target, nbytes)
    assert torch.equal(arena[target : target + nbytes], before[source : source + nbytes])
    apart = torch.ones(1000, dtype=torch.bool)
    apart[source : source + nbytes] = apart[target : target + nbytes] = False
    assert torch.equal(arena[apart], before[apart])
