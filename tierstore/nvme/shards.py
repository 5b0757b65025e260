"""One shard: its state, and how its payload is read and written.

[Note: What a shard may be used for]
A shard that a kept or in-flight commit refers to (`references`), or whose file has another name elsewhere, is never touched.
A *working* shard, which nothing refers to, is rewritten in place. A write in place that failed leaves it `broken`: its bytes
are undefined. A sync that failed leaves it `suspect`: the system may have dropped what it could not write and claim success
the next time, so the file is never synced again; its bytes are copied, against their checksums, into a new file.

[Note: When checksums are verified]
Each chunk is verified at its first read after opening the directory or after it was written, in the I/O thread that read it,
and not again: what was read right once is taken to stay right while the store is open. Before part of an unverified chunk is
read, the whole chunk is streamed through the caller's buffer once, so that no byte is served unverified and no memory is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import xxhash

from tierstore.catalog import PAGE, Block
from tierstore.errors import ShardError, TierFullError, TierstoreError, TransferError
from tierstore.nvme.adopted import Adopted, ModelFile
from tierstore.nvme.checksums import CHUNK_BYTES, checksum, num_chunks, shard_checksum, split_chunks
from tierstore.nvme.files import FULL, File, Files, Request, Then, aligned_buffer, move_all
from tierstore.nvme.manifest import Record, ShardRecord, encode_record, format_of
from tierstore.threads import StalledError, under_way

MIN_SCRATCH_BYTES = 1 << 18
RESTORE = "open an older generation (generation=), if keep= has kept one, or restore the file from a backup"


@dataclass(eq=False, slots=True)
class Shard:
    """The NVMe copy of one block. Changed only on the engine's loop, by the directory.

    Attributes:
        block: The block it holds.
        file: Its name in the directory; changes if the bytes have to move to a new file.
        number: The running number in that name.
        file_bytes: Length of the file.
        data_start: Bytes before the payload.
        header_sum: xxh3_64 of the header, where this process wrote it.
        chunks: xxh3_64 per 16 MiB of payload, None when written without.
        digest: xxh3_64 over those and the header's.
        references: Kept generations and in-flight commits that need it.
        synced: What was written is durable.
        broken: A write in place failed; the bytes are undefined.
        suspect: A sync failed; see [Note: What a shard may be used for].
        spare: Likewise, and its user has the bytes elsewhere, and will write them anew.
        discarded: No block uses it as its current copy any more.
        writing: A write is under way.
        unverified: Chunks whose next whole read is checked.
        header_unverified: The header is checked at the next read.
        handle: What it was last written through, kept until it is synced.
        hung: Writes that were given up and may still change the file, which is nobody else's until they have returned.
        line: What its line in a manifest was made from, the line, and the version of the format that it takes.
        adopted: Where it lies in model files; it has no file of the store's then, and all of the above but `block`, `chunks`, `references`,
            `discarded` and `header_unverified` stays as it is. `chunks` is None until they are learned: see `mover.models`.
    """

    block: Block
    file: str
    number: int
    file_bytes: int
    data_start: int
    header_sum: int = 0
    chunks: tuple[int, ...] | None = None
    digest: int = 0
    references: int = 0
    synced: bool = False
    broken: bool = False
    suspect: bool = False
    spare: bool = False
    discarded: bool = False
    writing: bool = False
    unverified: set[int] = field(default_factory=set)
    header_unverified: bool = False
    handle: File | None = None
    hung: tuple[Future[None], ...] = ()
    line: tuple[tuple[object, ...], str, int] | None = field(default=None, repr=False)
    adopted: Adopted | None = None

    @property
    def payload_bytes(self) -> int:
        return self.block.nbytes

    @property
    def whole(self) -> bool:
        """Holds a complete payload."""
        return not (self.broken or self.writing)

    @property
    def working(self) -> bool:
        """May be rewritten in place, as far as the store alone knows."""
        return self.whole and self.adopted is None and not (self.references or self.suspect or self.discarded)

    def record(self) -> ShardRecord:
        return ShardRecord(self.file, self.number, self.file_bytes, self.data_start, self.chunks, self.digest)

    @classmethod
    def of_model(cls, block: Block, adopted: Adopted, chunks: tuple[int, ...] | None = None) -> Shard:
        """A block that lies in model files, as if these were its shard."""
        return cls(block, "", 0, 0, 0, chunks=chunks, synced=True, adopted=adopted)

    def look_again(self, found: Mapping[ModelFile, ModelFile | str]) -> None:
        """Take its model files as they are now, or look at them before the next read where they were not what they should be."""
        assert self.adopted is not None
        now = [(file, found.get(file, file)) for file in self.adopted.files]
        self.adopted = replace(self.adopted, files=tuple(file if isinstance(one, str) else one for file, one in now))
        self.header_unverified = any(isinstance(one, str) for _, one in now)

    @classmethod
    def from_record(cls, block: Block, record: ShardRecord) -> Shard:
        """A shard that a manifest describes: durable, and not verified yet."""
        return cls(
            block=block,
            file=record.file,
            number=record.number,
            file_bytes=record.file_bytes,
            data_start=record.data_start,
            chunks=record.chunks,
            digest=record.digest,
            synced=True,
            unverified=set(range(num_chunks(block.nbytes))) if record.chunks is not None else set(),
            header_unverified=True,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A block and the shard that holds its newest or committed bytes."""

    block: Block
    shard: Shard

    def line(self) -> str:
        """Its line in a manifest. Encoded once per content of the shard: most of a manifest is as in the one before.

        On any thread, while nobody writes the shard.
        """
        shard = self.shard
        source = (self.block, shard.file, shard.digest, shard.chunks, shard.adopted)
        if shard.line is None or shard.line[0] != source:
            record = Record(self.block, shard.record(), shard.adopted)
            shard.line = source, encode_record(record), format_of(self.block, shard.adopted)
        return shard.line[1]

    @property
    def format(self) -> int:
        """The first version of the format that can say its line, once that was asked for."""
        return self.shard.line[2] if self.shard.line is not None else format_of(self.block, self.shard.adopted)


