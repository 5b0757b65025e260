"""Forked children: who talk through a pipe, and who are killed."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch

PATIENCE_S = 60.0
"""A child that says nothing for so long hangs."""

Say = Callable[..., None]


class Child:
    """A forked process.

    Args:
        work: What it does; it gets a function that sends words to the parent.

    Attributes:
        heard: Lines so far, as words.
        exit: How it ended: a status, or a signal as a negative number. None while it lives.
    """

    def __init__(self, work: Callable[[Say], None]) -> None:
        self.heard: list[list[str]] = []
        self.exit: int | None = None
        self._rest = b""
        self._hear, said = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: they are idle
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self._hear)
            _live(work, said)
        os.close(said)

    def wait_for(self, word: str, count: int = 1) -> float | None:
        """Listen until `count` lines more begin with `word`. Returns when that was heard; None if the child ended before."""
        while True:
            while b"\n" not in self._rest:
                ready, _, _ = select.select([self._hear], [], [], PATIENCE_S)
                assert ready, f"the child hangs after {self.heard[-3:]}"
                piece = os.read(self._hear, 1 << 16)
                if not piece:
                    return None
                self._rest += piece
            line, self._rest = self._rest.split(b"\n", 1)
            self.heard.append(line.decode().split())
            if self.heard[-1][0] == word:
                count -= 1
                if not count:
                    return time.monotonic()

    def kill(self) -> None:
        """SIGKILL, then hear what it had said."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Hear everything, and let it end. Repeatable."""
        if self.exit is None:
            while self.wait_for("") is not None:
                pass
            os.close(self._hear)
            self.exit = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit


def _live(work: Callable[[Say], None], said: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest-timeout's would run the parent's report
        signal.alarm(int(PATIENCE_S) * 2)
        torch.set_num_threads(1)  # the pool of threads does not survive a fork

        def say(*words: object) -> None:
            os.write(said, (" ".join(map(str, words)) + "\n").encode())

        work(say)
        code = 0
    except BaseException:
        os.write(2, f"in the child:\n{traceback.format_exc()}".encode())
    finally:
        os._exit(code)
