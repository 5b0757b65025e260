"""kernel32 and msvcrt over POSIX: what Windows does with the calls that the store makes, and a record of every argument.

Only what the store relies on is there, and it is strict: a call whose signature was not declared, an argument that the signature
would not take, a combination of flags that Windows refuses, or a handle that shares too little fails as it would there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tierstore.nvme import windows

ERRORS = {
    errno.ENOENT: 2,
    errno.ENOTDIR: 3,
    errno.EMFILE: 4,
    errno.EACCES: 5,
    errno.EPERM: 5,
    errno.EISDIR: 5,
    errno.EBADF: 6,
    errno.EEXIST: 80,
    errno.EINVAL: 87,
    errno.ENOSPC: 112,
    errno.EFBIG: 112,
    errno.ENAMETOOLONG: 206,
}
"""Windows' numbers for what POSIX answers; anything else is a general failure (31)."""

MEANING = {2: errno.ENOENT, 3: errno.ENOENT, 4: errno.EMFILE, 5: errno.EACCES, 6: errno.EBADF, 32: errno.EACCES, 33: errno.EACCES}
MEANING |= {80: errno.EEXIST, 112: errno.ENOSPC, 206: errno.ENOENT}
"""What Python makes of these numbers; EINVAL of the others."""


def as_error(code: int) -> OSError:
    """As `ctypes.WinError`."""
    number = MEANING.get(code, errno.EINVAL)
    error = OSError(number, f"Windows error {code}: {os.strerror(number)}")
    error.winerror = code  # type: ignore[attr-defined]
    return error


