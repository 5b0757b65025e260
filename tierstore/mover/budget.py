"""Bytes in flight: transfer space that is reserved once, counted in the RAM budget, and handed out piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from tierstore.catalog import PAGE
from tierstore.errors import TransferError
from tierstore.nvme.files import when_landed
from tierstore.threads import under_way

NUM_SLOTS = 4
SLOT_BYTES = 16 << 20
SHARE = 64
"""One slot is at most this fraction of the RAM budget."""


RING_SLOTS = 4
"""As many again, on CUDA, are the ring through which extents that are not page-locked are copied: two per direction."""


def slot_bytes(ram_bytes: int) -> int:
    """Length of one transfer slot under a RAM budget, a multiple of 4096."""
    return max(PAGE, min(SLOT_BYTES, ram_bytes // SHARE // PAGE * PAGE))


class Slots:
    """Equal pieces of the transfer arena, from its beginning on. Used on the engine's loop only.

    A piece that a call which hangs may still touch is out of use until that has returned. While all are, there is no waiting:
    whoever wants one gets an error.

    Args:
        nbytes: Length of each.
    """

    def __init__(self, nbytes: int, num_slots: int = NUM_SLOTS) -> None:
        self.nbytes = nbytes
        self.in_use = 0
        self.peak_in_use = 0
        self.num_slots = num_slots
        self.num_quarantined = 0
        self._free = [index * nbytes for index in range(num_slots)]
        self._waiter = asyncio.Semaphore(num_slots)

    @asynccontextmanager
    async def take(self, block: str) -> AsyncIterator[int]:
        """The offset of a slot, for as long as the context lasts.

        Args:
            block: What is to pass through it.

        Raises:
            TransferError: None will come back before calls that hang have returned.
        """
        await self._waiter.acquire()
        if not self._free:
            self._waiter.release()
            raise TransferError(
                f"block {block!r} cannot pass: all transfer space belongs to calls that do not return",
                need=f"one of {self.num_slots} pieces of {self.nbytes} bytes",
                have="none",
                remedy="check the drive; when it answers again, repeat the call",
                block=block,
                tier="ram",
            )
        offset = self._free.pop()
        self.in_use += 1
        self.peak_in_use = max(self.peak_in_use, self.in_use)
        hung: tuple[Future[None], ...] = ()
        try:
            yield offset
        except BaseException as error:
            hung = under_way(error)
            raise
        finally:
            self.in_use -= 1
            if hung:
                self._quarantine(offset, hung)
            else:
                self._free.append(offset)
                self._waiter.release()

    def _quarantine(self, offset: int, hung: tuple[Future[None], ...]) -> None:
        self.num_quarantined += 1
        if self.num_quarantined == self.num_slots:
            self._waiter.release()  # so that those who wait come to know, one after the other
        when_landed(hung, lambda: self._landed(offset))

    def _landed(self, offset: int) -> None:
        self._free.append(offset)
        if self.num_quarantined != self.num_slots:
            self._waiter.release()  # else that has been done
        self.num_quarantined -= 1
