"""Reads blocks from the model files that they lie in.

[Note: Shifted into place]
With direct I/O, pieces of whole pages (`adopted.pieces`) are read into slots of transfer space, and the thread that read one moves each
tensor's bytes to their place. As many are under way as there are slots, whosever they are. Where a file system refuses direct
I/O, bytes are read straight to where they belong, and nothing is moved.

[Note: Files of somebody else's]
Nobody keeps others from writing to a model file. So at each read its length and its time of modification are compared with what they
were when it was adopted, before it and, on the very handle that was read from, after it; and the payload with the checksums that its
first read has given. What differs is not served. What was different when the directory was opened is looked at again, with its header,
before each read until it is as it was. Those checksums are of the payload with zeros between tensors, per 16 MiB as in a shard.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import xxhash

from tierstore.catalog import PAGE
from tierstore.clock import Clock
from tierstore.counters import ModelStats
from tierstore.errors import OptionError, TierstoreError
from tierstore.mover.budget import Slots
from tierstore.nvme.adopted import Adopted, ModelFile, Piece, gaps, pieces, ranges
from tierstore.nvme.checksums import CHUNK_BYTES, checksum, num_chunks, split_chunks
from tierstore.nvme.files import File, Request, all_stalled, land, move_all
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.model_files import Model, changed, difference, look, look_again, survey
from tierstore.nvme.shards import Shard, chunk_range, io_error

log = logging.getLogger("tierstore")

THREADS = 6
"""That read and shift: as many reads are to be with the drive at any time as there are of own shards (4), while others move bytes."""

PARTS = 2
"""Requests for which one slot of transfer space has room."""


BACK = "is back"
"""Of a file that was not what it should be, and is again as far as can be told."""


class Models:
    """The model files of one store. All methods belong to the engine's loop, save `forget_in_child`.

    Args:
        slots: Transfer space, in the arena `transfer`.
        clock: Times what the shift takes.
        checksum: Payloads are summed and verified.
        direct_io: Read past the page cache: True (or raise), False, or where the file system allows it.

    Attributes:
        stats: What was read.
    """

    def __init__(
        self, slots: Slots, transfer: memoryview, clock: Clock, *, checksum: bool = True, direct_io: bool | Literal["auto"] = "auto"
    ) -> None:
        self.stats = ModelStats()
        self._slots = slots
        self._transfer = transfer
        self._clock = clock
        self._checksum = checksum
        self._direct_io = direct_io
        self._files = LocalFiles()
        self._past_cache = LocalFiles(threads=THREADS)
        self._past_cache.direct = True
        self._direct: dict[str, bool] = {}  # by directory
        self._plans: dict[Shard, list[Piece]] = {}
        self._open: set[File] = set()
        self._told: set[tuple[str, str]] = set()
        self._counting = threading.Lock()

    async def survey(self, path: str | os.PathLike[str]) -> Model:
        """Look at a model; see `model_files.survey`.

        Raises:
            OptionError: Direct I/O was demanded, and its file system refuses it.
        """
        model = await survey(self._files, path)
        for file in model.files:
            await self._reads_directly(file)
        return model

    async def read(self, shard: Shard, into: memoryview) -> None:
        """Fill `into` with the whole payload. See [Note: Shifted into place].

        Raises:
            ModelFileError: A file is gone, or not what it was. `into` holds rubbish.
            TransferError: The read failed. `into` holds rubbish.
        """
        await self._look_again(shard)
        direct = all([await self._reads_directly(file) for file in _adopted(shard).files])
        async with self._reading(shard, direct=direct) as files:
            await self._files.work(_clear, into, list(gaps(shard.block)))
            sums = _Sums(self, shard, into)
            try:
                if direct:
                    await self._shift(shard, files, into, sums)
                else:
                    await self._straight(shard, files, into, 0)
                await sums.finish()
            finally:
                await sums.end()
        if self._checksum:
            shard.chunks = sums.found

    @asynccontextmanager
    async def stream(self, shard: Shard) -> AsyncIterator[Stream]:
        """Read the payload from its beginning to its end, straight into the caller's pieces. What was read counts when this has ended.

        Raises:
            ModelFileError: A file is gone, or not what it was.
            TransferError: A read failed.
        """
        await self._look_again(shard)
        async with self._reading(shard, direct=False) as files:
            stream = Stream(self, shard, files)
            yield stream
            await stream.finish()
        if self._checksum:
            shard.chunks = stream.found

    def forget(self, shard: Shard) -> None:
        """It is read no more."""
        self._plans.pop(shard, None)

    def close(self) -> None:
        """End the threads. Waits for what is under way."""
        self._files.close()
        self._past_cache.close()

    def forget_in_child(self) -> None:
        """In a forked child: close what was inherited. Never fails; any thread."""
        for file in list(self._open):
            file.forget()

    # -- how files are read ------------------------------------------------------------------------------------------------

    async def _reads_directly(self, file: ModelFile) -> bool:
        """Whether a file is read past the page cache; tried once for each directory."""
        folder = os.path.dirname(file.path)
        if folder not in self._direct:
            refusal = None if self._direct_io is not False else "direct_io=False"
            if refusal is None:
                refusal = await self._past_cache.direct_read_refusal(file.path)
            self._direct[folder] = refusal is None
            if refusal is not None and self._direct_io is True:
                raise OptionError(
                    "direct_io=True, but the model's files refuse direct I/O",
                    need="a file system that can be read past its cache",
                    have=refusal,
                    remedy="use direct_io='auto', or put the model on a local drive",
                    path=file.path,
                )
            if refusal is not None and self._direct_io == "auto":
                log.info("direct I/O is not available in %s (%s): using ordinary I/O", folder, refusal)
        return self._direct[folder]

    async def _look_again(self, shard: Shard) -> None:
        """See [Note: Files of somebody else's].

        Raises:
            ModelFileError: A file is still not what it was.
        """
        if not shard.header_unverified:
            return
        now = {file: await look_again(self._files, file) for file in _adopted(shard).files}
        shard.look_again(now)
        for file, found in now.items():
            if isinstance(found, str):
                raise changed(file.path, found, block=shard.block.name)
            if found != file and shard.chunks is None and (file.path, BACK) not in self._told:
                self._told.add((file.path, BACK))
                message = (
                    "%s is back with another time and the same header. Blocks in it that were never read, such as %r, have no checksums, "
                    "and cannot be checked. Go on only if you know that it is the same model"
                )
                log.warning(message, file.path, shard.block.name)

    async def warn_of_changes(self, shards: Iterable[Shard], generation: int) -> None:
        """Say once of each model file that a commit needs, and that is not what it was. Only looks at names; never fails."""
        listed = dict.fromkeys(file for shard in shards if shard.adopted is not None for file in shard.adopted.files)
        for file in listed:
            try:
                what = difference(file, await look(self._files, file.path))
            except OSError as error:
                what = f"cannot be looked at ({error})"
            if what is not None and (file.path, what) not in self._told:
                self._told.add((file.path, what))
                message = "generation %d is committed and can be opened, but blocks of it lie in %s, which %s: they may be lost"
                log.warning(message, generation, file.path, what)

    @asynccontextmanager
    async def _reading(self, shard: Shard, *, direct: bool) -> AsyncIterator[list[File]]:
        """A shard's files, opened when first read. See [Note: Files of somebody else's].

        Raises:
            ModelFileError, TransferError: As `read`.
        """
        adopted, block = _adopted(shard), shard.block.name
        source = self._past_cache if direct else self._files
        for file in adopted.files:
            if (what := difference(file, await look(self._files, file.path))) is not None:
                raise changed(file.path, what, block=block)
        files = [source.file(file.path) for file in adopted.files]
        self._open.update(files)
        path = adopted.files[0].path
        try:
            yield files
            for file, handle in zip(adopted.files, files, strict=True):
                path = file.path
                if (what := difference(file, await handle.stat())) is not None:
                    raise changed(path, what, block=block)
        except FileNotFoundError as error:
            raise changed(error.filename or path, "is gone", block=block) from error
        except OSError as error:
            if isinstance(error, TierstoreError):
                raise
            raise io_error(error, f"reading block {block!r} from its model file", path=path, block=block) from error
        finally:
            self._open.difference_update(files)
            for handle in files:
                await handle.close()

    async def _straight(self, shard: Shard, files: Sequence[File], into: memoryview, start: int) -> None:
        """Fill `into`, payload bytes from `start` on, but for the gaps."""
        wanted: dict[int, list[Request]] = {}
        for one in ranges(shard.block, _adopted(shard), start, start + len(into)):
            for low in range(0, one.nbytes, CHUNK_BYTES):
                length = min(CHUNK_BYTES, one.nbytes - low)
                target = one.target - start + low
                wanted.setdefault(one.file, []).append(Request(one.begin + low, into[target : target + length]))
        for file, requests in wanted.items():
            await move_all(self._files, files[file].read, requests)
            self._count(len(requests), sum(len(request.buffer) for request in requests))

    async def _shift(self, shard: Shard, files: Sequence[File], into: memoryview, sums: _Sums) -> None:
        """Two pieces of half a slot are under way for each slot: while one is asked for, the drive is busy with the other."""
        part_bytes = max(PAGE, self._slots.nbytes // PARTS // PAGE * PAGE)
        plan = self._plans.get(shard)
        if plan is None:
            plan = self._plans[shard] = pieces(ranges(shard.block, _adopted(shard)), part_bytes)
        waiting: Iterator[Piece] = iter(plan)
        failures: list[BaseException] = []

        async def one_by_one(buffer: memoryview) -> None:
            for piece in waiting:
                try:
                    await self._read_piece(files[piece.file], piece, buffer[: piece.nbytes], into)
                    sums.landed(piece)
                except BaseException as error:
                    failures.append(error)
                if failures:
                    return

        async def through_a_slot() -> None:
            try:
                async with self._slots.take(shard.block.name) as slot:
                    parts = range(slot, slot + self._slots.nbytes - part_bytes + 1, part_bytes)
                    await asyncio.gather(*(one_by_one(self._transfer[start : start + part_bytes]) for start in parts))
                    if failures:  # told to the slot too: a read that hangs may still fill it
                        raise all_stalled(failures) or failures[0]
            except BaseException as error:
                if error not in failures:
                    failures.append(error)

        per_slot = max(1, self._slots.nbytes // part_bytes)
        await land(asyncio.gather(*(through_a_slot() for _ in range(min(self._slots.num_slots, -(-len(plan) // per_slot))))))
        if failures:
            raise all_stalled(failures) or failures[0]

    async def _read_piece(self, file: File, piece: Piece, buffer: memoryview, into: memoryview) -> None:
        """Read until all that is wanted is there: the file may end within the last page."""

        def then(_: memoryview) -> None:
            self._move(piece, buffer, into)

        done = 0
        while True:
            request = Request(piece.begin + done, buffer[done:], then if not done else None)
            (outcome,) = await file.read([request])
            if isinstance(outcome, InterruptedError):
                continue
            if isinstance(outcome, BaseException):
                raise outcome
            self._count(1, outcome)
            if outcome == len(request.buffer) and request.then is not None:
                return
            if done + outcome >= piece.needed:
                await self._past_cache.work(then, buffer)
                return
            if outcome < PAGE:
                raise OSError(errno.EIO, f"the file ended at {piece.begin + done + outcome}, {piece.needed - done - outcome} bytes early")
            done += outcome // PAGE * PAGE

    def _move(self, piece: Piece, buffer: memoryview, into: memoryview) -> None:
        """On an I/O thread. `memmove` through ctypes gives up the interpreter's lock; slices of a memoryview would keep it."""
        start_ns = self._clock.now_ns()
        source, target = ctypes.c_char.from_buffer(buffer), ctypes.c_char.from_buffer(into)  # keep both mapped
        shift = ctypes.addressof(source) - piece.begin
        goal = ctypes.addressof(target)
        for part in piece.parts:
            ctypes.memmove(goal + part.target, shift + part.begin, part.nbytes)
        with self._counting:
            self.stats.shifted_bytes += sum(part.nbytes for part in piece.parts)
            self.stats.shift_ns += self._clock.now_ns() - start_ns

    def _count(self, requests: int, nbytes: int) -> None:
        self.stats.requests += requests
        self.stats.read_bytes += nbytes

    def _check(self, shard: Shard, chunk: int, found: int) -> None:
        """See [Note: Files of somebody else's]."""
        if shard.chunks is not None and found != shard.chunks[chunk]:
            start, stop = chunk_range(shard, chunk)
            hit = [
                (spec.name, place[0])
                for spec, place in zip(shard.block.tensors, _adopted(shard).places, strict=True)
                if spec.nbytes and spec.offset < stop and spec.offset + spec.nbytes > start
            ]
            path = _adopted(shard).files[hit[0][1] if hit else 0].path
            raise changed(
                path,
                f"does not hold what was read from it first, in tensor {' or '.join(repr(name) for name, _ in hit[:3])}",
                block=shard.block.name,
                chunk=chunk,
                tensor=hit[0][0] if hit else None,
            )


