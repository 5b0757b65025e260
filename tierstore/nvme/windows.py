"""Windows: handles that share, follow no link and bypass the cache; long paths; names it keeps for itself; files others hold.

[Note: Handles on Windows]
Payloads are opened by `CreateFileW`, since `open` can ask neither for unbuffered I/O nor for sharing. Every handle shares reading,
writing and deletion: one is open per request, so a rename or deletion would otherwise fail while a read is under way. None follows a
link (`FILE_FLAG_OPEN_REPARSE_POINT`): what was opened is looked at, and refused if it is one. `CREATE_ALWAYS` does not go with that
flag, so a file that is to be emptied is opened, looked at, and emptied then.

[Note: Errors of late writes on Windows]
There is nothing like Linux's memory of a failed write-back: what the cache could not write later is lost, and neither a handle
opened later nor `FlushFileBuffers` hears of it. So nothing is left to the cache. Unbuffered writes fail where they are made, and
the handles that do go through the cache write through it (`FILE_FLAG_WRITE_THROUGH`). What is left to `FlushFileBuffers` is the
drive's own cache and the file system's journal, and these errors it does report. It needs a handle that may write.

[Note: Room on Windows]
The C runtime extends a file by writing zeros, all of it; `FileEndOfFileInfo` reserves the clusters (so that a full drive is found
then) and writes nothing. What was never written reads as zeros, so a write beyond it has NTFS fill the gap first: a new file that is
written by several requests at once costs up to their length in zeros, once. A file that is used again costs nothing.

[Note: Renames on Windows]
`MoveFileExW` without leave to copy is one transaction of NTFS's journal. A temporary file that takes its final name (a manifest,
`CURRENT`) is moved with write-through: the call returns when the journal is on the drive. Shards that change their names are not,
as the sync of the shard that follows takes its journal along.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import ntpath
import os
import re
import sys
from collections.abc import Awaitable, Callable
from ctypes import wintypes
from typing import Any, Protocol, TypeVar

from tierstore.nvme.names import is_temporary

if sys.platform == "win32":
    import msvcrt

T = TypeVar("T")

HERE = sys.platform == "win32"

# -- paths --------------------------------------------------------------------------------------------------------------

LONGEST = 247
"""Characters of a path that every call takes as it is: a directory's must leave room for a short name within MAX_PATH."""

_LITERAL = "\\\\?\\"
_LITERAL_SHARE = "\\\\?\\UNC\\"
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *(f"{port}{digit}" for port in ("COM", "LPT") for digit in "123456789¹²³")}
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def extended(path: str) -> str:
    """An absolute path in the form that may be long. A short one stays as it is: the form turns off all that makes paths alike."""
    if len(path) <= LONGEST or path.startswith((_LITERAL, "\\\\.\\")):
        return path
    whole = ntpath.normpath(path)
    if whole.startswith("\\\\"):
        return _LITERAL_SHARE + whole[2:]
    return _LITERAL + whole if ntpath.splitdrive(whole)[0] else path


def plain(path: str) -> str:
    """The same path as people write it."""
    if path.startswith(_LITERAL_SHARE):
        return "\\\\" + path[len(_LITERAL_SHARE) :]
    return path.removeprefix(_LITERAL)


def reserved_part(path: str) -> str | None:
    """The first part of a path that Windows takes for a device, alters, or forbids; None if there is none."""
    for part in re.split(r"[\\/]", ntpath.splitdrive(plain(path))[1]):
        if part in ("", ".", ".."):
            continue
        if part[-1] in ". " or _FORBIDDEN.search(part) or part.split(".")[0].rstrip(" ").upper() in _DEVICES:
            return part
    return None


# -- files that somebody else holds -------------------------------------------------------------------------------------

_DENIED, _SHARING, _LOCKED = 5, 32, 33
PAUSES_S = (0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.9)
"""Virus scanners and indexers hold a new file for some milliseconds, now and then for a second."""


