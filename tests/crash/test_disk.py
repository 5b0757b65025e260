"""The drive that forgets does forget: what each sync makes durable, and what may be left without it."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from tests.crash.disk import EVERYTHING, NOTHING, CrashDisk, Survival
from tests.simulation.files import Change

OLD, NEW = b"o" * 3000, b"n" * 3000


def made(*, journaled: bool = False) -> CrashDisk:
    """A drive with one durable file."""
    disk = CrashDisk(journaled=journaled)
    disk.create("/d/old", len(OLD))
    disk.write("/d/old", 0, OLD)
    disk.sync("/d/old")
    disk.sync_directory("/d")
    return disk


def outcomes(disk: CrashDisk, look: Callable[[CrashDisk], object], *under_way: Change) -> set[object]:
    """What may be found after a power cut."""
    return {look(disk.cut(Survival.drawn(random.Random(seed)), under_way)) for seed in range(400)}


def names(disk: CrashDisk) -> tuple[str, ...]:
    return tuple(sorted(path.removeprefix("/d/") for path in disk.files))


def test_data_is_durable_after_a_sync_and_may_be_torn_at_any_byte_before() -> None:
    disk = made()
    disk.write("/d/old", 0, NEW)
    assert disk.get("/d/old") == NEW
    assert disk.cut(NOTHING).get("/d/old") == OLD
    assert disk.cut(EVERYTHING).get("/d/old") == NEW
    found = {bytes(content) for content in outcomes(disk, lambda left: bytes(left.get("/d/old")))}  # type: ignore[arg-type]
    assert {OLD, NEW} < found
    borders = {content.index(b"n") for content in found if content.startswith(b"o") and content != OLD}
    assert any(border % 512 for border in borders)
    assert len(borders) > 20
    disk.sync("/d/old")
    assert outcomes(disk, lambda left: bytes(left.get("/d/old"))) == {NEW}


def test_a_later_write_may_survive_without_an_earlier_one() -> None:
    disk = made()
    disk.write("/d/old", 0, b"1" * 100)
    disk.write("/d/old", 2000, b"2" * 100)
    found = outcomes(disk, lambda left: (left.get("/d/old")[:100] == b"1" * 100, left.get("/d/old")[2000:2100] == b"2" * 100))
    assert found == {(False, False), (False, True), (True, False), (True, True)}


def test_a_length_is_data() -> None:
    disk = made()
    disk.create("/d/new", 4096)
    disk.sync_directory("/d")
    assert {0, 4096} < outcomes(disk, lambda left: len(left.get("/d/new")))
    disk.save("/d/old", b"short")
    assert {len(OLD), 0, 5} < outcomes(disk, lambda left: len(left.get("/d/old")))


def test_names_that_share_nothing_are_lost_one_by_one() -> None:
    disk = made()
    disk.create("/d/tmp", 0)
    disk.sync("/d/tmp")
    disk.sync_directory("/d")
    disk.replace("/d/tmp", "/d/final")
    disk.unlink("/d/old")
    assert outcomes(disk, names) == {("old", "tmp"), ("final", "old"), ("tmp",), ("final",)}, "in any order, each as a whole"
    disk.sync_directory("/d")
    assert outcomes(disk, names) == {("final",)}


def test_names_that_come_back_have_their_bytes_and_renamed_ones_take_them_along() -> None:
    disk = made()
    disk.replace("/d/old", "/d/new")
    disk.write("/d/new", 0, NEW)
    disk.sync("/d/new")
    left = disk.cut(NOTHING)
    assert names(left) == ("old",)
    assert left.get("/d/old") == NEW, "what is synced belongs to the file, whatever its name"
    disk.unlink("/d/new")
    assert disk.cut(NOTHING).get("/d/old") == NEW


def test_a_sync_of_a_file_makes_names_durable_only_where_there_is_a_journal() -> None:
    for journaled in (False, True):
        disk = made(journaled=journaled)
        disk.sync("/d/old")
        disk.create("/d/new", 0)
        disk.sync_directory("/d")
        assert ("/d/new" in disk.cut(NOTHING).files) is not journaled
        disk.create("/d/newer", 0)
        disk.sync("/d/old")
        assert ("/d/newer" in disk.cut(NOTHING).files) is journaled


def test_a_killed_process_leaves_what_it_ordered_and_none_of_it_more_durable() -> None:
    disk = made()
    disk.write("/d/old", 0, NEW)
    disk.create("/d/new", 10)
    left = disk.kill(NOTHING)
    assert left.get("/d/old") == NEW
    assert names(left) == ("new", "old")
    assert names(left.cut(NOTHING)) == ("old",)
    assert left.cut(NOTHING).get("/d/old") == OLD
    left.write("/d/old", 0, OLD)
    assert disk.get("/d/old") == NEW, "the two are apart from then on"


@pytest.mark.parametrize("crash", ["cut", "kill"])
def test_what_is_under_way_is_torn(crash: str) -> None:
    disk = made()
    change = Change("write", ("/d/old", 0, NEW))
    found = {bytes(getattr(disk, crash)(Survival.drawn(random.Random(seed)), [change]).get("/d/old")) for seed in range(200)}
    assert {OLD, NEW} < found
    assert disk.get("/d/old") == OLD


@pytest.mark.parametrize("kept", [True, False])
def test_a_failed_sync_drops_data_and_the_next_claims_success(kept: bool) -> None:
    disk = made()
    disk.cache_keeps = kept
    disk.write("/d/old", 0, NEW)
    disk.fail(Change("sync", ("/d/old",)))
    disk.sync("/d/old")
    assert disk.get("/d/old") == (NEW if kept else OLD)
    assert disk.cut(EVERYTHING).get("/d/old") == OLD
    disk.write("/d/old", 0, b"again")
    disk.sync("/d/old")
    assert disk.cut(NOTHING).get("/d/old") == b"again" + OLD[5:], "only what was written since"


def test_links_and_room() -> None:
    disk = made()
    disk.link("/d/old", "/e/other")
    assert disk.links("/d/old") == 2
    disk.write("/e/other", 0, b"x")
    assert disk.get("/d/old")[:1] == b"x"
    disk.capacity = len(OLD) + 100
    disk.create("/d/small", 100)
    with pytest.raises(OSError, match="No space left") as caught:
        disk.write("/d/small", 100, b"y")
    assert caught.value.errno == errno.ENOSPC
    disk.flip("/d/small", 13)
    assert disk.cut(NOTHING).get("/d/old")[:1] != b"x"
