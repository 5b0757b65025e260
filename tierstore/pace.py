"""How long callers compute, access by access, told from marks on the time line of the device; and how fast links are. Pure.

[Note: Marks]
A lease makes three marks: when it is asked for, when its blocks are there, and when it ends. On a device that orders work by itself they
are events on the caller's stream, and the host may be far ahead of them: from the second to the third, the device computes under the
lease; from the second to the first of the next lease, it computes, or waits for the host, but never for copies of ours. So computing is
known apart from what links and the drive take, whether or not it hides them. On the CPU they are readings of the clock.

[Note: What is remembered]
Plans need more than an average: backward passes compute for long between two accesses, the updates behind them next to nothing. So each
access is remembered by its position in the trace. A pause (an evaluation, a checkpoint) is in one period and not in another: who asks
takes the shorter of two.

[Note: Only when it is wanted]
A mark on a stream gives up the interpreter's lock, which a busy host gets back late: with marks on every lease, a step of 250 leases was
found to take 50 ms more. So a policy says when it wants to know.

[Note: Rates]
What a plan is worth depends on how fast links are: at 13 GB/s, a step is best that moves few bytes, though nothing can be under way
beside what is kept; at 50 GB/s the same step had its links at rest for a third of the time. Links differ by as much from one computer
to the next. So they are measured together with computing. Of copies that the device times, between two events, the median by bytes
counts: the host may be late to queue a copy behind its first event. Of others, the time in which anything was under way on the link: how
much is under way at once belongs to it. What crosses in the other direction meanwhile belongs to both.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from tierstore.trace import Link

REMEMBERED = 1 << 16
"""Positions of the trace of which computing is remembered: as many as a forecast remembers accesses."""

AVERAGED = 512
"""Accesses over which the average runs."""

PAUSE = 10
"""A time longer than so many times the average is a pause, and counts no more than that in it."""

UNSETTLED = 4096
"""Leases of which the marks are kept until the device has come to them."""

SETTLED_AT_ONCE = 32
"""Leases asked for from one look at those marks to the next."""


ENOUGH, SAMPLES = 8, 256
"""Copies from which on a rate counts as measured, and how many timed ones are looked at."""

SHORTEST = 1e-15
"""Seconds that a byte takes at least: a clock may stand still."""


@dataclass(slots=True)
class Span:
    """The marks of one lease; None: not made yet, or never.

    Attributes:
        position, count: Of its first access in the trace, and how many there are.
    """

    position: int
    count: int
    asked: Any
    granted: Any = None
    released: Any = None


def between_ns(first: Any, second: Any) -> float | None:
    """Seconds between two readings of a clock in nanoseconds."""
    return float(second - first) / 1e9


class Pace:
    """Learns from every lease. Every call but the setting of a span's marks comes from under the store's lock.

    Attributes:
        measuring: Leases are to make marks. See [Note: Only when it is wanted].
        seconds: Of computing from one access to the next, on average of what was measured of late.
        between: Seconds from one mark to another; None: the device has not come there yet, or will never tell.
    """

    def __init__(self) -> None:
        self.measuring = False
        self.seconds = 0.0
        self.between: Callable[[Any, Any], float | None] = between_ns
        self._spans: deque[Span] = deque()
        self._num_accesses = 0
        self._since_settled = 0
        self._at = array("q", [-1]) * REMEMBERED
        self._leased_s = array("d", [0.0]) * REMEMBERED
        self._after_s = array("d", [0.0]) * REMEMBERED

    def asked(self, position: int, count: int, mark: Any) -> Span:
        """A lease of so many blocks, at least one, is asked for."""
        span = Span(position, count, mark)
        self._spans.append(span)
        self._since_settled += 1
        if self._since_settled >= SETTLED_AT_ONCE or len(self._spans) == 2:
            self._since_settled = 0
            self._settle()
        return span

    def end(self) -> None:
        """The store is closed: a policy that somebody keeps is to keep neither its marks alive nor who compares them."""
        self.measuring = False
        self.between = between_ns
        self._spans.clear()

    def computed(self, position: int) -> tuple[float, float] | None:
        """Seconds of computing at a past access: under its lease, and from then on to the next. None: not known."""
        slot = position % REMEMBERED
        return (self._leased_s[slot], self._after_s[slot]) if position >= 0 and self._at[slot] == position else None

    def _settle(self) -> None:
        spans = self._spans
        while len(spans) > 1:
            span = spans[0]
            if span.granted is not None and spans[1].position == span.position + span.count:
                total_s = self.between(span.granted, spans[1].asked)
                leased_s = total_s if span.released is None or total_s is None else self.between(span.granted, span.released)
                if total_s is None or leased_s is None:
                    if len(spans) <= UNSETTLED:
                        return
                else:
                    self._learn(span, max(0.0, total_s), max(0.0, leased_s))
            spans.popleft()

    def _learn(self, span: Span, total_s: float, leased_s: float) -> None:
        for position in range(span.position, span.position + span.count):
            slot = position % REMEMBERED
            self._at[slot] = position
            self._leased_s[slot] = self._after_s[slot] = 0.0
        self._leased_s[slot] = min(leased_s, total_s)  # of several blocks, the last one's
        self._after_s[slot] = max(0.0, total_s - leased_s)
        self._num_accesses += span.count
        each_s = total_s / span.count
        if self._num_accesses > AVERAGED // 8:
            each_s = min(each_s, max(PAUSE * self.seconds, 1e-6))
        self.seconds += (each_s - self.seconds) * min(1.0, span.count / min(self._num_accesses, AVERAGED))


@dataclass(slots=True)
class _Busy:
    """A link's work since it began to be measured.

    Attributes:
        samples: Of copies timed by themselves: (seconds per byte, bytes), ascending.
        under_way: Transfers that are timed by the clock, and have not ended.
        since_ns: Up to when the time of those has been counted.
    """

    transfers: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    samples: list[tuple[float, int]] = field(default_factory=list)
    under_way: int = 0
    since_ns: int = 0

    def begin(self) -> None:
        """Anew. Who is just adding a transfer on another thread spoils no more than one sample: what is under way stays."""
        self.transfers, self.nbytes, self.seconds, self.samples = 0, 0, 0.0, []


class Rates:
    """Learns how long a byte takes on each link. See [Note: Rates].

    `measure` comes from under the store's lock; what else concerns one link, from one thread at a time, without it.

    Args:
        assumed: Seconds per byte, for as long as nothing was measured.
    """

    def __init__(self, assumed: Mapping[Link, float]) -> None:
        self._seconds_per_byte = dict(assumed)
        self._busy = {link: _Busy() for link in Link}
        self._measuring = False

    def seconds_per_byte(self, link: Link) -> float:
        return self._seconds_per_byte[link]

    def measure(self, wanted: bool) -> None:
        """Measure anew from now on, or leave it at what was found. To say so again changes nothing."""
        if wanted and not self._measuring:
            for busy in self._busy.values():
                busy.begin()
        self._measuring = wanted

    def took(self, link: Link, nbytes: int, seconds: float) -> None:
        """One copy, timed by itself."""
        samples = self._busy[link].samples
        if self._measuring and nbytes and len(samples) < SAMPLES:
            insort(samples, (seconds / nbytes, nbytes))
            if len(samples) >= ENOUGH:
                self._seconds_per_byte[link] = max(_median(samples), SHORTEST)

    def started(self, link: Link, now_ns: int) -> None:
        busy = self._busy[link]
        if not busy.under_way:
            busy.since_ns = now_ns
        busy.under_way += 1

    def ended(self, link: Link, nbytes: int, now_ns: int) -> None:
        """Of a transfer that has `started`; 0 bytes: it has failed."""
        busy = self._busy[link]
        busy.under_way -= 1
        if nbytes:
            busy.transfers += 1
            busy.nbytes += nbytes
            busy.seconds += max(0, now_ns - busy.since_ns) / 1e9
        busy.since_ns = max(busy.since_ns, now_ns)
        transfers, total, seconds = busy.transfers, busy.nbytes, busy.seconds
        if self._measuring and transfers >= ENOUGH and total:
            self._seconds_per_byte[link] = max(seconds / total, SHORTEST)


def _median(samples: list[tuple[float, int]]) -> float:
    """Of ascending (seconds per byte, bytes): that of the copy which half of all bytes took no longer than."""
    counted = list(accumulate(nbytes for _, nbytes in samples))
    return samples[bisect_left(counted, counted[-1] / 2)][0]