class WindowsError(Exception):
    """What a stand-in's function fails with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(eq=False)
class Handle:
    """An open file."""

    number: int
    descriptor: int
    path: str
    access: int
    share: int
    flags: int
    inode: tuple[int, int]
    given: bool = field(default=False)
    """The C runtime has it, and closes it with its descriptor."""


class Function:
    """A foreign function: refuses to be called undeclared, and converts its arguments as ctypes would."""

    restype: Any = None
    argtypes: Any = None

    def __init__(self, kernel: Kernel32, name: str, call: Callable[..., int]) -> None:
        self._kernel = kernel
        self._name = name
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        assert self.restype is not None, f"what {self._name} returns was not declared: a handle would lose half its bits"
        assert self.argtypes is not None, f"what {self._name} takes was not declared"
        assert len(arguments) == len(self.argtypes), f"{self._name} takes {len(self.argtypes)} arguments"
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            kind.from_param(argument)
            if kind is ctypes.wintypes.DWORD:
                assert 0 <= argument < 2**32, f"{self._name}: {argument:#x} does not fit"
        plain = tuple(getattr(argument, "_obj", argument) for argument in arguments)
        kernel = self._kernel
        with kernel.lock:
            if kernel.record:
                kernel.calls.append((self._name, *plain))
            codes = kernel.failing.get(self._name, [])
            code = codes.pop(0) if codes else 0
        try:
            if code:
                raise WindowsError(code)
            return self._call(*plain)
        except OSError as error:
            kernel.thread.error = ERRORS.get(error.errno or 0, 31)
        except WindowsError as error:
            kernel.thread.error = error.code
        assert windows.INVALID_HANDLE is not None
        return windows.INVALID_HANDLE if self._name == "CreateFileW" else 0


class Kernel32:
    """The library and the C runtime in one. Any thread.

    Attributes:
        calls: Every call: its name and what it was given.
        failing: By name of a call, the errors its next calls end with.
        takes_direct: Unbuffered handles are to be had.
        drive: What `C:` is, for paths that begin so.
        record: Whether `calls` are kept.
    """

    def __init__(self, *, takes_direct: bool = True, drive: str = "", record: bool = True) -> None:
        self.lock = threading.Lock()
        self.thread = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.failing: dict[str, list[int]] = {}
        self.takes_direct = takes_direct
        self.drive = drive
        self.record = record
        self._handles: dict[int, Handle] = {}
        self._given: dict[int, Handle] = {}
        self._next = 0x7FF0_0000_0004  # as no descriptor looks, and beyond 32 bits
        for name in windows.SIGNATURES:
            setattr(self, name, Function(self, name, getattr(self, f"_{name}")))

    def made(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of every call of this name."""
        return [call[1:] for call in self.calls if call[0] == name]

    def last_error(self) -> int:
        return int(self.thread.error)

    # -- files ---------------------------------------------------------------------------------------------------------------

    def _CreateFileW(  # noqa: N802  # as Windows has it
        self, path: str, access: int, share: int, security: None, disposition: int, flags: int, template: None
    ) -> int:
        assert security is None
        assert template is None
        assert disposition in (windows.CREATE_NEW, windows.OPEN_EXISTING, windows.OPEN_ALWAYS)
        assert access & (windows.GENERIC_READ | windows.GENERIC_WRITE), "a handle for nothing"
        if flags & windows.FILE_FLAG_NO_BUFFERING and not self.takes_direct:
            raise WindowsError(87)
        mine = self._mine(path)
        self._check_sharing(mine, access, share)
        mode = {windows.GENERIC_READ: os.O_RDONLY, windows.GENERIC_WRITE: os.O_WRONLY}.get(access, os.O_RDWR)
        mode |= {windows.CREATE_NEW: os.O_CREAT | os.O_EXCL, windows.OPEN_ALWAYS: os.O_CREAT}.get(disposition, 0)
        if flags & windows.FILE_FLAG_NO_BUFFERING:
            mode |= getattr(os, "O_DIRECT", 0)
        if flags & windows.FILE_FLAG_OPEN_REPARSE_POINT and disposition != windows.CREATE_NEW and os.path.islink(mine):
            mode = os.O_PATH | os.O_NOFOLLOW  # the link itself
        descriptor = os.open(mine, mode, 0o600)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            os.close(descriptor)
            raise WindowsError(5)
        with self.lock:
            self._next += 4
            inode = (status.st_dev, status.st_ino)
            self._handles[self._next] = Handle(self._next, descriptor, os.path.realpath(mine), access, share, flags, inode)
            return self._next

    def _CloseHandle(self, number: int) -> int:  # noqa: N802
        os.close(self._take(number).descriptor)
        return 1

    def _GetFileInformationByHandle(self, number: int, found: windows.HandleInformation) -> int:  # noqa: N802
        status = os.fstat(self._of(number).descriptor)
        found.attributes = windows.FILE_ATTRIBUTE_REPARSE_POINT if stat.S_ISLNK(status.st_mode) else windows.FILE_ATTRIBUTE_NORMAL
        found.size_high, found.size_low = divmod(status.st_size, 1 << 32)
        found.links = status.st_nlink
        return 1

    def _SetFileInformationByHandle(self, number: int, what: int, end: windows.EndOfFile, nbytes: int) -> int:  # noqa: N802
        assert what == windows.FILE_END_OF_FILE_INFO
        assert nbytes == ctypes.sizeof(end) == 8
        handle = self._of(number)
        if not handle.access & windows.GENERIC_WRITE:
            raise WindowsError(5)
        os.ftruncate(handle.descriptor, end.nbytes)
        return 1

    def _FlushFileBuffers(self, number: int) -> int:  # noqa: N802
        handle = self._of(number)
        if not handle.access & windows.GENERIC_WRITE:
            raise WindowsError(5)
        os.fsync(handle.descriptor)
        return 1

    def _MoveFileExW(self, source: str, target: str, flags: int) -> int:  # noqa: N802
        self._check_deletion(self._mine(source))
        if os.path.exists(self._mine(target)):
            if not flags & windows.MOVEFILE_REPLACE_EXISTING:
                raise WindowsError(183)
            self._check_deletion(self._mine(target))
        os.replace(self._mine(source), self._mine(target))
        return 1

    def _DeleteFileW(self, path: str) -> int:  # noqa: N802
        self._check_deletion(self._mine(path))
        os.unlink(self._mine(path))
        return 1

    # -- the C runtime -------------------------------------------------------------------------------------------------------

    def open_osfhandle(self, number: int, flags: int) -> int:
        assert flags & windows.O_BINARY, "a C runtime that translates the ends of lines"
        assert flags & windows.O_NOINHERIT
        with self.lock:
            if self.record:
                self.calls.append(("open_osfhandle", number, flags))
            handle = self._handles[number]
            handle.given = True
            self._given[handle.descriptor] = handle
            return handle.descriptor

    def get_osfhandle(self, descriptor: int) -> int:
        with self.lock:
            return self._given[descriptor].number

    # -- the rest ------------------------------------------------------------------------------------------------------------

    def _mine(self, path: str) -> str:
        """The path here. Windows takes no more than MAX_PATH unless it is asked to take the path literally."""
        if path.startswith("\\\\?\\"):
            assert "/" not in path, "a literal path has no slashes"
            path = path[4:]
        elif len(path) > 259:
            raise WindowsError(206)
        return self.drive + path[2:].replace("\\", "/") if path.startswith("C:\\") else path

    def _of(self, number: int) -> Handle:
        with self.lock:
            if number not in self._handles:
                raise WindowsError(6)
            return self._handles[number]

    def _take(self, number: int) -> Handle:
        with self.lock:
            if number not in self._handles:
                raise WindowsError(6)
            return self._handles.pop(number)

    def open_handles(self) -> list[Handle]:
        """Those that are still open. The C runtime does not say when it closes one: the descriptor tells."""
        with self.lock:
            for number, handle in list(self._handles.items()):
                if handle.given and not _is_open(handle, self._given):
                    del self._handles[number]
            return list(self._handles.values())

    def _check_sharing(self, path: str, access: int, share: int) -> None:
        for other in self.open_handles():
            if other.path == os.path.realpath(path):
                wants = _shared(access) & ~other.share or _shared(other.access) & ~share
                if wants:
                    raise WindowsError(32)

    def _check_deletion(self, path: str) -> None:
        for other in self.open_handles():
            if other.path == os.path.realpath(path) and not other.share & windows.FILE_SHARE_DELETE:
                raise WindowsError(32)


def _shared(access: int) -> int:
    read = windows.FILE_SHARE_READ if access & windows.GENERIC_READ else 0
    return read | (windows.FILE_SHARE_WRITE if access & windows.GENERIC_WRITE else 0)


def _is_open(handle: Handle, given: dict[int, Handle]) -> bool:
    if given.get(handle.descriptor) is not handle:
        return False
    try:
        status = os.fstat(handle.descriptor)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == handle.inode


def stand_in(**options: Any) -> tuple[windows.Windows, Kernel32]:
    """Windows' calls, and what is behind them."""
    kernel = Kernel32(**options)
    return windows.Windows(kernel, kernel, kernel.last_error, as_error), kernel