def io_error(error: OSError, doing: str, *, path: str, block: str | None = None) -> TierstoreError:
    """The tree's error for one of the system's. `doing` completes "failed while ...", and names the block if there is one."""
    if error.errno in FULL:
        return TierFullError(
            f"the drive ran full while {doing} ({path}: {error.strerror})",
            remedy="free space on the drive, and repeat the call; what was committed is intact",
            tier="nvme",
            path=path,
            block=block,
        )
    return TransferError(
        f"{doing} failed ({path}: {error.strerror or error})",
        remedy="check the drive; the newest copy is where it was, so the call may be repeated",
        tier="nvme",
        path=path,
        block=block,
        **({"seconds": error.seconds} if isinstance(error, StalledError) else {}),
    )


def damage(shard: Shard, path: str, what: str, *, remedy: str = RESTORE, **details: object) -> ShardError:
    return ShardError(
        f"the shard of block {shard.block.name!r} is damaged: {what} in {path}",
        remedy=remedy,
        tier="nvme",
        block=shard.block.name,
        path=path,
        **details,
    )


async def check_header(files: Files, path: str, shard: Shard) -> None:
    """Verify a recovered shard's header and digest.

    Raises:
        ShardError: They are not what was written.
        OSError: The read failed.
    """
    header = await files.load(path, shard.data_start)
    if len(header) != shard.data_start or shard_checksum(checksum(header), shard.chunks or ()) != shard.digest:
        raise damage(shard, path, "the header does not match its checksum", chunk=None)


def chunk_range(shard: Shard, chunk: int) -> tuple[int, int]:
    """Where a chunk begins and ends, in bytes from the payload's start."""
    return chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, shard.payload_bytes)


def check_chunk(shard: Shard, path: str, chunk: int, found: int) -> None:
    assert shard.chunks is not None
    if found != shard.chunks[chunk]:
        start, stop = (shard.data_start + place for place in chunk_range(shard, chunk))
        raise damage(shard, path, f"chunk {chunk} (bytes {start} to {stop}) does not match its checksum", chunk=chunk)


async def verify_chunk(files: Files, file: File, path: str, shard: Shard, chunk: int, scratch: memoryview) -> None:
    """Stream one chunk through `scratch` and check its sum.

    Raises:
        ShardError: It does not match.
        OSError: A read failed.
    """
    if len(scratch) < MIN_SCRATCH_BYTES:
        scratch = aligned_buffer(MIN_SCRATCH_BYTES)
    running = xxhash.xxh3_64()
    start, stop = chunk_range(shard, chunk)
    for offset in range(start, stop, len(scratch)):
        piece = scratch[: min(len(scratch), stop - offset)]
        await move_all(files, file.read, [Request(shard.data_start + offset, piece, running.update)])
    check_chunk(shard, path, chunk, running.intdigest())
    shard.unverified.discard(chunk)


async def read_payload(files: Files, path: str, shard: Shard, into: memoryview, offset: int, *, verify: bool) -> None:
    """Fill `into` from the payload, in requests that end at chunk boundaries, all in flight together.

    Raises:
        ShardError: A chunk does not match its checksum.
        OSError: A read failed.
    """
    file = files.file(path)
    checked: list[int] = []

    def then(chunk: int) -> Then:
        def check(buffer: memoryview) -> None:
            check_chunk(shard, path, chunk, checksum(buffer))
            checked.append(chunk)

        return check

    requests = []
    try:
        for start, stop in split_chunks(offset, len(into)):
            chunk = start // CHUNK_BYTES
            unverified = verify and shard.chunks is not None and chunk in shard.unverified
            whole = (start, stop) == chunk_range(shard, chunk)
            if unverified and not whole:
                await verify_chunk(files, file, path, shard, chunk, into)
            buffer = into[start - offset : stop - offset]
            requests.append(Request(shard.data_start + start, buffer, then(chunk) if unverified and whole else None))
        await move_all(files, file.read, requests)
        shard.unverified.difference_update(checked)
    finally:
        await file.close()


