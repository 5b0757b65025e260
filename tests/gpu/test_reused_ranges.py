"""Who writes a whole range of the device itself comes behind all that used any part of it before: `take`, one ordering at a time.

Each test queues work that ends late, has another stream take a range and fill it, and looks at what came of both. There is no store: what
is queued here, in this order, a schedule of a store comes to only by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tierstore.mover.streams import CudaCopies
from tierstore.requests import Action, Kind, Order
from tierstore.tiers.device import DeviceArena
from tierstore.tiers.ram import HostArena

pytestmark = pytest.mark.cuda

KIB = 1 << 10
EXTENT, PART = 64 * KIB, 16 * KIB
"""Bytes of an extent, and of a smaller one that begins where it does."""

LONG = 300_000_000
"""Cycles: longer by far than all that the host queues behind."""

LOADED, FILLED = 7, 9
"""Values of bytes."""


class Streams:
    """The copies of a device and a host arena of a few extents, without a store."""

    def __init__(self) -> None:
        self.device = DeviceArena(1 << 20, torch.device("cuda", 0))
        self.host = HostArena(1 << 20, page_lock=True)
        self.transfer = HostArena(1 << 20, page_lock=True)
        self.copies = CudaCopies(self.device, self.host, self.transfer, (0, 64 * KIB))
        self.host.tensor.fill_(LOADED)

    def close(self) -> None:
        self.copies.close()
        self.host.close()  # else the driver knows its pages still when others lie at the same address
        self.transfer.close()

    def load(self, nbytes: int) -> None:
        """Queue a copy into the first bytes of the device."""
        order = Order(0, Action.H2D, next(iter(Kind)), nbytes, 0, offset_gpu=0, offset_ram=0)
        self.copies.start(order, lambda *_: None, lambda *_: None)

    def fill(self, offset: int, nbytes: int) -> None:
        """Write a range whole, as a lease without a copy in does."""
        self.copies.lease([(offset, nbytes)])
        self.copies.take([(offset, nbytes)])
        self.device.tensor[offset : offset + nbytes].fill_(FILLED)
        self.copies.release([(offset, nbytes)])

    def bytes_at(self, offset: int, nbytes: int) -> set[int]:
        torch.cuda.synchronize()
        return set(self.device.tensor[offset : offset + nbytes].unique().tolist())


@pytest.fixture
def streams() -> Iterator[Streams]:
    torch.cuda.synchronize()
    made = Streams()
    yield made
    made.close()


def delay(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)


def test_a_copy_in_that_nobody_came_to_use(streams: Streams) -> None:
    delay(streams.copies._h2d)
    streams.load(EXTENT)
    streams.fill(0, EXTENT)
    assert streams.bytes_at(0, EXTENT) == {FILLED}


def test_a_copy_in_that_begins_elsewhere_and_that_nobody_came_to_use(streams: Streams) -> None:
    delay(streams.copies._h2d)
    streams.load(EXTENT)
    streams.fill(PART, PART)
    assert streams.bytes_at(PART, PART) == {FILLED}
    assert streams.bytes_at(0, PART) == streams.bytes_at(2 * PART, PART) == {LOADED}


def test_a_copy_in_behind_which_a_smaller_one_begins_at_the_same_place(streams: Streams) -> None:
    delay(streams.copies._h2d)
    streams.load(EXTENT)
    streams.load(PART)
    streams.fill(2 * PART, PART)
    assert streams.bytes_at(2 * PART, PART) == {FILLED}


def test_a_use_behind_which_a_smaller_one_begins_at_the_same_place(streams: Streams) -> None:
    """Both on one stream, so that the second is done no sooner than the first; but it says nothing of the rest of the range."""
    seen = reads_late(streams, lambda: streams.copies.release([(0, PART)]))
    streams.fill(2 * PART, PART)
    torch.cuda.synchronize()
    assert bool((seen == LOADED).all())
    assert streams.bytes_at(2 * PART, PART) == {FILLED}


def test_a_use_on_another_stream(streams: Streams) -> None:
    seen = reads_late(streams, lambda: None)
    streams.fill(PART, EXTENT)
    torch.cuda.synchronize()
    assert bool((seen == LOADED).all())


def reads_late(streams: Streams, then: Callable[[], None]) -> torch.Tensor:
    """Queue a read of the first extent on a stream of its own; returns where it will be."""
    streams.device.tensor[:EXTENT].fill_(LOADED)
    seen = torch.zeros(EXTENT, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    delay(side)
    with torch.cuda.stream(side):
        streams.copies.lease([(0, EXTENT)])
        seen.copy_(streams.device.tensor[:EXTENT])
        streams.copies.release([(0, EXTENT)])
        then()
    return seen
