"""What POSIX systems do each in its own way; that of macOS with its calls played by the test."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tierstore.nvme import system
from tierstore.nvme.system import Posix

FULL_SYNC, NO_CACHE = 51, 48


class Control:
    """`fcntl`, which refuses with `code` if there is one; `calls` has every command and its argument."""

    def __init__(self) -> None:
        self.code = 0
        self.calls: list[tuple[int, int]] = []

    def __call__(self, descriptor: int, command: int, argument: int) -> int:
        os.fstat(descriptor)
        self.calls.append((command, argument))
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return 0


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Control:
    control = Control()
    monkeypatch.setattr(system, "_DIRECT", None)
    monkeypatch.setattr(system, "_NO_CACHE", NO_CACHE)
    monkeypatch.setattr(system, "_FULL_SYNC", FULL_SYNC)
    monkeypatch.setattr(system, "_control", control)
    return control


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Descriptors that `os.fsync` was called with."""
    found: list[int] = []
    monkeypatch.setattr(os, "fsync", found.append)
    return found


def test_macos_has_the_drive_itself_write(control: Control, synced: list[int], tmp_path: Path) -> None:
    Posix().sync_directory(str(tmp_path))
    assert control.calls == [(FULL_SYNC, 0)]
    assert not synced


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_file_system_that_does_not_know_it_gets_fsync(control: Control, synced: list[int], tmp_path: Path, code: int) -> None:
    control.code = code
    Posix().sync_directory(str(tmp_path))
    assert len(synced) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_failed_is_not_tried_another_way(control: Control, synced: list[int], tmp_path: Path, code: int) -> None:
    control.code = code
    with pytest.raises(OSError) as caught:  # noqa: PT011  # its number is looked at
        Posix().sync_directory(str(tmp_path))
    assert caught.value.errno == code
    assert not synced, "it could claim success for bytes that are lost"


def test_macos_bypasses_the_cache_by_a_call(control: Control, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    flags = os.O_RDWR | os.O_CREAT
    os.close(Posix().open(path, flags))
    assert not control.calls
    os.close(Posix().open(path, flags, direct=True))
    assert control.calls == [(NO_CACHE, 1)]
    control.code = errno.ENOTSUP
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    with pytest.raises(OSError, match=os.strerror(errno.ENOTSUP)):
        Posix().open(path, flags, direct=True)
    assert not before or len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"
    assert system.can_bypass_cache()


def test_systems_without_either_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_DIRECT", None)
    monkeypatch.setattr(system, "_NO_CACHE", None)
    assert not system.can_bypass_cache()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="there is no such call here")
def test_room_is_reserved_or_at_least_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(code: int) -> None:
        def refuse(*_: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", refuse)

    descriptor = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    try:
        answer(errno.ENOSPC)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            Posix().make_room(descriptor, 8192)
        assert os.fstat(descriptor).st_size == 0
        answer(errno.EOPNOTSUPP)
        Posix().make_room(descriptor, 8192)
        assert os.fstat(descriptor).st_size == 8192
    finally:
        os.close(descriptor)
