"""What a stretch of code opens for writing, renames or removes, as Python's audit events tell; and a tree that must not change."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "os.chmod", "os.chown", "os.utime"}
FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "marshal.loads"}

_watches: list[set[str]] = []
_installed = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watches:
        return
    if event in FORBIDDEN:
        paths = [f"<{event}>"]
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        paths = [args[0]]
    elif event in CHANGING:
        paths = [path for path in args if isinstance(path, str | bytes | os.PathLike)]
    else:
        return
    for watch in _watches:
        watch.update(os.fsdecode(path) for path in paths if not isinstance(path, int))


@contextmanager
def changes() -> Iterator[set[str]]:
    """Paths that anything in this process opens for writing or changes meanwhile, on any thread."""
    global _installed  # noqa: PLW0603 (an audit hook is for ever)
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    watch: set[str] = set()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)


@contextmanager
def only_inside(directory: Path) -> Iterator[None]:
    """Nothing but what lies in the directory is changed, or opened for writing."""
    with changes() as watch:
        yield
    root = os.path.realpath(directory)
    outside = {path for path in watch if not (os.path.abspath(path) == root or os.path.dirname(os.path.abspath(path)) == root)}
    assert not outside, f"outside of {root}: {outside}"


class Canaries:
    """Files that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "folder").mkdir(parents=True)
        self.file = root / "file"
        for path in (self.file, root / "folder" / "inner"):
            path.write_bytes(b"nobody writes here" * 1000)
            os.utime(path, (1e9, 1e9))
        self._before = self._look()

    def _look(self) -> dict[str, tuple[int, int, float, bytes]]:
        found = {}
        for path in sorted(self.root.rglob("*")):
            if path.is_file():
                status = path.stat()
                found[str(path)] = (stat.S_IMODE(status.st_mode), status.st_size, status.st_mtime, path.read_bytes())
        return found

    def check(self) -> None:
        assert self._look() == self._before
