"""How long callers compute from one access to the next, told from when they ask and how long they wait. Pure.

[Note: Computing that is hidden]
Where the device is the CPU, callers compute between two calls, and what they wait in between is known. A device that orders
work by itself lets the host run ahead, until it waits for the links: computing shows only in that time passes which neither the
links nor the drive account for. That is too little where copies and computing overlap, so the largest share seen
counts, but never more than all the time that passed.
"""

from __future__ import annotations

REMEMBERED = 512
"""Accesses over which gaps between calls are averaged."""

PAUSE = 10
"""A gap longer than so many times the average is a pause (an evaluation, a checkpoint), and counts no more than that."""

WINDOW = 64
"""Accesses over which passing time is compared with the time that transfers took."""


class Pace:
    """Learns from every lease. Times are nanoseconds of the store's clock.

    Attributes:
        seconds: Of computing from one access to the next, as far as is known.
        runs_ahead: The device orders work by itself.
        busy_s: Seconds of link time of all copies to and from the device so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.runs_ahead = False
        self.busy_s = 0.0
        self._gap_s = 0.0
        self._hidden_s = 0.0
        self._num_accesses = 0
        self._granted_ns = 0
        self._waited_ns = 0
        self._window = (0, 0, 0.0, 0)  # accesses, time, busy_s and waited time at its start

    def asked(self, now_ns: int, num_accesses: int) -> None:
        """A lease of so many blocks is asked for."""
        if self._num_accesses:
            gap_s = (now_ns - self._granted_ns) / 1e9 / num_accesses
            if self._num_accesses > WINDOW:
                gap_s = min(gap_s, max(PAUSE * self._gap_s, 1e-6))
            weight = num_accesses / min(self._num_accesses, REMEMBERED)
            self._gap_s += (gap_s - self._gap_s) * min(1.0, weight)
            self.seconds = self._gap_s
        self._num_accesses += num_accesses
        self._granted_ns = now_ns
        if self.runs_ahead:
            if self._num_accesses - self._window[0] >= WINDOW:
                self._look_back(now_ns)
            self.seconds = max(self._gap_s, self._hidden_s)

    def granted(self, now_ns: int, waited_ns: int, cause: str) -> None:
        """A lease is given to somebody who waited, for a cause as in `trace.WaitEvent`."""
        self._granted_ns = now_ns
        if cause == "nvme":
            self._waited_ns += waited_ns

    def _look_back(self, now_ns: int) -> None:
        """See [Note: Computing that is hidden]."""
        accesses, start_ns, busy_s, waited_ns = self._window
        num_accesses = self._num_accesses - accesses
        passed_s = (now_ns - start_ns - (self._waited_ns - waited_ns)) / 1e9
        exposed_s = passed_s - (self.busy_s - busy_s)
        if accesses:
            self._hidden_s = min(max(self._hidden_s, exposed_s / num_accesses), max(0.0, passed_s) / num_accesses)
        self._window = (self._num_accesses, now_ns, self.busy_s, self._waited_ns)
