"""Measures the steps of a loop over a store, and says which of them deserve a line in the log.

[Note: What measuring costs]
`stats()` looks at every block under the store's lock: 0.3 ms for a thousand of them. So each step only copies the counters of
waits, and what explains a wait (links, page-locking, direct I/O) is looked up for a step that is diagnosed. What links did then
comes from the timeline: transfers overlap, so the sum of their durations says nothing about how long a link was busy.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tierstore.clock import Clock
from tierstore.store import StoreBase
from tierstore.trace import Timeline, TransferEvent
from tierstore.training.advice import Cause, Diagnosis, Expected, LinkUse, StepFacts, Usual, diagnose, split
from tierstore.units import format_duration

__all__ = ["Adviser", "Step", "StepMeter", "links_between"]

log = logging.getLogger("tierstore")

WINDOW = 50
"""Steps whose median is what is usual."""
FIRST_LOOK = 3
"""The step that is diagnosed however fast it is. Those before it still allocate, and learn the period."""
LEAST_KNOWN = 3
"""Steps needed to call another one slow."""
SLOW = 1.5
"""A step that takes so many times the median is slow."""
LEAST_EXCESS_S = 5e-3
"""What is less than this beyond the median is noise, however short the steps."""
QUIET_STEPS, MOST_QUIET_STEPS = 20, 320
"""Steps for which a cause that was told is not told again; each repetition doubles them, up to the second number."""


@dataclass(slots=True)
class Step:
    """One step that has ended. Times are nanoseconds of the store's clock.

    Attributes:
        number: From 1.
        loader_ns: Spent in the data loader.
        waits: Nanoseconds of the store's waits, by cause.
        commits: Generations made in it.
        items: Tokens or samples; None where nobody knows.
        disturbed: Something else was watched in it, whose waits it has too.
    """

    number: int
    start_ns: int
    end_ns: int
    loader_ns: int
    waits: dict[str, int]
    commits: int
    items: float | None = None
    disturbed: bool = False

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def facts(self) -> StepFacts:
        """What is known without a look at the store."""
        waits = {cause: ns / 1e9 for cause, ns in self.waits.items()}
        return StepFacts(self.seconds, self.loader_ns / 1e9, waits, commits=self.commits)


class StepMeter:
    """Cuts a loop into steps, and keeps the recent ones. For one thread, the one that trains.

    Args:
        store: Whose waits are counted. Waits of all its users count, whichever thread they are on.
        clock: The store's.

    Attributes:
        recent: Steps that have ended, the newest last, without the first and without disturbed ones.
        num_steps: All that have ended.
    """

    def __init__(self, store: StoreBase, clock: Clock) -> None:
        self.recent: deque[Step] = deque(maxlen=WINDOW)
        self.num_steps = 0
        self.disturbed = False
        self._store = store
        self._clock = clock
        self._start_ns = 0
        self._loader_ns = 0
        self._waits: dict[str, int] = {}
        self._commits = 0

    def begin(self) -> None:
        """A step begins now."""
        engine = self._store.engine
        self._waits = {cause: waits.ns for cause, waits in list(engine.waits.items())}
        self._commits = engine.commits
        self._loader_ns = 0
        self.disturbed = False
        self._start_ns = self._clock.now_ns()

    def loaded(self, duration_ns: int) -> None:
        """The data loader took so long for a batch of this step."""
        self._loader_ns += duration_ns

    def end(self, items: float | None) -> Step:
        """The step ends now; another one begins only with `begin`."""
        end_ns = self._clock.now_ns()
        engine, before = self._store.engine, self._waits
        waits = {cause: spent for cause, now in list(engine.waits.items()) if (spent := now.ns - before.get(cause, 0))}
        self.num_steps += 1
        commits = engine.commits - self._commits
        return Step(self.num_steps, self._start_ns, end_ns, self._loader_ns, waits, commits, items, self.disturbed)

    def remember(self, step: Step) -> None:
        """Have a step count as usual from now on."""
        if step.number > 1 and not step.disturbed:
            self.recent.append(step)

    @property
    def median_s(self) -> float:
        """Of the recent steps, in seconds; 0 before there are any."""
        return _median([step.seconds for step in self.recent])

    def usual(self) -> Usual:
        """The median of the recent steps, in all that they are diagnosed by."""
        spent = [split(step.facts()) for step in self.recent]
        names = dict.fromkeys(name for parts in spent for name in parts)
        medians = {name: _median([parts.get(name, 0.0) for parts in spent]) for name in names}
        return Usual(self.median_s, medians, _median([step.commits for step in self.recent]))

    def explain(self, step: Step, usual: Usual | None) -> StepFacts:
        """What a step did, with all that the store knows about it."""
        store = self._store
        stats = store.stats()
        known = step.facts()
        return StepFacts(
            seconds=known.seconds,
            loader_s=known.loader_s,
            waits=known.waits,
            links=links_between(store.timeline, step.start_ns, step.end_ns),
            commits=step.commits,
            device_ordered=store.device.type != "cpu",
            direct_io=stats.direct_io,
            page_locked_bytes=stats.page_locked_bytes,
            ram_bytes=stats.tiers["ram"].capacity_bytes,
            usual=usual,
        )


@dataclass
class Adviser:
    """Decides which steps are diagnosed, and which diagnoses are told: all that name a new cause, and repetitions now and then."""

    expected: Expected = field(default_factory=Expected)
    first: int = 0  # steps before the meter's first one, in what is told
    _told: dict[Cause, tuple[int, int]] = field(default_factory=dict)  # the step at which, and for how many it is quiet

    def look(self, meter: StepMeter, step: Step) -> Diagnosis | None:
        """Diagnose a step that has just ended, if it is the third or a slow one. Logs, and returns, what is worth telling."""
        if step.disturbed:
            return None
        usual_s = meter.median_s if len(meter.recent) >= LEAST_KNOWN else 0.0
        slow = usual_s > 0 and step.seconds > max(SLOW * usual_s, usual_s + LEAST_EXCESS_S)
        if step.number != FIRST_LOOK and not slow:
            return None
        diagnosis = diagnose(meter.explain(step, meter.usual() if slow else None), self.expected)
        if not self._worth_telling(diagnosis.cause, step.number):
            return None
        beside = f", {step.seconds / usual_s:.1f} times the median" if slow else ""
        log.log(diagnosis.level, "step %d took %s%s: %s", self.first + step.number, format_duration(step.seconds), beside, diagnosis)
        return diagnosis

    def _worth_telling(self, cause: Cause, number: int) -> bool:
        if cause not in self._told:
            self._told[cause] = (number, QUIET_STEPS)
            return True
        told_at, quiet = self._told[cause]
        if number - told_at < quiet:
            return False
        self._told[cause] = (number, min(2 * quiet, MOST_QUIET_STEPS))
        return True


def links_between(timeline: Timeline, start_ns: int, end_ns: int) -> dict[str, LinkUse]:
    """What each link did in a stretch of time, by the transfers that have ended; of one that began earlier, its share."""
    events = _copy(timeline)
    found: dict[str, list[TransferEvent]] = {}
    for event in reversed(events):  # by time of completion
        if event.end_ns <= start_ns:
            break
        if event.start_ns < end_ns:
            found.setdefault(str(event.link), []).append(event)
    return {link: _use(transfers, start_ns, end_ns) for link, transfers in found.items()}


def _copy(timeline: Timeline) -> list[TransferEvent]:
    while True:
        try:
            return list(timeline.transfers)
        except RuntimeError:  # another thread appended while we copied
            continue


def _use(transfers: list[TransferEvent], start_ns: int, end_ns: int) -> LinkUse:
    nbytes, busy_ns, covered_ns, best_per_ns = 0.0, 0, start_ns, 0.0
    for event in sorted(transfers, key=lambda event: event.start_ns):
        first_ns, last_ns = max(event.start_ns, start_ns), min(event.end_ns, end_ns)
        duration_ns = event.end_ns - event.start_ns
        if duration_ns:
            best_per_ns = max(best_per_ns, event.nbytes / duration_ns)
        nbytes += event.nbytes * ((last_ns - first_ns) / duration_ns if duration_ns else 1.0)
        busy_ns += max(0, last_ns - max(first_ns, covered_ns))
        covered_ns = max(covered_ns, last_ns)
    return LinkUse(nbytes, len(transfers), busy_ns / 1e9, best_per_ns * 1e9)


def _median(values: Iterable[float]) -> float:
    """The upper of the two in the middle: of a step that happens in every second, the one that does more."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
