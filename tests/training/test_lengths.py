"""How long blocks of training are made, so that what comes free takes what comes next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tierstore import TierStore
from tierstore.catalog import PAGE, extent_bytes, lay_out, round_up
from tierstore.residency import Tier
from tierstore.training.leasing import SAME, WHOLE, Buffers, rounded

LENGTHS = st.integers(1, 1 << 20).map(lambda pages: pages * PAGE)


@given(LENGTHS, LENGTHS)
def test_a_block_is_hardly_longer_than_what_it_takes(nbytes: int, part: int) -> None:
    for length in (rounded(nbytes), rounded(nbytes, part)):
        assert nbytes <= length <= nbytes + max(nbytes >> SAME, nbytes >> WHOLE)
        assert length % PAGE == 0


@given(st.integers(1, 1 << 14).map(lambda pages: pages * PAGE), st.integers(2, 8), st.integers(-4, 4))
def test_a_whole_number_of_parts_fits_where_that_takes_little(part: int, times: int, pages: int) -> None:
    part = rounded(part)
    nbytes = max(PAGE, times * part - abs(pages) * PAGE)
    length = rounded(nbytes, part)
    if times * part - nbytes <= nbytes >> WHOLE:
        assert length == round_up(nbytes, part)


@given(st.integers(1 << 12, 1 << 18), st.integers(0, 3))
def test_lengths_that_differ_by_a_few_pages_are_mostly_one(pages: int, more: int) -> None:
    """Where a multiple lies between them they are two; nowhere more."""
    first, second = rounded(pages * PAGE), rounded((pages + more) * PAGE)
    assert second - first in (0, max(PAGE, 1 << ((pages * PAGE).bit_length() - 1 - SAME))) or first < second < first + (first >> WHOLE)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=6))
def test_the_bytes_of_a_block_are_known_before_it_is_laid_out(shapes: list[tuple[int, int]]) -> None:
    tensors = [(f"{number}", "F32", shape) for number, shape in enumerate(shapes)]
    assert max(PAGE, extent_bytes(4 * rows * columns for rows, columns in shapes)) == lay_out("b", tensors).nbytes


@pytest.mark.parametrize("part", [0, 3 * 131_072 * PAGE // 64])
def test_a_block_longer_than_its_tensors_is_stored_and_comes_back(tmp_path: Path, part: int) -> None:
    numel = 6_290_000
    with TierStore(gpu="40MB", ram="200MB", nvme=tmp_path / "swap", device="cpu") as store:
        Buffers(store).declare("state", [("x", torch.float32, (numel,))], part=part)
        exact = round_up(4 * numel, PAGE)
        assert store.info("state").nbytes == rounded(exact, part) > exact
        with Buffers(store).lease("state", write=["state"], fresh=["state"]) as tensors:
            tensors["x"].copy_(torch.arange(numel))
        store.commit()
    with TierStore(gpu="40MB", ram="200MB", nvme=tmp_path / "swap", device="cpu") as store:
        assert store.info("state").nbytes == rounded(exact, part)
        assert torch.equal(store.read("state")["x"], torch.arange(numel, dtype=torch.float32))
        store.hold("state", "gpu")
        assert store.engine.placement.arenas[Tier.GPU].used_bytes >= rounded(exact, part)
