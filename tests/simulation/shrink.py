"""Makes a failing run smaller: fewer users, calls, blocks and faults, and fewer decisions that are not the dull ones.

Every try runs in a forked child, because a run that fails leaves its threads where they are. A try counts when it fails, with whatever
message: the smallest failing run is the best hint at a bug, and if it is another bug, that one is worth as much.
"""

from __future__ import annotations

import os
import pickle
import pprint
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.simulation.run import run
from tests.simulation.scenario import Calls, Scenario

CASE_SECONDS = 1.5
"""How long seeds are tried on one smaller scenario."""


@dataclass(frozen=True)
class Case:
    """A run that can be repeated: a scenario, and the seed or the script of its decisions."""

    scenario: Scenario
    seed: int
    script: Mapping[int, int] | None = None

    @property
    def size(self) -> tuple[int, ...]:
        scenario = self.scenario
        decisions = len(self.script) if self.script is not None else 1 << 30
        dull = (
            scenario.faults > 0,
            scenario.stuck is not None,
            scenario.cuda,
            scenario.close_after is not None,
            scenario.nvme_pages is not None,
            scenario.policy != "lru",
        )
        return (scenario.num_calls, len(scenario.plans), sum(map(bool, dull)), decisions)


@dataclass(frozen=True)
class Verdict:
    """How a case failed; empty text: it did not."""

    message: str
    taken: Mapping[int, int]


def judge(*cases: Case, seconds: float = CASE_SECONDS) -> tuple[Case, Verdict]:
    """Run cases in a child, one after the other, until one fails or the time is over. Returns the last that ran."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            case, verdict = _first_failing(cases, time.monotonic() + seconds)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump((case, verdict), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    return pickle.loads(data) if data else (cases[0], Verdict("the child died", {}))


def _first_failing(cases: Sequence[Case], deadline: float) -> tuple[Case, Verdict]:
    case, verdict = cases[0], Verdict("", {})
    for case in cases:
        outcome = run(case.scenario, case.seed, case.script)
        verdict = Verdict(str(outcome.failure) if outcome.failure is not None else "", outcome.world.decisions.taken)
        if verdict.message or time.monotonic() > deadline:
            break
    return case, verdict


def shrink(case: Case, *, seconds: float = 120.0, report: Callable[[str], None] = print) -> tuple[Case, str]:
    """The smallest failing case found within a time. Returns it and its message.

    Raises:
        ValueError: The case does not fail.
    """
    case, first = judge(case)
    if not first.message:
        raise ValueError("it does not fail")
    best, message = replace(case, script=dict(first.taken)), first.message
    deadline = time.monotonic() + seconds
    for smaller, ways in ((_smaller_scenarios, _other_decisions), (_duller_scripts, _as_is)):
        before = None
        while best != before and time.monotonic() < deadline:
            before, index = best, 0
            while index < len(candidates := list(smaller(best))) and time.monotonic() < deadline:
                found, verdict = judge(*ways(candidates[index]))
                found = replace(found, script=dict(verdict.taken))
                if verdict.message and found.size < best.size:
                    best, message = found, verdict.message  # what stood behind it in the list has taken its place
                    report(f"still fails: {best.size[0]} calls, {len(best.script or {})} decisions: {message.splitlines()[0][:80]}")
                else:
                    index += 1
    return best, message


def _as_is(case: Case) -> list[Case]:
    return [case]


def _other_decisions(case: Case) -> list[Case]:
    """Fewer calls make other decisions meet them: try the recorded ones, none, and those of many seeds."""
    return [case, replace(case, script={}), *(replace(case, seed=case.seed + seed, script=None) for seed in range(200))]


def _duller_scripts(case: Case) -> Iterator[Case]:
    script = case.script or {}
    positions = sorted(script)
    length = len(positions)
    while length:
        for start in range(0, len(positions), length):
            gone = set(positions[start : start + length])
            yield replace(case, script={position: choice for position, choice in script.items() if position not in gone})
        length //= 2


def _smaller_scenarios(case: Case) -> Iterator[Case]:
    """The boldest cuts first."""
    yield from (replace(case, scenario=scenario) for scenario in _cut(case.scenario))


def _cut(scenario: Scenario) -> Iterator[Scenario]:
    for field in ("threads", "tasks"):
        users: tuple[Calls, ...] = getattr(scenario, field)
        for index in range(len(users)):
            yield replace(scenario, **{field: users[:index] + users[index + 1 :]})
        for index, calls in enumerate(users):
            for fewer in _fewer(calls):
                yield replace(scenario, **{field: (*users[:index], fewer, *users[index + 1 :])})
    for dull in ({"faults": 0.0}, {"stuck": None}, {"close_after": None}, {"nvme_pages": None}, {"policy": "lru"}, {"cuda": False}):
        changed = replace(scenario, **dull)  # type: ignore[arg-type]
        if changed != scenario:
            yield changed
    named = repr((scenario.threads, scenario.tasks))
    for field in ("blocks", "extra", "blanks"):
        plans = getattr(scenario, field)
        for plan in plans:
            if repr(plan.name) not in named and (field != "blocks" or len(plans) > 1):
                yield replace(scenario, **{field: tuple(other for other in plans if other is not plan)})


def _fewer(calls: Calls) -> Iterator[Calls]:
    length = len(calls)
    while length:
        for start in range(0, len(calls), length):
            yield calls[:start] + calls[start + length :]
        length //= 2
    for index, call in enumerate(calls):
        for simpler in _simpler(call):
            yield (*calls[:index], simpler, *calls[index + 1 :])


def _simpler(call: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if call[0] == "cancel":
        yield call[2]
        yield from (("cancel", call[1], simpler) for simpler in _simpler(call[2]))
    if call[0] == "use":
        _, wants, timeout, pause, inside = call
        yield from (("use", wants, timeout, pause, fewer) for fewer in _fewer(inside))
        if len(wants) > 1:
            yield from (("use", (*wants[:index], *wants[index + 1 :]), timeout, pause, inside) for index in range(len(wants)))


def as_test(case: Case, message: str) -> str:
    """The case as a test to paste."""
    script = dict(case.script) if case.script is not None else None
    first = message.splitlines()[0]
    return (
        "def test_NAME() -> None:\n"
        f'    """{first}"""\n'
        f"    scenario = {pprint.pformat(case.scenario, width=130, compact=True)}\n"
        f"    assert_holds(scenario, {case.seed}, {script})\n"
    )
