"""What the directory's files take of the drive, against a hard limit; and freed files, kept to be rewritten.

[Note: Counting files]
A file counts as its length rounded up to pages, and one page more for its directory entry and extent map, so that the sum is
no less than what `du` shows. Space is counted before a file grows and given back after it is gone, so the sum is never behind.

[Note: The pool]
Copy on write frees, at each commit, as many bytes as it wrote, in files of just the sizes that will be written next. They wait
here, at most as many bytes as the blocks' present shards take, and are deleted at once when anything else needs the space.

[Note: The bound]
With S bytes of blocks and `keep` generations, n commits under way and the newest state need at most (keep + n + 1) S, and files of
other lengths than those needed now as much as S more until a commit ends. A limit of (keep + 2) S is enough however many commits are
asked for: a write that finds no room waits for the commits that are being made durable, as each lets go of the generation before it,
and while two commits are still being saved nobody begins to write. To S belong a header for each block and a page for each file.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

from tierstore.catalog import PAGE, round_up
from tierstore.errors import TierFullError
from tierstore.nvme.files import Files, land
from tierstore.threads import StalledError

log = logging.getLogger(__name__)

FIXED_BYTES = 6 * PAGE
"""The directory itself, lock, holder's process id, CURRENT and its temporary, the probe for direct I/O."""


Relief = Callable[[], Awaitable[bool]]


async def no_relief() -> bool:
    """For the commit itself, which cannot wait for its own end."""
    return False


def footprint(file_bytes: int) -> int:
    """Bytes of drive that a file of this length is counted as."""
    return round_up(file_bytes, PAGE) + PAGE


class Space:
    """Counts and reserves. Engine loop only.

    Attributes:
        limit_bytes: Never exceeded.
        renew_limit: Raises the limit where it came from the free space and there is more of that by now; tells whether it did.
        used_bytes: Counted now.
        peak_bytes: The most since opening.
        pool_bytes: Lengths of the pooled files.
    """

    def __init__(self, files: Files, path: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.renew_limit: Relief = no_relief
        self.used_bytes = FIXED_BYTES
        self.peak_bytes = FIXED_BYTES
        self._files = files
        self._path = path
        self._pool: dict[str, int] = {}  # file name to length, oldest first
        self._by_length: dict[int, dict[str, None]] = {}  # the same files, to be found by length
        self.pool_bytes = 0
        self._doomed: dict[str, int] = {}  # likewise, never to be rewritten
        self._told: set[str] = set()  # those of them of which the log has been told that they cannot be deleted
        self._deleting = asyncio.Lock()

    def give_back(self, file_bytes: int) -> None:
        """Stop counting a file that is gone."""
        self.used_bytes -= footprint(file_bytes)

    async def reserve(self, file_bytes: int, relief: Relief, *, what: str, block: str | None = None) -> None:
        """Count a file about to be made, deleting pooled files as needed. See [Note: The bound].

        Args:
            file_bytes: Its length.
            relief: Waits for what may free space, and tells whether there was anything to wait for.
            what, block: Named in the error.

        Raises:
            TierFullError: It does not fit. Nothing was written.
        """
        need = footprint(file_bytes)
        while not await self._reserve(need):
            if not await relief() and not await self.renew_limit():
                automatic = self.renew_limit is not no_relief
                raise TierFullError(
                    f"tier 'nvme' is full: no room for {what} in {self._path}",
                    need=f"{need} bytes",
                    have=f"{max(0, self.limit_bytes - self.used_bytes)} bytes of {self.limit_bytes}, "
                    + ("what it holds and most of the drive's free space" if automatic else "the limit"),
                    remedy="free space on the drive, delete blocks, or keep fewer generations; the same call may then be repeated"
                    if automatic
                    else "raise nvme_limit= (a loop that waits for its commits takes up to keep + 1 times its blocks), delete blocks, "
                    "or keep fewer generations",
                    tier="nvme",
                    path=self._path,
                    block=block,
                )

    async def _reserve(self, need: int) -> bool:
        async with self._deleting:
            failed: set[str] = set()
            while self.used_bytes + need > self.limit_bytes:
                if not await self._delete_one(failed):
                    return False
            self.used_bytes += need
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
            return True

    def offer(self, name: str, file_bytes: int) -> None:
        """Put a file nobody refers to into the pool."""
        self._pool[name] = file_bytes
        self._by_length.setdefault(file_bytes, {})[name] = None
        self.pool_bytes += file_bytes

    def doom(self, name: str, file_bytes: int) -> None:
        """Let a file be deleted at the next occasion."""
        self._doomed[name] = file_bytes

    def take(self, file_bytes: int) -> str | None:
        """A pooled file of exactly this length, the most recently freed; it stays counted."""
        alike = self._by_length.get(file_bytes)
        if not alike:
            return None
        name = next(reversed(alike))
        self._unpool(name)
        return name

    async def trim(self, pool_bytes: int = 0) -> None:
        """Delete doomed files, and pooled ones beyond `pool_bytes`."""
        async with self._deleting:
            failed: set[str] = set()
            while (self._doomed.keys() - failed or self.pool_bytes > pool_bytes) and await self._delete_one(failed):
                pass

    def _unpool(self, name: str) -> int:
        file_bytes = self._pool.pop(name)
        alike = self._by_length[file_bytes]
        del alike[name]
        if not alike:
            del self._by_length[file_bytes]
        self.pool_bytes -= file_bytes
        return file_bytes

    async def _delete_one(self, failed: set[str]) -> bool:
        """False when there is nothing to delete, or the drive does not answer.

        Args:
            failed: What could not be deleted this time; added to.
        """
        name = next((name for name in self._doomed if name not in failed), None)
        if name is not None:
            file_bytes = self._doomed.pop(name)
        elif self._pool:
            name = next(iter(self._pool))
            file_bytes = self._unpool(name)
        else:
            return False
        return await land(self._delete(name, file_bytes, failed))

    async def _delete(self, name: str, file_bytes: int, failed: set[str]) -> bool:
        """Whether it is worth trying another."""
        try:
            await self._files.unlink(os.path.join(self._path, name))
        except FileNotFoundError:
            pass
        except OSError as error:  # it stays on the drive, so it stays counted, and is tried again with the next ones
            log.log(logging.DEBUG if name in self._told else logging.WARNING, "could not delete %s in %s: %s", name, self._path, error)
            self._told.add(name)
            self._doomed[name] = file_bytes
            failed.add(name)
            return not isinstance(error, StalledError)
        self._told.discard(name)
        self.give_back(file_bytes)
        return True
