"""Evict what is needed furthest away, weighed by what its return costs.

Belady's rule (A study of replacement algorithms for a virtual-storage computer, 1966) on the forecast of a repeating trace.
Three things are added to it: a copy that must be written back before its extent can be reused costs more than one that is
merely dropped; bytes, not blocks, are what space is made of; and where it would leave links idle, a plan for the whole period
takes its place (`plan`). Until a period is recognised it is LRU.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from tierstore.catalog import BlockId
from tierstore.policies.base import PolicyBase
from tierstore.policies.forecast import Forecast
from tierstore.policies.plan import Choice, Costs, Cycle, choose, outline, turned
from tierstore.policies.ranking import Belady, Ranking
from tierstore.residency import Tier
from tierstore.trace import Link

STRIDE = 256
"""Positions the cursor moves at most per question: bounds the time under the lock."""

THOUGHT = 24
"""Steps of planning per access."""

SETTLED = 32
"""Accesses, and `MEASURED` periods, that must have come as expected before a period is planned for."""

MEASURED, REVIEWED = 2, 32
"""Periods of which computing is measured before they are planned for; and afterwards, out of how many, to see whether it has changed."""

RESTLESS = 8
"""Plans for one period after which the next is not made before one step per access has been paid for the last."""

WRITTEN = 0.5
"""Of the bytes of a period, the share that is written from which on RAM goes by a plan that is the same in every period. Without one
nobody can say what will come down changed, and keep room for it: Belady's rule moved a quarter more than on the model."""

CHANGE = 1.5
"""The time between accesses, or that of a byte on a link, must change by this factor to be planned for anew."""


class Mean:
    """Of values that repeat with a period.

    Attributes:
        last: Over the last whole period; None before there was one.
    """

    def __init__(self) -> None:
        self.last: float | None = None
        self._sum = 0.0
        self._count = 0

    def add(self, value: float, period: int) -> None:
        self._sum += value
        self._count += 1
        if self._count >= period:
            self.last = self._sum / self._count
            self._sum, self._count = 0.0, 0


