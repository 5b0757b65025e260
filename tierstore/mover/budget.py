"""Bytes in flight: transfer space that is reserved once, counted in the RAM budget, and handed out piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tierstore.catalog import PAGE

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

    Args:
        nbytes: Length of each.
    """

    def __init__(self, nbytes: int, num_slots: int = NUM_SLOTS) -> None:
        self.nbytes = nbytes
        self.in_use = 0
        self.peak_in_use = 0
        self._free = [index * nbytes for index in range(num_slots)]
        self._waiter = asyncio.Semaphore(num_slots)

    @asynccontextmanager
    async def take(self) -> AsyncIterator[int]:
        """The offset of a slot, for as long as the context lasts."""
        async with self._waiter:
            offset = self._free.pop()
            self.in_use += 1
            self.peak_in_use = max(self.peak_in_use, self.in_use)
            try:
                yield offset
            finally:
                self.in_use -= 1
                self._free.append(offset)
