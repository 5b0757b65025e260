"""xxh3 checksums: one per chunk of a shard's payload, one over those and the header, one per manifest.

xxhash releases the GIL, so the sums are computed in the I/O threads while the bytes are in cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

CHUNK_BYTES = 16 << 20
"""Bytes of payload under one checksum, and the most that one request moves."""


def checksum(data: bytes | memoryview) -> int:
    """xxh3_64 of `data`. Any thread."""
    return xxhash.xxh3_64_intdigest(data)


def shard_checksum(header: int, chunks: Sequence[int]) -> int:
    """One sum for the whole file: over its header's sum and its chunks' sums (8 bytes each, little-endian)."""
    return checksum(b"".join(part.to_bytes(8, "little") for part in (header, *chunks)))


def num_chunks(payload_bytes: int) -> int:
    return -(-payload_bytes // CHUNK_BYTES)


def split_chunks(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut the range at chunk boundaries of the payload: (start, stop) of each piece, in bytes from the payload's start."""
    stop = offset + nbytes
    while offset < stop:
        end = min(stop, (offset // CHUNK_BYTES + 1) * CHUNK_BYTES)
        yield offset, end
        offset = end