class Lookahead(PolicyBase):
    """The default policy.

    Resident blocks of each tier are kept ranked by what comes behind the tier's cursor. Only the block at the cursor changes its
    place, so an access costs O(log n); when expectations change, the order is rebuilt at the next question.
    """

    def __init__(self) -> None:
        self.forecast = Forecast()
        self._recent: dict[Tier, OrderedDict[BlockId, None]] = {Tier.GPU: OrderedDict(), Tier.RAM: OrderedDict()}
        self._ranking: dict[Tier, Ranking] = {}
        self._choices: dict[Tier, Choice] = {}
        self._built_epoch = -1
        self._planned_epoch = -1
        self._planned_seconds = 0.0
        self._planned_at = 0
        self._planned_held: dict[Tier, int] = {}
        self._planned_rates: dict[Link, float] = {}
        self._pace = Mean()
        self._measuring = False
        self._thought = 0  # steps that the last plan took
        self._num_plans = 0  # since the period was recognised
        self._thinking: Iterator[dict[Tier, Choice] | None] | None = None

    @property
    def epoch(self) -> int:
        return self.forecast.epoch

    def accessed(self, block: BlockId, write: bool) -> None:
        self.forecast.append(block, write)
        if self._built_epoch == self.epoch:
            for ranking in self._ranking.values():
                if ranking.cursor < self.forecast.now:
                    ranking.move(True)
        if self.forecast.known:
            self._pace.add(self.view.seconds_between, self.forecast.period or 1)
            self._think()
        self._measure()

    def touched(self, block: BlockId, tier: Tier) -> None:
        if block in self._recent[tier]:
            self._recent[tier].move_to_end(block)

    def admitted(self, block: BlockId, tier: Tier) -> None:
        self._recent[tier][block] = None
        if self._built_epoch == self.epoch:
            self._ranking[tier].add(block)

    def removed(self, block: BlockId, tier: Tier) -> None:
        del self._recent[tier][block]
        if self._built_epoch == self.epoch:
            self._ranking[tier].remove(block)

    def next_use(self, block: BlockId) -> float:
        return self.forecast.next_use(block)

    def expected(self, position: int) -> BlockId | None:
        return self.forecast.expected(position)

    def repeats(self, position: int) -> int | None:
        """The past position of which an expected one is the repetition."""
        return self.forecast.repeats(position)

    def victims(self, tier: Tier) -> Iterator[BlockId]:
        if not self.forecast.known:
            return iter(self._recent[tier])
        self._build()
        return self._with_what_is_awaited_last(self._ranking[tier])

    def _with_what_is_awaited_last(self, ranking: Ranking) -> Iterator[BlockId]:
        """What is to be used before the cursor was seen to: it leaves for nothing that may take another's place."""
        awaited: list[tuple[float, BlockId]] = []
        late = 1 if ranking.cursor == self.forecast.now else 0  # what is demanded was counted as an access when it was asked for
        for block in ranking.order(late):
            next_use = self.forecast.next_use(block) if ranking.cursor > self.forecast.now else math.inf
            if next_use < ranking.cursor:
                awaited.append((-next_use, block))
            else:
                yield block
        awaited.sort()
        yield from (block for _, block in awaited)

    def stays(self, block: BlockId, tier: Tier, position: int, until: float = 0.0) -> bool | None:
        """Whether a block is to stay on a tier behind its use at `position`, past or to come, and behind all that follow before `until`,
        each time until its next use; None without a plan that is the same in every period, and where the block is not used.
        """
        choice = self._choices.get(tier) if self._choices and self._planned_epoch == self.epoch else None
        period = self.forecast.period
        if choice is None or choice.kept is None or period is None or self.forecast.at(position) != block:
            return None
        use: float = position
        until = min(until, use + period)
        while choice.kept[int(use) % period]:
            use = self.forecast.next_use(block, int(use) + 1)
            if use >= until:
                return True
        return False

    def victims_for(self, tier: Tier, position: int) -> Iterator[BlockId]:
        """As `victims`, for a block that is needed at `position`, before which nothing more is to be fetched."""
        if not self.forecast.known:
            return iter(())
        self._build()
        ranking = self._ranking[tier]
        position = max(position, self.forecast.now)
        forward = position > ranking.cursor
        for _ in range(min(abs(position - ranking.cursor), STRIDE)):
            ranking.move(forward)
        return ranking.order() if ranking.cursor == position else iter(())

    # -- ranking ---------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        if self._built_epoch == self.epoch:
            return
        self._built_epoch = self.epoch
        for tier in self._recent:
            self._rank(tier, self.forecast.now)

    def _rank(self, tier: Tier, cursor: int) -> None:
        def weigh(block: BlockId) -> float:
            nbytes = self.view.nbytes(block)
            if not nbytes:
                return 0.0
            cost = self.view.load_cost(block, tier)
            return (cost + self.view.save_cost(block, tier) if self.view.is_dirty(block, tier) else cost) / nbytes

        choice = self._choices.get(tier) if self._planned_epoch == self.epoch else None
        rule = choice.rule if choice is not None else Belady
        self._ranking[tier] = rule(self.forecast, cursor, list(self._recent[tier]), weigh)

    # -- planning --------------------------------------------------------------------------------------------------------

    def _think(self) -> None:
        """Plan a little: once for each period that has come as expected, and again when computing takes another time."""
        if self._planned_epoch != self.epoch:
            self._choices = {}
            self._thinking = None
            self._num_plans = 0
            if self.forecast.held < max(SETTLED, MEASURED * (self.forecast.period or 0)):
                return
        elif self._thinking is None and not self._outdated():
            return
        if self._thinking is None:
            self._planned_epoch = self.epoch
            self._planned_seconds = self._seconds_between
            self._planned_held = self._held_bytes()
            self._planned_rates = self._rates()
            self._thought = 0
            self._num_plans += 1
            self._thinking = self._plan()
        for _ in range(THOUGHT):
            self._thought += 1
            try:
                choices = next(self._thinking)
            except StopIteration:
                self._thinking, self._planned_at = None, self.forecast.now
                return
            if choices is not None:
                self._adopt(choices)
                return

    def _measure(self) -> None:
        """Have computing measured until it is planned with, and from time to time afterwards; where half a period repeats, not before."""
        now, period = self.forecast.now, self.forecast.period or 1
        unplanned = self._planned_epoch != self.epoch or self._thinking is not None
        wanted = self.forecast.known and (self.forecast.held >= period // 2 if unplanned else now // period % REVIEWED < MEASURED)
        if wanted != self._measuring:
            self._measuring = wanted
            self.view.measure(wanted)

    @property
    def _seconds_between(self) -> float:
        """On average over a period: forward and backward passes compute for different times between two accesses."""
        return self.view.seconds_between if self._pace.last is None else self._pace.last

    def _held_bytes(self) -> dict[Tier, int]:
        return {tier: self.view.held_bytes(tier) for tier in self._recent}

    def _rates(self) -> dict[Link, float]:
        """Seconds per byte."""
        return {link: self.view.seconds_per_byte(link) for link in Link}

    def _outdated(self) -> bool:
        """Whether other blocks are held, or computing takes another time than was planned with, or copies do.

        Of the latter two each plan is to last longer, until one costs a step per access.
        """
        turn = self.forecast.now % (self.forecast.period or 1) == 0
        if turn and self._planned_held != self._held_bytes():
            return True
        rest = self._thought if self._num_plans >= RESTLESS else self._thought >> (RESTLESS - self._num_plans)
        if self.forecast.now - self._planned_at < rest:
            return False
        if turn and any(_differ(rate, self._planned_rates[link]) for link, rate in self._rates().items()):
            return True
        return _differ(max(self._seconds_between, 1e-9), max(self._planned_seconds, 1e-9))

    def _adopt(self, choices: dict[Tier, Choice]) -> None:
        self._choices = choices
        if self._built_epoch == self.epoch:
            for tier in choices:
                self._rank(tier, self._ranking[tier].cursor)

    def _plan(self) -> Iterator[dict[Tier, Choice] | None]:
        """Yields None after each small piece of work, and what to go by from then on, the better the later.

        A period begins at a multiple of its length, whenever it is planned for: the same plan is then found again.
        """
        window, now = list(self.forecast.window()), self.forecast.now
        period = len(window)
        phase = now - now % period
        accesses = turned(window, phase - now)
        writes = turned(bytes(self.forecast.written()), phase - now)
        view = self.view
        whole, spent = bytearray(), bytearray()
        leased_s: list[float] = []
        after_s: list[float] = []
        nbytes: dict[BlockId, int] = {}
        seconds_on: dict[Link, dict[BlockId, float]] = {link: {} for link in Link}
        flags = {tier: bytearray() for tier in self._recent}
        for place, block in enumerate(accesses):
            position = phase + place - (period if phase + place >= now else 0)  # the last time that it was
            whole.append(view.wrote_whole(position))
            spent.append(view.used_up(position) or view.used_up(position - period))  # the last lease may not have ended yet
            leased, after = self._computed(position, period)
            leased_s.append(leased)
            after_s.append(after)
            for tier, of_tier in flags.items():
                of_tier.append(view.is_held(block, tier))
            if block not in nbytes:
                nbytes[block] = view.nbytes(block)
                for link, of_link in seconds_on.items():
                    of_link[block] = nbytes[block] * self._planned_rates[link]
            yield None
        held = {tier: bytes(of_tier) for tier, of_tier in flags.items()}
        cycle = Cycle(accesses, writes, whole, spent)
        choices: dict[Tier, Choice] = {}
        total = sum(nbytes.values())
        room = {tier: view.capacity_bytes(tier) - self._planned_held[tier] for tier in held}
        if total > view.capacity_bytes(Tier.GPU) and all(nbytes.values()):
            spills = total - self._planned_held[Tier.GPU] > view.capacity_bytes(Tier.RAM)
            costs = Costs(room[Tier.GPU], nbytes, seconds_on[Link.H2D], seconds_on[Link.D2H], leased_s, after_s)
            below = Costs(room[Tier.RAM], nbytes, seconds_on[Link.NVME_READ], seconds_on[Link.NVME_WRITE], leased_s, after_s)
            if spills and not self._choices:
                yield from outline(cycle, {Tier.GPU: costs, Tier.RAM: below}, held, phase)
            spilled = max(0, total - self._planned_held[Tier.GPU] - room[Tier.GPU] - room[Tier.RAM]) if spills else 0
            least_s = spilled / total * sum(below.load_s.values())
            for found in choose(cycle, costs, phase, fixed=spills, held=held[Tier.GPU], present=self._kept(Tier.GPU), least_s=least_s):
                yield None
                if found is not None:
                    choices[Tier.GPU] = found
            above, seconds = choices[Tier.GPU].kept, choices[Tier.GPU].seconds
            if spills and above is not None:
                away = {block: costs.load_s[block] + (costs.save_s[block] if block in cycle.written else 0.0) for block in nbytes}
                costs = replace(below, leased_s=[seconds / period] * period, after_s=[0.0] * period, away_s=away)
                written = sum(nbytes[block] for block in cycle.written) > WRITTEN * total
                for found in choose(cycle, costs, phase, fixed=written, above=above, held=held[Tier.RAM], present=self._kept(Tier.RAM)):
                    yield None
                    if found is not None:
                        choices[Tier.RAM] = found
        yield choices

    def _kept(self, tier: Tier) -> bytes | None:
        """As in `Choice`, of the plan gone by until now; None where that is the outline."""
        return self._choices[tier].kept if tier in self._choices and self._num_plans > 1 else None

    def _computed(self, position: int, period: int) -> tuple[float, float]:
        """Of an access of the last period, what `Costs` has of it: of the last two times, the shorter.

        See `pace`, [Note: What is remembered].
        """
        known = [each for each in (self.view.computed(position), self.view.computed(position - period)) if each is not None]
        return min(known, key=sum, default=(self._planned_seconds, 0.0))


def _differ(one: float, other: float) -> bool:
    return not other / CHANGE <= one <= other * CHANGE