class _Sums:
    """Checksums of a payload's chunks, each as soon as the chunk is complete, while it may still be in a cache."""

    def __init__(self, models: Models, shard: Shard, into: memoryview) -> None:
        self._models = models
        self._shard = shard
        self._into = into
        self._found: dict[int, int] = {}
        self._sums: dict[int, asyncio.Future[None]] = {}
        self._left: dict[int, int] = {}
        for one in ranges(shard.block, _adopted(shard)):
            for low, high in split_chunks(one.target, one.nbytes):
                self._left[low // CHUNK_BYTES] = self._left.get(low // CHUNK_BYTES, 0) + high - low

    @property
    def found(self) -> tuple[int, ...]:
        return tuple(self._found[chunk] for chunk in range(num_chunks(self._shard.payload_bytes)))

    def landed(self, piece: Piece) -> None:
        """A piece is in its place."""
        for part in piece.parts:
            for low, high in split_chunks(part.target, part.nbytes):
                chunk = low // CHUNK_BYTES
                self._left[chunk] -= high - low
                if not self._left[chunk]:
                    self._begin(chunk)

    async def finish(self) -> None:
        """Sum what is left, and wait for all sums.

        Raises:
            ModelFileError: One of them is not what it was.
        """
        for chunk in range(num_chunks(self._shard.payload_bytes)):
            self._begin(chunk)
        await self.end()
        for sum_ in self._sums.values():
            sum_.result()

    async def end(self) -> None:
        """Have no sum under way, whatever has become of it."""
        await land(asyncio.gather(*self._sums.values(), return_exceptions=True))

    def _begin(self, chunk: int) -> None:
        if chunk not in self._sums and self._models._checksum:
            self._sums[chunk] = asyncio.ensure_future(self._sum(chunk))

    async def _sum(self, chunk: int) -> None:
        start, stop = chunk_range(self._shard, chunk)
        self._found[chunk] = await self._models._files.work(checksum, self._into[start:stop])
        self._models._check(self._shard, chunk, self._found[chunk])


class Stream:
    """See `Models.stream`."""

    def __init__(self, models: Models, shard: Shard, files: Sequence[File]) -> None:
        self._models = models
        self._shard = shard
        self._files = files
        self._reached = 0
        self._running = xxhash.xxh3_64()
        self.found: tuple[int, ...] = ()

    async def read(self, into: memoryview) -> None:
        """Fill `into` with the bytes that come next."""
        models, shard = self._models, self._shard
        start, stop = self._reached, self._reached + len(into)
        await models._files.work(_clear, into, [(low - start, high - start) for low, high in gaps(shard.block, start, stop)])
        await models._straight(shard, self._files, into, start)
        self._reached = stop
        for low, high in split_chunks(start, len(into)) if models._checksum else ():
            await models._files.work(self._running.update, into[low - start : high - start])
            if high == chunk_range(shard, low // CHUNK_BYTES)[1]:
                self.found += (self._running.intdigest(),)
                models._check(shard, low // CHUNK_BYTES, self.found[-1])
                self._running = xxhash.xxh3_64()

    async def finish(self) -> None:
        assert self._reached == self._shard.payload_bytes, f"{self._reached} of {self._shard.payload_bytes} bytes were read"


def _adopted(shard: Shard) -> Adopted:
    assert shard.adopted is not None
    return shard.adopted


def _clear(into: memoryview, parts: Iterable[tuple[int, int]]) -> None:
    for low, high in parts:
        into[low:high] = bytes(high - low)