def is_held(error: OSError) -> bool:
    """Whether a call may have failed only because somebody else has the file open; never outside Windows."""
    return getattr(error, "winerror", None) in (_DENIED, _SHARING, _LOCKED)


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try again for about 2 s, at growing intervals, as long as the file may only be held by somebody else.

    Raises:
        OSError: What the last attempt raised, or at once what is none of that.
    """
    for pause_s in PAUSES_S:
        try:
            return await attempt()
        except OSError as error:
            if not is_held(error):
                raise
        await asyncio.sleep(pause_s)
    return await attempt()


# -- calls --------------------------------------------------------------------------------------------------------------

GENERIC_READ, GENERIC_WRITE = 0x80000000, 0x40000000
_ACCESS = {os.O_RDONLY: GENERIC_READ, os.O_WRONLY: GENERIC_WRITE, os.O_RDWR: GENERIC_READ | GENERIC_WRITE}
FILE_SHARE_READ, FILE_SHARE_WRITE, FILE_SHARE_DELETE = 1, 2, 4
CREATE_NEW, OPEN_EXISTING, OPEN_ALWAYS = 1, 3, 4
FILE_ATTRIBUTE_NORMAL, FILE_ATTRIBUTE_REPARSE_POINT = 0x80, 0x400
FILE_FLAG_WRITE_THROUGH, FILE_FLAG_NO_BUFFERING, FILE_FLAG_OPEN_REPARSE_POINT = 0x80000000, 0x20000000, 0x00200000
MOVEFILE_REPLACE_EXISTING, MOVEFILE_WRITE_THROUGH = 1, 8
FILE_END_OF_FILE_INFO = 6
O_BINARY, O_NOINHERIT = 0x8000, 0x80
INVALID_HANDLE = ctypes.c_void_p(-1).value


class HandleInformation(ctypes.Structure):
    """BY_HANDLE_FILE_INFORMATION."""

    _fields_ = (
        ("attributes", wintypes.DWORD),
        ("created", wintypes.FILETIME),
        ("accessed", wintypes.FILETIME),
        ("written", wintypes.FILETIME),
        ("volume", wintypes.DWORD),
        ("size_high", wintypes.DWORD),
        ("size_low", wintypes.DWORD),
        ("links", wintypes.DWORD),
        ("index_high", wintypes.DWORD),
        ("index_low", wintypes.DWORD),
    )


class EndOfFile(ctypes.Structure):
    """FILE_END_OF_FILE_INFO."""

    _fields_ = (("nbytes", wintypes.LARGE_INTEGER),)


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "CreateFileW": (
        wintypes.HANDLE,
        *(wintypes.LPCWSTR, wintypes.DWORD, wintypes.DWORD, wintypes.LPVOID, wintypes.DWORD, wintypes.DWORD, wintypes.HANDLE),
    ),
    "CloseHandle": (wintypes.BOOL, wintypes.HANDLE),
    "GetFileInformationByHandle": (wintypes.BOOL, wintypes.HANDLE, ctypes.POINTER(HandleInformation)),
    "SetFileInformationByHandle": (wintypes.BOOL, wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD),
    "FlushFileBuffers": (wintypes.BOOL, wintypes.HANDLE),
    "MoveFileExW": (wintypes.BOOL, wintypes.LPCWSTR, wintypes.LPCWSTR, wintypes.DWORD),
    "DeleteFileW": (wintypes.BOOL, wintypes.LPCWSTR),
}
"""What each call returns, and what it takes."""

_ERRNO = {39: errno.ENOSPC, 112: errno.ENOSPC, 223: errno.EFBIG, 1295: getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Python takes some of these for invalid arguments: handle disk full, disk full, file too large, quota exceeded."""


class Runtime(Protocol):
    """What is needed of `msvcrt`."""

    def open_osfhandle(self, handle: int, flags: int, /) -> int: ...
    def get_osfhandle(self, fd: int, /) -> int: ...


