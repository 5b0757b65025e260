"""The RAM tier: one anonymous mapping, reserved and touched once, page-locked where the device needs it.

[Note: Page-locking in segments]
Registering memory with the driver can fail or be capped (Windows keeps page-locked memory well under half of RAM), and a
failed registration can poison later ones. So the arena is registered in segments, stops at the first failure, and leaves the
rest pageable: copies of that part go through a small page-locked ring. A copy may not span two segments (the driver refuses
it as an invalid argument), so `pieces` cuts every range at their borders.

[Note: Forked children]
Arenas are not mapped in them: a fork would copy, or cut the driver off from, memory under DMA. What is mapped there later may
get the same address, and freeing the inherited object would then unmap it; so a child keeps these objects for ever.
"""

from __future__ import annotations

import logging
import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from tierstore.errors import CapacityError

log = logging.getLogger("tierstore")

SEGMENT_BYTES = 1 << 30
TOUCH_BYTES = 64 << 20


_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_KEPT: list[mmap.mmap] = []


def map_memory(nbytes: int) -> mmap.mmap:
    """Zeroed, page-aligned memory that forked children do not have. See [Note: Forked children].

    Raises:
        OSError, OverflowError, ValueError: There is not so much.
    """
    memory = mmap.mmap(-1, nbytes)
    if sys.platform == "linux":
        memory.madvise(mmap.MADV_DONTFORK)
        _MAPS.add(memory)
    return memory


if sys.platform == "linux":
    os.register_at_fork(after_in_child=lambda: _KEPT.extend(_MAPS))


class HostArena:
    """`nbytes` of host memory, zeroed.

    Args:
        nbytes: Length; reserved and touched at once, so that a machine without it says so here.
        page_lock: Register it with the CUDA driver.
        threads: Threads that touch it.

    Attributes:
        tensor: All of it, uint8.
        memory: All of it, as a writable view for file I/O.
        page_locked_bytes: Length of the registered part, which begins at offset 0.
        page_lock_error: Why registering stopped early; None if it did not.
    """

    def __init__(self, nbytes: int, *, page_lock: bool = False, threads: int = 4) -> None:
        self.nbytes = nbytes
        self.page_locked_bytes = 0
        self.page_lock_error: str | None = None
        try:
            self._map = map_memory(nbytes)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(
                "the RAM tier could not be reserved", need=f"{nbytes} bytes", have=str(error), remedy="lower ram=", tier="ram"
            ) from error
        if sys.platform == "linux" and nbytes >= 4 << 20:
            try:
                self._map.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                log.debug("this kernel has no transparent huge pages")
        self.memory = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._touch(threads)
        if page_lock:
            self._register()

    @property
    def address(self) -> int:
        return self.tensor.data_ptr()

    def pieces(self, offset: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        """(offset, bytes, page-locked) of the parts of a range that one copy each may take."""
        end = offset + nbytes
        while offset < end:
            locked = offset < self.page_locked_bytes
            stop = min(end, (offset // SEGMENT_BYTES + 1) * SEGMENT_BYTES, self.page_locked_bytes) if locked else end
            yield offset, stop - offset, locked
            offset = stop

    def close(self) -> None:
        """Unregister, and let the memory go as soon as nobody holds a view of it."""
        if self.page_locked_bytes:
            runtime = torch.cuda.cudart()
            for start in range(0, self.page_locked_bytes, SEGMENT_BYTES):
                runtime.cudaHostUnregister(self.address + start)
            self.page_locked_bytes = 0
        self.memory.release()
        del self.tensor, self._map

    def _touch(self, threads: int) -> None:
        starts = range(0, self.nbytes, TOUCH_BYTES)
        try:
            with ThreadPoolExecutor(threads, thread_name_prefix="tierstore-touch") as pool:
                list(pool.map(lambda start: self.tensor[start : start + TOUCH_BYTES].zero_(), starts))
        except RuntimeError as error:  # the system starts no more threads
            log.debug("touching memory on one thread: %s", error)
            self.tensor.zero_()

    def _register(self) -> None:
        runtime = torch.cuda.cudart()
        for start in range(0, self.nbytes, SEGMENT_BYTES):
            length = min(SEGMENT_BYTES, self.nbytes - start)
            code = int(runtime.cudaHostRegister(self.address + start, length, 0))
            if code:
                self.page_lock_error = f"cudaHostRegister returned {code}"
                _clear_cuda_error()
                log.warning(
                    "only %d of %d bytes of the RAM tier could be page-locked (%s); the rest is pageable and its copies are slower",
                    self.page_locked_bytes,
                    self.nbytes,
                    self.page_lock_error,
                )
                return
            self.page_locked_bytes += length


def _clear_cuda_error() -> None:
    """A refused registration is remembered, and raised at the next kernel, whosever it is: let it be one of ours."""
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError as error:
        log.debug("cleared: %s", error)
