"""Which rule to evict by: tries each on a model of the expected period, and takes the one that moves least among the fastest.

[Note: Fewest bytes among the fastest]
Belady's rule moves least, and hides no latency on a cycle; rules that leave extents to rotate through hide it, and move more. So
there is no rule that is best in both. The model runs each over a few periods: computing at each access for as long as was learnt, links at
the rates planned with, evictions as the placement carries them out. `TOLERANCE` over the least time is given for fewer bytes.

[Note: Less computing]
What was computed between two accesses is an estimate, too high where the host was behind. A rule that hides latency behind it may hide
nothing then. So of the fastest rules, those that are slow at a small share of it (`LIGHT`) are left out.

[Note: Staying with a plan]
The time between accesses is known badly where links or the drive hide it, and plans are made anew when it seems to change. To go over to
another one moves about as much as a period does. So a period is planned for from the same position on, whenever that is done, and the
present plan is stayed with unless another is faster or saves `CHANGED` of the bytes.

[Note: What is used up, and what is overwritten]
A block that a lease has used up takes no room until it is written whole again, and leaves nothing to write back. One that is only going
to be overwritten need not be loaded again; but its content is somebody's until then, and leaves by being written back. Keeping it saves
that much, and no more: where RAM is fullest, state that would cross the drive both ways is worth twice as much a byte (`by_worth`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import TypeVar

from tierstore.catalog import BlockId
from tierstore.policies.ranking import Belady, Fixed, Future, Ranking
from tierstore.residency import Tier

TOLERANCE = 0.02
LAGS = (0, 1, 2, 4)
SLOTS = (2, 3, 4, 6, 8, 12)
OUTLINED = 3
BESIDE = (0, 1, 2, 4)
"""Where blocks are of different sizes: for how many of the median size room is left beside that for the largest."""

REFINED = 12
"""Longest period for which a plan is refined use by use."""

CHANGED = 0.02
"""Of the bytes, what another plan must save: to change over moves about as much, once, as a period does."""

LIGHT, LIGHT_TOLERANCE = 1 / 8, 0.15
"""Of the computing that was learnt, a small share, and how much longer than the least a period may take then. See
[Note: Less computing]."""

WARM_UP, MEASURED = 2, 4
"""Periods run by the model before it measures, and measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What the model knows of one tier.

    Attributes:
        capacity_bytes: Of the tier, without what is held there.
        nbytes: By block.
        load_s, save_s: Seconds to fetch a block, and to write it back.
        leased_s, after_s: By access of the cycle, seconds of computing under its lease, and from then on to the next.
        away_s: By block, seconds for which a use takes it from this tier to the device and back. Its extent waits for it.
    """

    capacity_bytes: int
    nbytes: Mapping[BlockId, int]
    load_s: Mapping[BlockId, float]
    save_s: Mapping[BlockId, float]
    leased_s: Sequence[float]
    after_s: Sequence[float]
    away_s: Mapping[BlockId, float] = field(default_factory=dict)

    def hurried(self) -> Costs:
        """With less computing than was seen. See [Note: Less computing]."""
        return replace(self, leased_s=[LIGHT * each for each in self.leased_s], after_s=[LIGHT * each for each in self.after_s])


class Cycle:
    """A period that repeats for ever, from position 0 on. A `Future`.

    Args:
        accesses: The blocks.
        writes: By access, whether it may write.
        whole: By access, whether it writes all of the block. Empty: none does.
        spent: By access, whether the block has no content afterwards. Empty: it always has.

    Attributes:
        unread: By access, whether nobody will load what the block holds afterwards, as its next use writes all of it.
    """

    def __init__(self, accesses: Sequence[BlockId], writes: Sequence[int], whole: Sequence[int] = b"", spent: Sequence[int] = b"") -> None:
        self.accesses = accesses
        self.writes = writes
        self.whole = whole or bytes(len(accesses))
        self.spent = spent or bytes(len(accesses))
        self.uses: dict[BlockId, list[int]] = {}
        for position, block in enumerate(accesses):
            self.uses.setdefault(block, []).append(position)
        self.written = {block for block, write in zip(accesses, writes, strict=True) if write}
        self.unread = bytearray(len(accesses))
        for uses in self.uses.values() if any(self.whole) else ():
            for use, following in zip(uses, [*uses[1:], uses[0]], strict=True):
                self.unread[use] = self.whole[following]

    def at(self, position: int) -> BlockId:
        return self.accesses[position % len(self.accesses)]

    def next_use(self, block: BlockId, position: int) -> float:
        uses = self.uses[block]
        lap, place = divmod(position, len(self.accesses))
        index = bisect_left(uses, place)
        if index == len(uses):
            lap, index = lap + 1, 0
        return lap * len(self.accesses) + uses[index]


Weigh = Callable[[BlockId], float]
Values = TypeVar("Values", bytes, list[BlockId])
Rule = Callable[[Future, int, list[BlockId], Weigh], Ranking]
"""Makes a ranking for (future, cursor, blocks on the tier, weights)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one rule on the model, per period: seconds, and link seconds' worth of bytes moved. `kept` as in `Choice`."""

    seconds: float
    moved: float
    rule: Rule
    kept: bytes | None

    @property
    def score(self) -> float:
        """Time, and a little for bytes."""
        return self.seconds + TOLERANCE * self.moved


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one tier.

    Attributes:
        rule: To rank by.
        kept: Per position of the trace, modulo the period, whether the block used there stays on the tier; None where that differs
            from period to period.
        seconds: Of a period, as the model has it.
    """

    rule: Rule
    kept: bytes | None
    seconds: float


def choose(
    cycle: Cycle,
    costs: Costs,
    phase: int,
    *,
    fixed: bool = False,
    above: bytes = b"",
    held: bytes = b"",
    present: bytes | None = None,
    least_s: float = 0.0,
) -> Iterator[Choice | None]:
    """Find the rule to evict by. Yields None after each small piece of work, and the choice at last.

    Args:
        cycle: The period.
        costs: Of the tier.
        phase: Position of the trace, modulo the period, at which the cycle's position 0 lies.
        fixed: Only what is the same in every period.
        above: `Choice.kept` of the tier above: what stays there needs no extent here. Empty where there is none.
        held: By access of the cycle, whether its block is held here. Empty: none is.
        present: `Choice.kept` of the plan gone by until now, which is stayed with where it is hardly worse (`CHANGED`).
        least_s: Seconds that a period takes anyway, for what lies below: to be faster than that is worth nothing, fewer bytes are.
    """
    period = len(cycle.accesses)
    held = held or bytes(period)
    inside = _either(turned(above, phase), held) if above else held
    candidates: list[tuple[Rule, bytes | None]] = [(_belady(lag), None) for lag in LAGS if not fixed]
    sizes = sorted(costs.nbytes.values())
    largest, median = sizes[-1], sizes[len(sizes) // 2]
    variants = [(slots * largest, False) for slots in SLOTS]
    if largest >= 2 * median:  # room for the largest is room for several of the others
        variants[:0] = [(largest + slots * median, False) for slots in BESIDE]
    if any(cycle.unread):
        variants.append((OUTLINED * largest, True))
    tried = set()
    for aside, by_worth in variants:
        for kept in keep(cycle, costs, aside, inside, by_worth=by_worth):
            if kept is None:
                yield None
            elif kept not in tried:
                tried.add(kept)
                there = turned(_either(kept, held), -phase)
                candidates.append((_fixed(there, period), there))
    outcomes: list[Outcome] = []
    for rule, there_or_none in candidates:
        for outcome in run(cycle, costs, rule, phase, inside, there_or_none):
            if outcome is None:
                yield None
            else:
                outcomes.append(outcome)
    if period <= REFINED:
        for better in _refine(cycle, costs, phase, inside, outcomes):
            if better is None:
                yield None
            else:
                outcomes.append(better)
    least = max(least_s, min(outcome.seconds for outcome in outcomes))
    quick = [outcome for outcome in outcomes if outcome.seconds <= least * (1 + TOLERANCE)]
    if len(quick) > 1:
        light: list[Outcome] = []
        little = costs.hurried()
        for found in quick:
            for hurried in run(cycle, little, found.rule, phase, inside, found.kept):
                if hurried is None:
                    yield None
                else:
                    light.append(hurried)
        soon = max(least_s, min(hurried.seconds for hurried in light)) * (1 + LIGHT_TOLERANCE)
        quick = [found for found, hurried in zip(quick, light, strict=True) if hurried.seconds <= soon]
    best = min(quick, key=lambda found: found.moved)
    for found in quick:
        if present is not None and found.kept == present and found.moved <= best.moved * (1 + CHANGED):
            best = found
    yield Choice(best.rule, best.kept, best.seconds)


def outline(cycle: Cycle, costs: Mapping[Tier, Costs], held: Mapping[Tier, bytes], phase: int) -> Iterator[dict[Tier, Choice] | None]:
    """A plan for two tiers that is soon made and seldom bad, to go by until a better one is found: `OUTLINED` slots rotate."""
    period = len(cycle.accesses)
    above, choices = bytes(period), {}
    for tier in (Tier.GPU, Tier.RAM):
        aside = OUTLINED * max(costs[tier].nbytes.values())
        for kept in keep(cycle, costs[tier], aside, _either(above, held[tier]), by_worth=any(cycle.unread)):
            if kept is None:
                yield None
            else:
                above = _either(kept, held[tier])
                there = turned(above, -phase)
                choices[tier] = Choice(_fixed(there, period), there, 0.0)
    yield choices


def _refine(cycle: Cycle, costs: Costs, phase: int, inside: bytes, outcomes: Sequence[Outcome]) -> Iterator[Outcome | None]:
    """Change the best plan use by use as long as that makes it better: of few blocks it counts which fit beside one another."""
    period = len(cycle.accesses)
    best = min((found for found in outcomes if found.kept is not None), key=lambda found: found.score)
    changed = True
    while changed:
        changed = False
        for position in range(period):
            if inside[(position - phase) % period]:
                continue
            assert best.kept is not None
            flags = bytearray(best.kept)
            flags[position] ^= 1
            there = bytes(flags)
            for outcome in run(cycle, costs, _fixed(there, period), phase, inside, there):
                if outcome is None:
                    yield None
                elif outcome.score < best.score * (1 - 1e-6):
                    best, changed = outcome, True
    yield best


def _either(some: bytes, others: bytes) -> bytes:
    """By position, whether one of two flags is set. At once, as a long period item by item would take milliseconds under the lock."""
    return (int.from_bytes(some) | int.from_bytes(others)).to_bytes(len(some))


def turned(values: Values, by: int) -> Values:
    """As if the period began `by` positions later."""
    by %= len(values)
    return values[by:] + values[:by]


def _belady(lag: int) -> Rule:
    return lambda future, cursor, blocks, weigh: Belady(future, cursor, blocks, weigh, lag)


def _fixed(kept: bytes, period: int) -> Rule:
    return lambda future, cursor, blocks, weigh: Fixed(future, cursor, blocks, weigh, kept, period)


def run(cycle: Cycle, costs: Costs, rule: Rule, phase: int, above: bytes, kept: bytes | None) -> Iterator[Outcome | None]:
    """Play the periods. Yields None between steps, and the outcome at last. `kept`: as in `Choice`."""
    model = _Model(cycle, costs, rule, phase, above, kept)
    period = len(cycle.accesses)
    for _ in range(WARM_UP * period):
        model.step()
        yield None
    before = model.now_s, model.moved
    measured = MEASURED if kept is None else 1  # what is kept is the same in every period
    for _ in range(measured * period):
        model.step()
        yield None
    yield Outcome((model.now_s - before[0]) / measured, (model.moved - before[1]) / measured, rule, kept)


class _Shifted:
    """A cycle whose position 0 lies at another position of the trace."""

    def __init__(self, cycle: Cycle, phase: int) -> None:
        self._cycle = cycle
        self._phase = phase

    def at(self, position: int) -> BlockId:
        return self._cycle.at(position - self._phase)

    def next_use(self, block: BlockId, position: int) -> float:
        return self._cycle.next_use(block, position - self._phase) + self._phase

    def last_use(self, block: BlockId, position: int) -> float:
        uses, period = self._cycle.uses[block], len(self._cycle.accesses)
        lap, place = divmod(position - self._phase, period)
        index = bisect_left(uses, place) - 1
        if index < 0:
            lap -= 1
        return lap * period + uses[index] + self._phase


class _Model:
    """One tier, its two links, and computing, in seconds."""

    def __init__(self, cycle: Cycle, costs: Costs, rule: Rule, phase: int, above: bytes, kept: bytes | None) -> None:
        self._cycle = cycle
        self._kept = None if kept is None else turned(kept, phase)
        self._costs = costs
        self._ranking = rule(_Shifted(cycle, phase), phase, [], self._weigh)
        self._position = 0
        self._above = above
        # Kept on the tier above, or held.
        self._up = {block for block, uses in cycle.uses.items() if all(above[use] for use in uses)} if any(above) else set()
        self._free = costs.capacity_bytes
        self._dirty: set[BlockId] = set()
        self._ready: dict[BlockId, float] = {}  # resident, and since when
        self._used: dict[BlockId, float] = {}  # when its last use is over
        self._load_free = self._save_free = self._ordered = 0.0
        self.now_s = 0.0
        self.moved = 0.0

    def _weigh(self, block: BlockId) -> float:
        cost = self._costs.load_s[block] + (self._costs.save_s[block] if block in self._dirty else 0.0)
        return cost / self._costs.nbytes[block]

    def step(self) -> None:
        """One access."""
        place = self._position % len(self._cycle.accesses)
        block = self._cycle.accesses[place]
        was_up = block in self._up
        if not was_up and block not in self._ready:
            self._load(block, whole=bool(self._cycle.whole[place]))
        self.now_s = max(self.now_s, self._ready.get(block, 0.0)) + self._costs.leased_s[place]
        self._used[block] = self.now_s + self._costs.away_s.get(block, 0.0)
        if self._cycle.writes[place]:
            self._dirty.add(block)
        if self._cycle.spent[place]:
            self._up.discard(block)
            self._dirty.discard(block)
            self._forget(block)
        elif self._above[place]:
            self._up.add(block)
            self._forget(block)
        else:
            if was_up:
                self._up.remove(block)
                if block in self._dirty:  # it comes down
                    self._ready[block] = self.now_s
                    self._make_room(self._costs.nbytes[block])
                    self._ranking.add(block)
            if self._kept is not None and not self._kept[place] and not self._cycle.unread[place] and block in self._dirty:
                self._used[block] = self._save(block, self._used[block])
        self.now_s += self._costs.after_s[place]
        self._position += 1
        self._ranking.move(True)

    def _load(self, block: BlockId, *, whole: bool) -> None:
        free_s = self._make_room(self._costs.nbytes[block])
        if whole:
            self._ready[block] = free_s
        else:
            self._ordered = free_s
            load_s = self._costs.load_s[block]
            self._load_free = self._ready[block] = max(free_s, self._load_free) + load_s
            self.moved += load_s
        self._ranking.add(block)

    def _forget(self, block: BlockId) -> None:
        """It needs no extent any more."""
        if block in self._ready:
            self._ranking.remove(block)
            del self._ready[block]
            self._free += self._costs.nbytes[block]

    def _make_room(self, nbytes: int) -> float:
        """Returns when there is room."""
        free_s = self._ordered
        if self._free < nbytes:
            leaving = []
            for victim in self._ranking.order():
                leaving.append(victim)
                self._free += self._costs.nbytes[victim]
                if self._free >= nbytes:
                    break
            for victim in leaving:
                free_s = max(free_s, self._leave(victim))
        self._free -= nbytes
        return free_s

    def _leave(self, victim: BlockId) -> float:
        """Returns when its extent is free."""
        self._ranking.remove(victim)
        del self._ready[victim]
        over = self._used[victim]
        return self._save(victim, max(over, self._ordered)) if victim in self._dirty else over

    def _save(self, block: BlockId, begin_s: float) -> float:
        """Returns when the block is written back."""
        self._dirty.remove(block)
        save_s = self._costs.save_s[block]
        self._save_free = max(begin_s, self._save_free) + save_s
        self.moved += save_s
        return self._save_free


def keep(cycle: Cycle, costs: Costs, aside: int, above: bytes, *, by_worth: bool = False) -> Iterator[bytes | None]:
    """Choose the uses behind which to keep the block, so that `aside` bytes stay for the others to rotate through. Yields as `choose`.

    Keeping a block from one use to the next saves its return and takes its bytes in between: what saves most per byte and
    position comes first. Where that is the same, as on a cycle, they are spread over the period, so that the link is
    needed evenly.

    Args:
        by_worth: What saves most per byte comes first, for however long: better where all that competes does so at the same few
            positions, as at the turn from one pass to the next.
    """
    period = len(cycle.accesses)
    room = _Room(period, costs.capacity_bytes - aside)
    bits = max(1, (period - 1).bit_length())
    ranked: list[tuple[float, float, int, int]] = []  # a heap, as sorting a long period at once would take milliseconds under the lock
    for position, block in enumerate(cycle.accesses):
        if not above[position] and not cycle.spent[position]:
            saved = (0.0 if cycle.unread[position] else costs.load_s[block]) + (costs.save_s[block] if block in cycle.written else 0.0)
            worth = saved / costs.nbytes[block]
            lasts = cycle.next_use(block, position + 1) - position
            key = (-float(f"{worth:.6e}"), lasts) if by_worth else (-worth / lasts, 0.0)  # quotients that should be equal differ a little
            heappush(ranked, (*key, int(f"{position:0{bits}b}"[::-1], 2), position))
            yield None
    kept = bytearray(period)
    while ranked:
        *_, position = heappop(ranked)
        block = cycle.accesses[position]
        if room.take(position, int(cycle.next_use(block, position + 1)) - position, costs.nbytes[block]):
            kept[position] = 1
        yield from (None,) * 4  # it takes about as long as four steps of the model
    yield bytes(kept)


class _Room:
    """Bytes taken at each position of a cycle; taking and asking cost O(log n)."""

    def __init__(self, period: int, capacity: int) -> None:
        self._size = 1 << max(0, (period - 1).bit_length())
        self._period = period
        self._most = [0] * (2 * self._size)  # of a subtree, without what its ancestors add
        self._added = [0] * (2 * self._size)
        self._capacity = capacity

    def take(self, position: int, length: int, nbytes: int) -> bool:
        """Take bytes between two uses, both ends' own positions left out, unless some position would be over capacity."""
        start, end = position + 1, position + length
        parts = [(start, min(end, self._period))]
        if end > self._period:
            parts.append((max(0, start - self._period), end - self._period))
        parts = [(low, high) for low, high in parts if low < high]
        if any(self._peak(1, 0, self._size, low, high) + nbytes > self._capacity for low, high in parts):
            return False
        for low, high in parts:
            self._add(1, 0, self._size, low, high, nbytes)
        return True

    def _peak(self, node: int, left: int, right: int, low: int, high: int) -> int:
        if low <= left and right <= high:
            return self._most[node]
        middle = (left + right) // 2
        found = 0
        if low < middle:
            found = self._peak(2 * node, left, middle, low, high)
        if high > middle:
            found = max(found, self._peak(2 * node + 1, middle, right, low, high))
        return found + self._added[node]

    def _add(self, node: int, left: int, right: int, low: int, high: int, nbytes: int) -> None:
        if low <= left and right <= high:
            self._most[node] += nbytes
            self._added[node] += nbytes
            return
        middle = (left + right) // 2
        if low < middle:
            self._add(2 * node, left, middle, low, high, nbytes)
        if high > middle:
            self._add(2 * node + 1, middle, right, low, high, nbytes)
        self._most[node] = max(self._most[2 * node], self._most[2 * node + 1]) + self._added[node]