class Windows:
    """The calls of Windows; see the Notes above.

    Args:
        kernel32: The library, of which the signatures are declared here.
        runtime: `msvcrt`.
        last_error: Why the last call on this thread failed.
        as_error: The `OSError` of such a number.
    """

    syncs_directories = False
    streams_directly = True

    def __init__(self, kernel32: Any, runtime: Runtime, last_error: Callable[[], int], as_error: Callable[[int], OSError]) -> None:
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(kernel32, name)
            function.restype, function.argtypes = result, arguments
        self._kernel32 = kernel32
        self._runtime = runtime
        self._last_error = last_error
        self._as_error = as_error

    def given(self, path: str) -> str:
        return extended(path)

    def open(self, path: str, flags: int, *, direct: bool = False) -> int:
        access = _ACCESS[flags & (os.O_WRONLY | os.O_RDWR)]
        attributes = FILE_ATTRIBUTE_NORMAL | FILE_FLAG_OPEN_REPARSE_POINT
        if direct:
            attributes |= FILE_FLAG_NO_BUFFERING
        elif access & GENERIC_WRITE:
            attributes |= FILE_FLAG_WRITE_THROUGH
        handle = self._kernel32.CreateFileW(
            extended(path),
            access,
            FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
            None,
            (CREATE_NEW if flags & os.O_EXCL else OPEN_ALWAYS) if flags & os.O_CREAT else OPEN_EXISTING,
            attributes,
            None,
        )
        if handle is None or handle == INVALID_HANDLE:
            raise self._error(path)
        try:
            self._check_no_link(handle, path)
            if flags & os.O_TRUNC:
                self._set_length(handle, 0, path)
            return self._runtime.open_osfhandle(handle, O_BINARY | O_NOINHERIT | flags & (os.O_WRONLY | os.O_RDWR))
        except BaseException:
            self._kernel32.CloseHandle(handle)
            raise

    def make_room(self, descriptor: int, nbytes: int) -> None:
        self._set_length(self._runtime.get_osfhandle(descriptor), nbytes)

    def sync(self, descriptor: int) -> None:
        # `os.fsync` would call the same, and report every failure as a bad descriptor.
        self._check(self._kernel32.FlushFileBuffers(self._runtime.get_osfhandle(descriptor)))

    def sync_directory(self, path: str) -> None:
        """Cannot be done."""

    def replace(self, source: str, target: str) -> None:
        flags = MOVEFILE_REPLACE_EXISTING | (MOVEFILE_WRITE_THROUGH if is_temporary(ntpath.basename(source)) else 0)
        self._check(self._kernel32.MoveFileExW(extended(source), extended(target), flags), source)

    def unlink(self, path: str) -> None:
        self._check(self._kernel32.DeleteFileW(extended(path)), path)

    def _check_no_link(self, handle: int, path: str) -> None:
        found = HandleInformation()
        self._check(self._kernel32.GetFileInformationByHandle(handle, ctypes.byref(found)), path)
        if found.attributes & FILE_ATTRIBUTE_REPARSE_POINT:
            raise OSError(errno.ELOOP, "it is a link, or a file that deduplication or a cloud service keeps elsewhere", path)

    def _set_length(self, handle: int, nbytes: int, path: str | None = None) -> None:
        end = EndOfFile(nbytes)
        done = self._kernel32.SetFileInformationByHandle(handle, FILE_END_OF_FILE_INFO, ctypes.byref(end), ctypes.sizeof(end))
        self._check(done, path)

    def _check(self, done: int, path: str | None = None) -> None:
        if not done:
            raise self._error(path)

    def _error(self, path: str | None) -> OSError:
        code = self._last_error()
        error = self._as_error(code)
        error.errno = _ERRNO.get(code, error.errno)
        error.filename = path
        return error


def system() -> Windows:
    """The calls of this machine, which runs Windows."""
    if sys.platform == "win32":
        return Windows(ctypes.WinDLL("kernel32", use_last_error=True), msvcrt, ctypes.get_last_error, ctypes.WinError)
    raise NotImplementedError("this machine does not run Windows")
