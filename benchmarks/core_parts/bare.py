"""What the store is compared with: loops that do nothing but move the bytes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

PAGE = 4096

REQUEST_BYTES = 16 << 20
"""As the store: no request moves more."""

THREADS = 4
"""As the store's threads per direction."""


class Drive:
    """`count` files with the same bytes in each, read and written by a loop of `preadv` and `pwritev` on threads.

    As the store's shards, the files have room from the start on, and a page before the payload; they are written once, and stay
    open. The bytes are the store's too: some virtual drives are twice as fast with a short pattern as with noise.
    """

    def __init__(self, directory: Path, count: int, content: torch.Tensor, *, direct: bool) -> None:
        directory.mkdir()
        nbytes = content.numel()
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self._files = [os.open(directory / str(number), flags, 0o600) for number in range(count)]
        for file in self._files:
            os.posix_fallocate(file, 0, PAGE + nbytes)
        self._memory = memoryview(mmap.mmap(-1, count * nbytes))
        torch.frombuffer(self._memory, dtype=torch.uint8).view(count, nbytes).copy_(content)
        self._pool = ThreadPoolExecutor(THREADS)
        self._requests = [
            (file, PAGE + start, number * nbytes + start, min(REQUEST_BYTES, nbytes - start))
            for number, file in enumerate(self._files)
            for start in range(0, nbytes, REQUEST_BYTES)
        ]
        self.write()

    def read(self) -> None:
        self._move(os.preadv)

    def write(self) -> None:
        self._move(os.pwritev)

    def close(self) -> None:
        self._pool.shutdown()
        for file in self._files:
            os.close(file)

    def _move(self, call: Callable[[int, list[memoryview], int], int]) -> None:
        def one(request: tuple[int, int, int, int]) -> None:
            file, offset, begin, length = request
            moved = call(file, [self._memory[begin : begin + length]], offset)
            assert moved == length, f"{moved} of {length} bytes"

        list(self._pool.map(one, self._requests))


class Copier:
    """Blocks in host memory and extents on the device, copied by `copy_` alone: a thread or a stream per direction.

    Extents take room only while they are copied: what is measured beside them may need all there is.

    Args:
        device: Where to.
        nbytes: Length of one copy.
        count: Blocks; on the device there are as many extents.
    """

    def __init__(self, device: torch.device, nbytes: int, count: int) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._host = [torch.ones(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(count)]
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if cuda else None
        self._threads = None if cuda else (ThreadPoolExecutor(1), ThreadPoolExecutor(1))

    def seconds(self, *, into: bool, out: bool) -> float:
        """Copy half of the blocks in, the other half out, or all one way; returns the time it took."""
        half = len(self._host) // 2 if into and out else len(self._host)
        ins = range(half) if into else range(0)
        outs = range(len(self._host) - half, len(self._host)) if out else range(0)
        there = [torch.ones_like(block, device=self._device) for block in self._host]
        if self._streams is not None:
            torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        if self._streams is not None:
            with torch.cuda.stream(self._streams[0]):
                for number in ins:
                    there[number].copy_(self._host[number], non_blocking=True)
            with torch.cuda.stream(self._streams[1]):
                for number in outs:
                    self._host[number].copy_(there[number], non_blocking=True)
            torch.cuda.synchronize(self._device)
        else:
            assert self._threads is not None
            copies = [self._threads[0].submit(there[number].copy_, self._host[number]) for number in ins]
            copies += [self._threads[1].submit(self._host[number].copy_, there[number]) for number in outs]
            for copy in copies:
                copy.result()
        return time.perf_counter() - start

    def close(self) -> None:
        for thread in self._threads or ():
            thread.shutdown()
