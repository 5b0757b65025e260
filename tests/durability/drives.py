"""Drives that are really full: a small tmpfs, a small ext4 behind a loop device, a limit on the size of files, and `nvme_limit`.

Mounting takes rights that a test may not have; then it is skipped in words. The limit on file sizes and `nvme_limit` work everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import torch

from tierstore import TierStore
from tierstore.errors import TierFullError

if sys.platform != "win32":
    import resource

DRIVE_BYTES = 2 << 20


class Drive(Protocol):
    """Where a store lives, and how its drive runs full."""

    path: Path

    def fill(self, store: TierStore | None = None) -> None:
        """Leave no room at all."""
        ...

    def free(self, store: TierStore | None = None) -> None: ...

    def elsewhere(self) -> contextlib.AbstractContextManager[object]:
        """While others write to other drives."""
        ...


class Mounted:
    """A file system of its own, filled with a file that is not the store's."""

    def __init__(self, root: Path) -> None:
        self.path = root / "swap"
        self._ballast = root / "ballast"

    def fill(self, store: TierStore | None = None) -> None:
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 1 << 16, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(descriptor, bytes(size))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free(self, store: TierStore | None = None) -> None:
        self._ballast.unlink(missing_ok=True)

    def elsewhere(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


class ShortFiles:
    """A limit on the length of files: no new shard or manifest can be made. For a process of its own."""

    def __init__(self, root: Path) -> None:
        self.path = root / "swap"
        self._usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, store: TierStore | None = None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self._usual[1]))

    def free(self, store: TierStore | None = None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._usual)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.free()
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Limited:
    """`nvme_limit`, filled with blocks that nobody needs."""

    def __init__(self, root: Path) -> None:
        self.path = root / "swap"

    def fill(self, store: TierStore | None = None) -> None:
        assert store is not None
        with contextlib.suppress(TierFullError):
            for number in range(10_000):
                store.put(f"ballast{number}", torch.zeros(8), tier="nvme")

    def free(self, store: TierStore | None = None) -> None:
        assert store is not None
        for name in [name for name in store if name.startswith("ballast")]:
            store.delete(name)

    def elsewhere(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def mounted(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A small file system of this kind; skips where it may not be mounted."""
    root = tmp_path / kind
    root.mkdir()
    source, options = "tmpfs", f"size={DRIVE_BYTES},mode=700"
    if kind == "ext4":
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 2 * DRIVE_BYTES)
        _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image))
        source, options = str(image), "loop"
    _run("mount", "-t", kind, "-o", options, source, str(root))
    try:
        yield root
    finally:
        _run("umount", str(root))


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EACCES):
            pytest.skip(f"no {command[0]} here")
        raise
    if done.returncode and command[0] != "umount":
        pytest.skip(f"{command[0]} is refused here: {done.stderr.strip()}")
    assert not done.returncode, done.stderr
