"""What each operating system does in its own way: opening without following links, past the cache, room, durability.

`Posix` is here; Windows has `tierstore.nvme.windows`.

[Note: What fsync means on macOS]
There `fsync` hands the bytes to the drive, which may keep them in a cache of its own that a power cut empties; F_FULLFSYNC has the
drive write them. A file system that does not know it (a network share, FAT) says so, and gets `fsync`. Any other error of F_FULLFSYNC is
the sync's: an `fsync` behind it could claim success for bytes that were lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol

FILE_MODE = 0o600
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_DIRECT: int | None = getattr(os, "O_DIRECT", None)
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
"""What a file system answers to a request it does not know."""

# As macOS has them.
_NO_CACHE: int | None = None
_FULL_SYNC: int | None = None
_control: Callable[[int, int, int], Any]
if sys.platform != "win32":
    import fcntl

    _NO_CACHE = getattr(fcntl, "F_NOCACHE", None)
    _FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)
    _control = fcntl.fcntl


class System(Protocol):
    """One operating system's calls. All block, and may come from any thread; all raise `OSError` that names the path as it was given.

    Attributes:
        syncs_directories: `sync_directory` makes renames durable.
        streams_directly: Handles that are opened for one request each can bypass the page cache.
    """

    syncs_directories: bool
    streams_directly: bool

    def given(self, path: str) -> str:
        """The path as the system's calls take it."""
        ...

    def open(self, path: str, flags: int, *, direct: bool = False) -> int:
        """A descriptor of a file that is no link, not inherited by children.

        Args:
            path: Absolute.
            flags: As for `os.open`.
            direct: Past the page cache.
        """
        ...

    def make_room(self, descriptor: int, nbytes: int) -> None:
        """Give a new file its length, and have a full drive found now rather than later where that is possible."""
        ...

    def sync(self, descriptor: int) -> None:
        """Have the drive keep a file. The descriptor is one that may write."""
        ...

    def sync_directory(self, path: str) -> None:
        """Have the drive keep the names in a directory, where `syncs_directories`."""
        ...

    def replace(self, source: str, target: str) -> None: ...
    def unlink(self, path: str) -> None: ...


class Posix:
    """Linux, macOS and their like."""

    syncs_directories = True
    streams_directly = False

    def given(self, path: str) -> str:
        return path

    def open(self, path: str, flags: int, *, direct: bool = False) -> int:
        descriptor = os.open(path, flags | _NO_FOLLOW | ((_DIRECT or 0) if direct else 0), FILE_MODE)
        if direct and _DIRECT is None and _NO_CACHE is not None:
            try:
                _control(descriptor, _NO_CACHE, 1)
            except BaseException:
                os.close(descriptor)
                raise
        return descriptor

    def make_room(self, descriptor: int, nbytes: int) -> None:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, nbytes)
                return
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        os.ftruncate(descriptor, nbytes)

    def sync(self, descriptor: int) -> None:
        if _FULL_SYNC is not None:
            try:
                _control(descriptor, _FULL_SYNC, 0)
                return
            except OSError as error:  # see [Note: What fsync means on macOS]
                if error.errno not in _REFUSED:
                    raise
        os.fsync(descriptor)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.sync(descriptor)
        finally:
            os.close(descriptor)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)


def can_bypass_cache() -> bool:
    """Whether `Posix` has a way past the page cache at all."""
    return _DIRECT is not None or _NO_CACHE is not None


def close_quietly(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
