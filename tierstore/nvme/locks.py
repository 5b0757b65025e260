"""Who has a directory: its lock, and what a holder says about itself.

[Note: Two locks]
The lock file works everywhere, but somebody may delete it, and then the next store makes another one and locks that. Where the
system can lock a directory itself, which is there as long as its files are, that is locked as well. Both locks belong to what is
locked, not to its path, so links and mounts make no difference. The system drops them when the process ends, however it ends.

[Note: Locks and forks]
A forked child inherits the descriptors, and a lock lasts as long as any of them is open: a child that outlives its parent would
keep everybody out. So it closes them at once (filelock does the same with its own). It must not unlock: that would be the parent's
lock, too.

[Note: Who holds it]
The holder writes its process id down, with what tells the process from later ones of that id and from those of other machines and
containers. A killed process leaves that behind, so it is believed only if that very process is alive.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

import filelock
import psutil

from tierstore.nvme.files import Lock

if sys.platform != "win32":
    import fcntl

LOCK_MODE = 0o600
MAX_HOLDER_BYTES = 512
SAME_START_S = 1.5
"""The system's clock may be set while a process runs, and with it the time at which the process began, as some systems tell it."""


def take_lock(path: str) -> Lock | None:
    """Take the lock file, and lock its directory where that can be done, at once. None when another store holds either.

    Raises:
        OSError: The lock file cannot be made or opened.
    """
    held = filelock.FileLock(path, timeout=0, mode=LOCK_MODE, thread_local=False)
    try:
        held.acquire()
    except filelock.Timeout:
        return None
    try:
        directory = _lock_directory(os.path.dirname(path))
    except BlockingIOError:
        held.release()
        return None
    except BaseException:
        held.release()
        raise
    return _HeldLock(held, directory)


class _HeldLock:
    """See [Note: Two locks] and [Note: Locks and forks]."""

    def __init__(self, held: filelock.BaseFileLock, directory: _Descriptor | None) -> None:
        self._held: filelock.BaseFileLock | None = held
        self._directory = directory

    def release(self) -> None:
        directory, self._directory = self._directory, None
        if directory is not None:
            directory.close()
        if self._held is not None:
            self._held.release()
            self._held = None

    def forget(self) -> None:
        self._held = None
        if self._directory is not None:
            self._directory.close()

    def __del__(self) -> None:
        if self._directory is not None:  # dropped without `release`; filelock does the same
            self._directory.close()


class _Descriptor:
    """An open directory, closed in every forked child."""

    def __init__(self, number: int) -> None:
        self.number = number
        _OPEN.add(self)

    def close(self) -> None:
        """Repeatable."""
        number, self.number = self.number, -1
        _OPEN.discard(self)
        if number >= 0:
            with contextlib.suppress(OSError):
                os.close(number)


_OPEN: set[_Descriptor] = set()
_FORKING = threading.Lock()  # held while one is opened and noted, and while a process forks


if sys.platform == "win32":

    def _lock_directory(path: str) -> _Descriptor | None:
        """There are no such locks."""
        return None

else:

    def _lock_directory(path: str) -> _Descriptor | None:
        """None where the file system has no such locks.

        Raises:
            BlockingIOError: Another store has locked it.
        """
        with _FORKING:
            try:
                descriptor = _Descriptor(os.open(path, os.O_RDONLY | os.O_DIRECTORY))
            except OSError:
                return None  # it may be searched, but not listed: whoever needs that will say so
        try:
            fcntl.flock(descriptor.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            descriptor.close()
            raise
        except OSError:  # some network file systems
            descriptor.close()
            return None
        return descriptor

    def _after_fork_in_child() -> None:
        for descriptor in list(_OPEN):
            descriptor.close()
        _FORKING.release()

    os.register_at_fork(before=_FORKING.acquire, after_in_parent=_FORKING.release, after_in_child=_after_fork_in_child)


def describe_holder() -> bytes:
    """What this process says about itself; see [Note: Who holds it]. The first line is its id."""
    return f"{os.getpid()}\n{_neighbourhood()} {psutil.Process().create_time():.2f}\n".encode("ascii")


def living_holder(said: bytes) -> int | None:
    """The id of the process that said this, if it is alive and one of this machine's; None for rubbish, too."""
    try:
        number, neighbourhood, start = said.decode("ascii").split()
        pid = int(number)
        if neighbourhood != _neighbourhood() or pid <= 0:
            return None
        process = psutil.Process(pid)
        same = abs(process.create_time() - float(start)) <= SAME_START_S
        return pid if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (ValueError, OverflowError, psutil.Error):
        return None


def _neighbourhood() -> str:
    """Among which processes an id means one of them: a machine, and on Linux a container."""
    try:
        container = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        container = "-"
    return f"{socket.gethostname().encode('ascii', 'replace').decode('ascii').replace(' ', '_') or '-'}/{container}"