class Owner(Protocol):
    """What a writer needs of the directory."""

    files: Files
    checksum: bool

    def path_of(self, shard: Shard) -> str: ...
    def written(self, shard: Shard) -> None: ...
    async def unwritten(self, shard: Shard, *, in_place: bool) -> None: ...


class ShardWriter:
    """Writes a payload piece by piece. End it with `finish` or `abort`. Engine loop only.

    Pieces are multiples of 4096 bytes. Those of one 16 MiB chunk come in order, each after the one before has been written;
    different chunks may be in flight together.
    """

    def __init__(self, owner: Owner, shard: Shard, file: File, *, in_place: bool) -> None:
        self.shard = shard
        self._owner = owner
        self._file = file
        self._in_place = in_place
        self._reached: dict[int, int] = {}  # chunk to bytes of it that were handed in
        self._written_bytes = 0
        self._sums: dict[int, int] = {}
        self._partial: dict[int, xxhash.xxh3_64] = {}
        self._busy = 0

    async def write(self, offset: int, source: memoryview) -> None:
        """Write `source` at `offset` bytes of the payload. `source` must not change meanwhile.

        Raises:
            ValueError: Not page multiples, beyond the payload, or out of order within a chunk.
            TierFullError, TransferError: The write failed; call `abort`.
        """
        source = source.cast("B")
        if offset % PAGE or len(source) % PAGE or offset + len(source) > self.shard.payload_bytes:
            raise ValueError(f"a piece of {len(source)} bytes at {offset} is not whole pages of a payload of {self.shard.payload_bytes}")
        pieces = list(split_chunks(offset, len(source)))
        for start, _ in pieces:
            if self._reached.get(start // CHUNK_BYTES, 0) != start % CHUNK_BYTES:
                raise ValueError(f"the piece at {start} does not continue its chunk of {CHUNK_BYTES} bytes")
        for start, stop in pieces:
            self._reached[start // CHUNK_BYTES] = stop - start // CHUNK_BYTES * CHUNK_BYTES
        self._busy += 1
        try:
            await move_all(
                self._owner.files,
                self._file.write,
                [
                    Request(self.shard.data_start + start, source[start - offset : stop - offset], self._summing(start, stop))
                    for start, stop in pieces
                ],
            )
            self._written_bytes += len(source)
        except BaseException as error:
            self.shard.hung += under_way(error)  # whoever was cancelled may have left a call behind, too
            if not isinstance(error, OSError):
                raise
            path = self._owner.path_of(self.shard)
            raise io_error(error, f"writing block {self.shard.block.name!r}", path=path, block=self.shard.block.name) from error
        finally:
            self._busy -= 1

    async def finish(self) -> Shard:
        """Declare the payload complete. Not synced: `commit` does that.

        Raises:
            ValueError: Bytes are missing.
        """
        if self._busy or self._written_bytes != self.shard.payload_bytes:
            raise ValueError(f"{self._written_bytes} of {self.shard.payload_bytes} bytes are written")
        shard = self.shard
        if self._owner.checksum:
            self._sums.update((chunk, partial.intdigest()) for chunk, partial in self._partial.items())
            shard.chunks = tuple(self._sums[chunk] for chunk in range(num_chunks(shard.payload_bytes)))
            shard.unverified = set(range(len(shard.chunks)))
        else:
            shard.chunks = None
            shard.unverified = set()
        shard.digest = shard_checksum(shard.header_sum, shard.chunks or ())
        shard.writing = False
        self._owner.written(shard)
        return shard

    async def abort(self) -> None:
        """Drop what was written. A shard that was being rewritten in place is broken from here on. Nothing after `finish`."""
        if not self.shard.writing:
            return
        self.shard.writing = False
        await self._owner.unwritten(self.shard, in_place=self._in_place)

    def _summing(self, start: int, stop: int) -> Then | None:
        if not self._owner.checksum:
            return None
        chunk = start // CHUNK_BYTES
        if stop - start == min(CHUNK_BYTES, self.shard.payload_bytes - chunk * CHUNK_BYTES):

            def whole(buffer: memoryview) -> None:
                self._sums[chunk] = checksum(buffer)

            return whole
        return self._partial.setdefault(chunk, xxhash.xxh3_64()).update
