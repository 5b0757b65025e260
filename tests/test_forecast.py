"""What the forecast knows: nothing false, and after two periods everything."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tierstore.catalog import BlockId
from tierstore.policies import forecast
from tierstore.policies.forecast import CONTEXT, Forecast

PERIODS = st.lists(st.integers(0, 12), min_size=2, max_size=40)


def tell(accesses: list[int], into: Forecast | None = None) -> Forecast:
    told = into if into is not None else Forecast()
    for block in accesses:
        told.append(BlockId(block))
    return told


def is_unambiguous(period: list[int]) -> bool:
    """Whether the last few accesses always tell what comes next."""
    after: dict[tuple[int, ...], int] = {}
    around = period * (2 + CONTEXT // len(period))
    for start in range(len(period)):
        context = tuple(around[start : start + CONTEXT])
        if after.setdefault(context, around[start + CONTEXT]) != around[start + CONTEXT]:
            return False
    return True


@given(PERIODS, st.data())
def test_after_two_periods_it_predicts_exactly(period: list[int], data: st.DataObject) -> None:
    assume(is_unambiguous(period))
    length = len(period)
    told = tell(period * 2 + (period * CONTEXT)[:CONTEXT])  # a wrong guess may hold until the first accesses of the third
    trace = [period[index % length] for index in range(told.now)]
    for _ in range(3 * length):
        block = period[told.now % length]
        assert told.known
        assert told.period is not None
        assert told.expected(told.now) == block
        reach = told.period
        for position in range(told.now, told.now + reach):
            assert told.expected(position) == period[position % length]
        assert told.expected(told.now + reach) is None
        assert told.expected(told.now - 1) is None
        asked = BlockId(data.draw(st.integers(0, 13)))
        nearest = next((told.now + ahead for ahead in range(reach) if period[(told.now + ahead) % length] == asked), math.inf)
        assert told.next_use(asked) == nearest
        assert list(told.window()) == [period[position % length] for position in range(told.now, told.now + reach)]
        epoch = told.epoch
        assert told.append(BlockId(block))
        assert told.epoch == epoch, "expectations that hold do not change"
        trace.append(block)


@given(st.lists(st.integers(0, 5), max_size=120))
def test_answers_agree_with_one_another(accesses: list[int]) -> None:
    """Whatever was told: `next_use` is the first position at which `expected` names the block."""
    told = Forecast()
    for access in accesses:
        told.append(BlockId(access))
        window = list(told.window())
        assert bool(window) == told.known == (told.period is not None)
        assert [told.expected(told.now + ahead) for ahead in range(len(window))] == window
        for block in range(6):
            expected = told.now + window.index(BlockId(block)) if block in window else math.inf
            assert told.next_use(BlockId(block)) == expected


@given(st.lists(st.integers(0, 5), max_size=120))
def test_answers_change_only_with_the_epoch(accesses: list[int]) -> None:
    """As long as `append` says that expectations hold, no block but the one accessed is expected at another position."""
    told = Forecast()
    for access in accesses:
        before = {block: told.next_use(BlockId(block)) for block in range(6)}
        epoch = told.epoch
        held = told.append(BlockId(access))
        after = {block: told.next_use(BlockId(block)) for block in range(6)}
        if held:
            assert told.epoch == epoch
        if told.epoch == epoch and told.known:
            assert all(before[block] == after[block] for block in before if block != access)


@given(PERIODS, st.lists(st.integers(20, 30), min_size=1, max_size=10))
def test_an_evaluation_in_between_is_got_over(period: list[int], evaluation: list[int]) -> None:
    """Accesses that break the pattern cost at most what it takes to find the place again."""
    assume(is_unambiguous(period) and len(set(period)) > 1)
    told = tell(period * 4)
    tell(evaluation, told)
    tell(period, told)
    tell((period * CONTEXT)[:CONTEXT], told)
    start = (len(period) + CONTEXT) - len(period)
    wrong = 0
    for index in range(2 * len(period)):
        block = period[(start + index) % len(period)]
        wrong += told.expected(told.now) not in (block, None)
        told.append(BlockId(block))
    assert wrong <= 2


@given(PERIODS, st.integers(0, 20))
def test_the_period_goes_on_for_ever(period: list[int], beyond: int) -> None:
    """However far ahead: `at`, `next_use` and `last_use` speak of one and the same endless trace."""
    assume(is_unambiguous(period))
    trace = period * 3 + (period * CONTEXT)[:CONTEXT]
    told = tell(trace)
    endless = [*trace, *(period[index % len(period)] for index in range(len(trace), len(trace) + 5 * len(period) + beyond))]
    assert [told.at(position) for position in range(len(endless))] == endless
    for position in range(told.now, told.now + 2 * len(period) + beyond):
        for block in range(14):
            following = [place for place in range(position, len(endless)) if endless[place] == block]
            before = [place for place in range(position) if endless[place] == block]
            assert told.next_use(BlockId(block), position) == (following[0] if following else math.inf)
            assert told.last_use(BlockId(block), position) == (before[-1] if before else -math.inf)


def test_the_longest_agreement_tells_passes_apart() -> None:
    """Three equal passes of twenty blocks and then another block: short contexts cannot tell which pass this is."""
    step = [*list(range(20)) * 3, 30]
    told = tell(step * 2)
    for index in range(3 * len(step)):
        assert told.expected(told.now) == step[index % len(step)]
        told.append(BlockId(step[index % len(step)]))


def test_what_never_repeats_is_never_expected() -> None:
    told = tell(list(range(500)))
    assert not told.known
    assert told.next_use(BlockId(3)) == math.inf
    assert told.expected(told.now) is None
    assert list(told.window()) == []


def test_gradient_accumulation_is_one_period() -> None:
    """Four forward and backward passes, then a step over other blocks: after one whole step the end of the passes is foreseen."""
    layers, states = list(range(6)), list(range(10, 16))
    step = (layers + layers[::-1]) * 4 + states
    told = tell(step * 2)
    for index in range(2 * len(step)):
        assert told.expected(told.now) == step[index % len(step)]
        told.append(BlockId(step[index % len(step)]))


def test_it_forgets_what_is_long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "KEEP", 64)
    told, choose = Forecast(), random.Random(1)
    for index in range(2000):
        told.append(BlockId(choose.randrange(4) if index % 500 < 100 else index % 7))
        assert len(told._sequence) <= 2 * 64
        assert sum(map(len, told._positions.values())) == len(told._sequence)
        window = list(told.window())
        for block in range(7):
            assert told.next_use(BlockId(block)) == (told.now + window.index(BlockId(block)) if block in window else math.inf)
    assert len(told._contexts) <= 4 * 2 * 64


def test_what_repeats_by_chance_is_not_trusted() -> None:
    """Experts drawn anew for each token: a few that follow one another as they once did say nothing of the next."""
    chance = random.Random(5)
    forecast = Forecast()
    trusted = 0
    for _ in range(400):
        for layer in range(8):
            for expert in sorted(chance.sample(range(6), 3)):
                forecast.append(BlockId(10 * layer + expert))
                trusted += forecast.known
    assert trusted < 0.05 * 400 * 24
    for step in range(20):  # and a rhythm that sets in is
        for block in range(100, 140):
            forecast.append(BlockId(block))
        assert forecast.known == (step >= 3) or step in (1, 2)
