"""A model file beside the directory: blocks are adopted from it, and nobody writes to it."""

from __future__ import annotations

import functools
import json
import struct

from tests.crash.disk import CrashDisk
from tests.crash.ledger import Value, block_of
from tests.simulation.world import BrokenPromiseError
from tierstore.errors import ModelFileError
from tierstore.nvme.adopted import ranges
from tierstore.nvme.checksums import checksum
from tierstore.nvme.files import Files, Request, aligned_buffer, move_all
from tierstore.nvme.layouts import claims
from tierstore.nvme.model_files import changed, look_again, survey
from tierstore.nvme.shards import Shard

MODEL = "/elsewhere/model.safetensors"

VALUES = {name: Value(-1 - index, 1 + index % 3, adopted=True) for index, name in enumerate("mnop")}
"""What the file has for each block."""


@functools.cache
def content() -> bytes:
    """A valid file whose tensors lie at odd places."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in sorted(VALUES.items(), key=lambda item: -item[1].number % 3):
        payload = value.payload(name)
        for spec in block_of(name, value.pages).tensors:
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [len(data), len(data) + spec.nbytes],
            }
            data += payload[spec.offset : spec.offset + spec.nbytes]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def place(disk: CrashDisk) -> None:
    """Have it on the drive, for good."""
    disk.save(MODEL, content())
    disk.sync(MODEL)
    disk._settle_names()


async def adopt(files: Files, name: str) -> Shard:
    """A block where it lies, as `TierStore.adopt` finds it."""
    (claim,) = claims(await survey(files, MODEL), lambda tensor: name if tensor.startswith(f"{name}.") else None)
    if claim.block.tensors != block_of(name, VALUES[name].pages).tensors:
        raise BrokenPromiseError(f"block {name} was adopted as {claim.block}")
    return Shard.of_model(claim.block, claim.adopted)


async def read(files: Files, shard: Shard) -> bytes:
    """The payload, as `mover.models` puts it together.

    Raises:
        ModelFileError: The file is not what it was.
    """
    assert shard.adopted is not None
    into = aligned_buffer(shard.payload_bytes)
    for file in shard.adopted.files:
        found = await look_again(files, file)
        if isinstance(found, str):
            raise changed(file.path, found, block=shard.block.name)
    for one in ranges(shard.block, shard.adopted):
        handle = files.file(shard.adopted.files[one.file].path)
        await move_all(files, handle.read, [Request(one.begin, into[one.target : one.target + one.nbytes])])
    if shard.chunks is not None and shard.chunks != (checksum(into),):
        raise ModelFileError(f"block {shard.block.name} is not what its checksum says")
    return bytes(into)


def check_untouched(disk: CrashDisk) -> None:
    if bytes(disk.get(MODEL)) != content() or disk.inode(MODEL).durable != content():
        raise BrokenPromiseError(f"{MODEL} was changed")
