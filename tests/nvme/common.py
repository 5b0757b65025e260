"""What the tests of directories share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tierstore.nvme.directory import Directory
from tierstore.nvme.files import aligned_buffer
from tierstore.nvme.local import LocalFiles
from tierstore.nvme.shards import Shard

T = TypeVar("T")


def with_directory(path: str, use: Callable[[Directory], Awaitable[T]], **options: Any) -> T:
    """Open, use, close."""
    directory = Directory.open(path, **options)

    async def go() -> T:
        try:
            return await use(directory)
        finally:
            await directory.close()

    return asyncio.run(go())


async def contents(directory: Directory, shard: Shard) -> memoryview:
    into = aligned_buffer(shard.payload_bytes)
    await directory.read(shard, into)
    return into


def kept(keep: int = 1) -> int:
    """Generations that stay: one more where directories cannot be synced."""
    return keep + (not LocalFiles().syncs_directories)


def shard_files(path: str) -> set[str]:
    return {name for name in os.listdir(path) if name.startswith("block-")}
